"""Output of rows and values: as tables for people, and as JSON, JSON Lines or CSV for programs."""

from __future__ import annotations

import csv
import enum
import functools
import io
import json
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, ParamSpec

import click

from lading.errors import escaped
from lading.system.display import human_count, unique_names

P = ParamSpec("P")

_GAP = "  "
_LEAST = 6
"""The width below which a column is not shortened while another one can be."""
_FIRST = 24
"""The width below which the first column, which identifies the row, is not shortened in favor of others."""


class Form(enum.Enum):
    """An output format of rows; the value is the name of its option."""

    TABLE = "table"
    JSON = "json"
    LINES = "nl"
    CSV = "csv"
    NAMES = "quiet"


def listing_options(command: Callable[P, None]) -> Callable[P, None]:
    """Add the options ``--json``, ``--nl``, ``--csv`` and ``-q`` to a command, which receives them as ``form``."""

    @click.option("--json", is_flag=True, help="One JSON array.")
    @click.option("--nl", is_flag=True, help="One JSON object per line.")
    @click.option("--csv", is_flag=True, help="CSV with a heading.")
    @click.option("-q", "--quiet", is_flag=True, help="Only names (the first column), one per line.")
    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        chosen = [form for form in Form if kwargs.pop(form.value, False)]
        if len(chosen) > 1:
            raise click.UsageError("Only one of --json, --nl, --csv and -q can be given.", click.get_current_context())

        command(*args, form=chosen[0] if chosen else Form.TABLE, **kwargs)  # type: ignore[arg-type]

    return wrapper


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table."""

    name: str
    heading: str | None = None
    show: Callable[[Any], str] | None = None
    """The formatter of values; default: :func:`text`."""
    right: bool = False
    """True to align values to the right."""
    keep: bool = False
    """True to shorten the other columns before this one."""
    color: Callable[[Any], str | None] | None = None
    """A function that returns the color of a value, by click's names."""


def write_rows(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    form: Form,
    *,
    table: Sequence[Column] | None = None,
) -> None:
    """Write ``rows`` to stdout; of a table without rows, nothing.

    :param columns: the names of the values in a row; JSON and CSV contain all of them.
    :param table: the columns of the table; default: all.
    """
    match form:
        case Form.TABLE:
            shown = table if table is not None else _columns_of(columns, rows)
            text = _table(shown, [[row[columns.index(c.name)] for c in shown] for row in rows]) if rows else ""
        case Form.NAMES:
            text = "".join(f"{'' if row[0] is None else printable(str(plain(row[0])))}\n" for row in rows)
        case Form.CSV:
            text = _csv(columns, rows)
        case Form.LINES:
            text = "".join(f"{o}\n" for o in _objects(columns, rows))
        case Form.JSON:
            objects = ",\n ".join(_objects(columns, rows))
            text = f"[{objects}]\n"

    click.echo(text, nl=False, color=True)


def write_objects(
    objects: Sequence[Mapping[str, object]], form: Form, *, table: Sequence[Column], single: bool
) -> None:
    """Write objects with the same keys to stdout.

    :param single: write the only object itself as JSON, not a list of one.
    """
    if single and form is Form.JSON:
        for value in objects:
            write_json(value)
    else:
        columns = list(objects[0]) if objects else [column.name for column in table]
        write_rows(columns, [list(value.values()) for value in objects], form, table=table)


def note(message: str, *, dry_run: bool = False) -> None:
    """Write a line to stderr: not a part of the result."""
    click.echo(f"lading: {message}{' (dry run: nothing was written)' if dry_run else ''}", err=True)


def write_json(value: object) -> None:
    """Write one JSON value to stdout, indented."""
    click.echo(as_json(value, indent=2))


def as_json(value: object, *, indent: int | None = None) -> str:
    """Return ``value`` as readable JSON: non-ASCII letters unescaped, unprintable characters escaped."""
    text = json.dumps(plain(value), ensure_ascii=False, indent=indent)
    if text.isprintable():
        return text

    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def write_pairs(pairs: Mapping[str, object]) -> None:
    """Write a name and a value per line to stdout; values are not shortened, so that they can be copied."""
    width = max(map(display_width, pairs), default=0)
    names = [printable(name) + " " * (width - display_width(name)) for name in pairs]
    if _colorful():
        names = [click.style(name, bold=True) for name in names]

    lines = (f"{name}{_GAP}{printable(text(value))}\n" for name, value in zip(names, pairs.values(), strict=True))
    click.echo("".join(lines), nl=False, color=True)


def plain(value: object) -> object:
    """Convert ``value`` to JSON types; bytes become hexadecimal, non-finite numbers become null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes() | bytearray() | memoryview():
            return value.hex()
        case date() | datetime():
            return value.isoformat()
        case Mapping():
            return {str(k): plain(v) for k, v in value.items()}
        case set() | frozenset():
            return sorted(map(plain, value), key=str)
        case Iterable():
            return [plain(v) for v in value]
        case _:
            return str(value)


def text(value: object) -> str:
    """Return ``value`` as text on one line."""
    match plain(value):
        case None:
            return "-"
        case bool() as truth:
            return "yes" if truth else "no"
        case str() as string:
            return string
        case dict() | list() as tree:
            return as_json(tree)
        case other:
            return str(other)


def dtype_text(counts: Mapping[str, int]) -> str:
    """Format the number of elements by dtype as ``BF16 1.2B, F32 2K``."""
    return ", ".join(f"{dtype} {human_count(count)}" for dtype, count in counts.items())


def printable(string: str) -> str:
    """Return ``string`` with line breaks, terminal controls and other unprintable characters escaped."""
    return escaped(string)


def display_width(string: str) -> int:
    """Return the number of terminal cells that ``string`` takes."""
    return len(string) if string.isascii() else sum(map(_cells, string))


def shorten(string: str, width: int) -> str:
    """Shorten ``string`` to at most ``width`` cells, with ``…`` at its end if something was cut."""
    if display_width(string) <= width:
        return string

    kept, used = "", 0
    for char in string:
        used += _cells(char)
        if used > width - 1:
            break
        kept += char

    return kept + "…" if width > 0 else ""


def terminal_width() -> int | None:
    """Return the width of the terminal; ``None`` if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if _is_terminal() else None


def fit_widths(widths: Sequence[int], total: int, keep: Sequence[bool]) -> list[int]:
    """Shorten the widest columns until their sum is ``total``; shorten those to ``keep`` only after all others."""
    fitted = [min(width, max(total, _LEAST)) for width in widths]
    others = [i for i, kept in enumerate(keep) if not kept]
    for givers, least in ((others, _LEAST), (range(len(fitted)), _LEAST), (range(len(fitted)), 1)):
        while sum(fitted) > total and (wide := [i for i in givers if fitted[i] > least]):
            fitted[max(wide, key=fitted.__getitem__)] -= 1

    return fitted


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _colorful() -> bool:
    return _is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _cells(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Me", "Mn"):
        return 0

    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _columns_of(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[Column]:
    kinds = [{type(row[i]) for row in rows if row[i] is not None} for i in range(len(columns))]

    return [Column(name=n, right=bool(k) and k <= {int, float}) for n, k in zip(columns, kinds, strict=True)]


def _table(columns: Sequence[Column], rows: Sequence[Sequence[object]]) -> str:
    if not columns:
        return ""

    heads = [printable(c.heading or c.name) for c in columns]
    cells = [[printable((c.show or text)(v)) for c, v in zip(columns, row, strict=True)] for row in rows]
    widths = [max(map(display_width, column)) for column in zip(heads, *cells, strict=True)]

    limit = terminal_width()
    if limit is not None:
        most = _columns_that_fit(widths, limit)
        columns, heads, widths, cells = columns[:most], heads[:most], widths[:most], [row[:most] for row in cells]
        keep = [c.keep for c in columns]
        total, first = limit - len(_GAP) * (most - 1), min(widths[0], _FIRST, limit)
        fitted = fit_widths(widths, total, keep)
        widths = fitted if fitted[0] >= first else [first, *fit_widths(widths[1:], total - first, keep[1:])]

    colorful = _colorful()

    def line(row: Sequence[str], styles: Sequence[Mapping[str, Any]]) -> str:
        fields = map(_field_of_table, columns, row, widths, styles)
        return f"{_GAP.join(fields).rstrip()}\n"

    lines = [line(heads, [{"bold": True} if colorful else {}] * len(heads))]
    for values, row in zip(rows, cells, strict=True):
        # There may be fewer columns than values, as some did not fit.
        colors = [c.color(v) if colorful and c.color else None for c, v in zip(columns, values, strict=False)]
        lines.append(line(row, [{"fg": color} if color else {} for color in colors]))

    return "".join(lines)


def _columns_that_fit(widths: Sequence[int], limit: int) -> int:
    """Return how many columns, from the left, fit the terminal with a readable width."""
    used = min(widths[0], _FIRST)
    for count, width in enumerate(widths[1:], start=1):
        used += len(_GAP) + min(width, _LEAST)
        if used > limit:
            return count

    return len(widths)


def _field_of_table(column: Column, cell: str, width: int, style: Mapping[str, Any]) -> str:
    short = shorten(cell, width)
    padding = " " * (width - display_width(short))
    styled = click.style(short, **style) if style else short

    return padding + styled if column.right else styled + padding


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(printable, columns))
    writer.writerows([_field(v) for v in row] for row in rows)

    return buffer.getvalue()


def _field(value: object) -> object:
    match plain(value):
        case None:
            return ""
        case bool() | dict() | list() as tree:
            return as_json(tree)
        case str() as string:
            return printable(string)
        case other:
            return other


def _objects(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterable[str]:
    keys = unique_names(columns)

    return (as_json(dict(zip(keys, row, strict=True))) for row in rows)
