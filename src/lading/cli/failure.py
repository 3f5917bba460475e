"""Error reports of the command line: a line on stderr, and an exit code."""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress

import click

from lading.cli.output import printable
from lading.errors import AssetCardError, CatalogError, LadingError, ModelCheckpointMismatchError, TorchNotFoundError
from lading.system.needs import lacks_torch

USAGE = 2
MISMATCH = ModelCheckpointMismatchError.exit_code
CATALOG = CatalogError.exit_code
SYSTEM = 8
INTERRUPTED = 130
BROKEN_PIPE = 141
"""The exit code that a shell reports for a program that SIGPIPE ended, as ``head`` ends ``cat``."""

_LISTS = (AssetCardError, ModelCheckpointMismatchError)
"""Errors that may list several problems; of other errors only the first line is shown."""


def report(error: BaseException, *, debug: bool, of: str = "") -> int:
    """Report an error on stderr, with its traceback if ``debug``; return the exit code.

    :param of: the name of the model that failed, if there are several; the line begins with it if the error lacks it.
    """
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE

    code, message = explain(error)
    if printable(of) not in message:
        message = f"{printable(of)}: {message}"
    # The exit code must be returned even if stderr is closed.
    with suppress(BrokenPipeError):
        if debug and not isinstance(error, click.ClickException):
            traceback.print_exception(error, file=sys.stderr)
        click.echo(f"lading: {'interrupted' if code == INTERRUPTED else f'error: {message}'}", err=True)

    return code


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message of an error."""
    match error:
        case LadingError():
            lines = error.message.splitlines() or [type(error).__name__]
            return error.exit_code, "\n".join(map(printable, lines if isinstance(error, _LISTS) else lines[:1]))
        case KeyboardInterrupt() | click.Abort():
            return INTERRUPTED, ""
        case click.UsageError():
            return USAGE, _usage(error)
        case click.ClickException():
            return error.exit_code, _line(error.format_message())
        case OSError():
            where = "" if error.filename is None else f": {printable(str(error.filename))}"
            what = _line(error.strerror or str(error) or type(error).__name__)
            return USAGE if isinstance(error, FileNotFoundError | FileExistsError) else SYSTEM, f"{what}{where}"
        case ImportError() if lacks_torch(error):
            return explain(TorchNotFoundError.of("This command", error))
        case MemoryError():
            return SYSTEM, "Out of memory"
        # torch's OutOfMemoryError is recognized by its name, as this module does not import torch.
        case Exception() if type(error).__name__ == "OutOfMemoryError":
            return SYSTEM, _line(str(error))
        case _:
            what = _line(str(error))
            return 1, (
                f"{type(error).__name__}{what and f': {what}'} (this is a bug in lading; run again with --debug)"
            )


def _usage(error: click.UsageError) -> str:
    hint = f" Run `{error.ctx.command_path} --help` for help." if error.ctx is not None else ""
    # Click breaks some messages over lines, and ends some without a full stop.
    message = printable(" ".join(error.format_message().split()))

    return message + ("" if message.endswith((".", "?", "!", "?)")) else ".") + hint


def _line(message: str) -> str:
    return printable(next(iter(message.strip().splitlines()), ""))
