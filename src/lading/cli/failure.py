"""What the command line says and answers when something goes wrong: one line on stderr, and an exit code."""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress

import click

from lading.cli.output import printable
from lading.errors import AssetCardError, LadingError, ModelCheckpointMismatchError

USAGE = 2
SYSTEM = 8
INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell answers for a program that SIGPIPE ended, as ``head`` ends ``cat``."""

_LISTS = (AssetCardError, ModelCheckpointMismatchError)
"""Errors that may hold a list of problems; of all others one line is shown."""


def report(error: BaseException, *, debug: bool) -> int:
    """Say on stderr what went wrong, with the traceback if ``debug``; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE

    code, message = explain(error)
    # The code holds, whether or not somebody reads the words.
    with suppress(BrokenPipeError):
        if debug and not isinstance(error, click.ClickException):
            traceback.print_exception(error, file=sys.stderr)
        click.echo(f"lading: {'interrupted' if code == INTERRUPTED else f'error: {message}'}", err=True)

    return code


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and the words for it."""
    match error:
        case LadingError():
            lines = error.message.splitlines() or [type(error).__name__]
            return error.exit_code, "\n".join(map(printable, lines if isinstance(error, _LISTS) else lines[:1]))
        case KeyboardInterrupt():
            return INTERRUPTED, ""
        case click.UsageError():
            return USAGE, _usage(error)
        case click.ClickException():
            return error.exit_code, _line(error.format_message())
        case OSError():
            where = "" if error.filename is None else f": {printable(str(error.filename))}"
            what = _line(error.strerror or str(error) or type(error).__name__)
            return USAGE if isinstance(error, FileNotFoundError | FileExistsError) else SYSTEM, f"{what}{where}"
        case MemoryError():
            return SYSTEM, "Out of memory"
        # torch's own, which is a RuntimeError, is known by its name: this page does not import torch.
        case Exception() if type(error).__name__ == "OutOfMemoryError":
            return SYSTEM, _line(str(error))
        case _:
            what = _line(str(error))
            return 1, (
                f"{type(error).__name__}{what and f': {what}'} (this is a bug in lading; run again with --debug)"
            )


def _usage(error: click.UsageError) -> str:
    hint = f" `{error.ctx.command_path} --help` says more." if error.ctx is not None else ""
    # Click breaks some messages over lines, and ends some without a full stop.
    message = printable(" ".join(error.format_message().split()))

    return message + ("" if message.endswith((".", "?", "!", "?)")) else ".") + hint


def _line(message: str) -> str:
    return printable(next(iter(message.strip().splitlines()), ""))
