"""Commands and groups with lazy imports, global options, and error handling."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

import click

from lading.cli.failure import INTERRUPTED, USAGE, report
from lading.cli.output import printable
from lading.errors import did_you_mean

_DEBUG = "lading.debug"

log = logging.getLogger("lading")


def _set_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    # All contexts of a command line share `meta`, so the option works before and after the command's name.
    if value:
        context.meta[_DEBUG] = True


def debugging() -> bool:
    """Return whether the command line asks for the traceback of an error."""
    return bool(click.get_current_context().meta.get(_DEBUG))


def _set_verbose(context: click.Context, parameter: click.Parameter, value: int) -> None:
    if value:
        log.setLevel(logging.INFO if value == 1 else logging.DEBUG)


def _global_options(*, hidden: bool) -> list[click.Parameter]:
    return [
        click.Option(
            ["-v", "--verbose"], count=True, expose_value=False, callback=_set_verbose, hidden=hidden,
            help="Log each step; twice: in detail.",
        ),
        click.Option(
            ["--debug"], is_flag=True, expose_value=False, callback=_set_debug, hidden=hidden,
            help="Show the traceback of an error.",
        ),
    ]  # fmt: skip


class Command(click.Command):
    """A command that also accepts the global options after its name: ``lading load NAME --debug``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _global_options(hidden=True)


command = partial(click.command, cls=Command)
"""The decorator of a command."""


class Group(click.Group):
    """A group of commands that are imported on first use.

    :param sections: for each heading of the help, ``"module:attribute"`` of its subcommands.
    :param aliases: other names of subcommands, which the help does not show.
    """

    command_class = Command

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Mapping[str, str]] | None = None,
        aliases: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._sections = dict(sections or {})
        self._lazy = {name: place for section in self._sections.values() for name, place in section.items()}
        self._aliases = dict(aliases or {})
        self.params += _global_options(hidden=not isinstance(self, Program))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(USAGE)

        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._lazy, *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = self._aliases.get(cmd_name, cmd_name)
        if name in self._lazy:
            module, _, attribute = self._lazy[name].partition(":")
            command = getattr(import_module(module), attribute)
            assert isinstance(command, click.Command)
            return command

        return super().get_command(ctx, name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.list_commands(ctx)))
        sections: Mapping[str, Iterable[str]] = self._sections or {"Commands": self.list_commands(ctx)}
        for heading, names in sections.items():
            with formatter.section(heading):
                commands = [(name.ljust(width), self.get_command(ctx, name)) for name in names]
                formatter.write_dl([(name, c.get_short_help_str(formatter.width)) for name, c in commands if c])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}.{did_you_mean(args[0], self.list_commands(ctx))}")

        return super().resolve_command(ctx, args)


class Program(Group):
    """The whole command line."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run the command line and exit; :mod:`lading.errors` lists the exit codes."""
        extra.pop("standalone_mode", None)
        handler, level = _Stderr(), log.level
        log.addHandler(handler)
        log.setLevel(logging.WARNING)
        # SQLAlchemy logs errors in closing a connection, such as an interrupt, with a traceback.
        silent = logging.NullHandler()
        logging.getLogger("sqlalchemy.pool").addHandler(silent)
        _never_fail_to_encode()
        # lading checks what that client warns of, such as little disk space, and reports it in one line.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"huggingface_hub\.")

        try:
            code = super().main(args, prog_name or "lading", standalone_mode=False, **extra)
        except click.Abort:
            code = INTERRUPTED
        except click.ClickException as error:
            code = report(error, debug=False)
        except Exception as error:
            # No command has started yet, so this is a bug.
            code = report(error, debug=True)
        finally:
            logging.getLogger("sqlalchemy.pool").removeHandler(silent)
            log.removeHandler(handler)
            log.setLevel(level)

        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            # Flushing here reports a closed pipe as an error of the command, not of the interpreter's exit.
            if sys.stdout is not None:
                sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit):
            raise
        except BaseException as error:
            if isinstance(error, SystemExit):
                raise
            code = report(error, debug=debugging())
            _abandon_stdout()
            ctx.exit(code)

        return result


class _Stderr(logging.Handler):
    """A handler that writes the package's messages to the current ``sys.stderr``."""

    def emit(self, record: logging.LogRecord) -> None:
        label = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        try:
            click.echo(f"lading: {label}{printable(record.getMessage())}", err=True)
        except Exception:
            self.handleError(record)


def _never_fail_to_encode() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _abandon_stdout() -> None:
    """Replace a broken stdout (closed pipe, full disk), so that the interpreter does not fail to flush it at exit."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
