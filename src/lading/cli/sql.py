"""`lading sql`."""

from __future__ import annotations

import math
import re
import sys

import click

from lading.cli.command import command
from lading.cli.output import Form, listing_options, note, write_rows

_MOST_BYTES = 1_000_000
"""The longest query on stdin, which may be a device without an end."""

# Numbers of more digits than any database can count with stay text.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?")


@command("sql")
@click.argument("query", required=False)
@click.option(
    "-p",
    "--param",
    "parameters",
    type=(str, str),
    multiple=True,
    metavar="NAME VALUE",
    help="The value of :NAME in the query; digits are a number.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop the query after this time.",
)
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N rows.")
@click.option("--schema", is_flag=True, help="Show the views and their columns.")
@listing_options
def sql(
    query: str | None,
    parameters: tuple[tuple[str, str], ...],
    deadline: float,
    limit: int | None,
    schema: bool,
    form: Form,
) -> None:
    """Ask the catalog in SQL, read-only. QUERY of - is read from stdin.

    For example: lading sql "select name, bytes from models where family = :f" -p f qwen
    """
    from lading.catalog.query import run_query, view_columns
    from lading.catalog.store import get_asset_store

    if not math.isfinite(deadline):
        raise click.BadParameter("a number of seconds is expected.", param_hint="--deadline")

    if schema:
        if query is not None:
            raise click.UsageError("--schema takes no QUERY.", click.get_current_context())
        write_rows(("view", "column"), view_columns(get_asset_store().database), form)
        return

    result = run_query(
        get_asset_store().database,
        _statement(query),
        {name.lstrip(":"): _value(value) for name, value in parameters},
        deadline_s=deadline,
        limit=limit,
    )
    write_rows(result.columns, result.rows, form)

    if result.truncated:
        note(f"there are more rows than these {len(result.rows)}; `--limit` asks for more.")


def _statement(query: str | None) -> str:
    if query is None and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("Missing argument 'QUERY'.", click.get_current_context())
    if query == "-" and sys.stdin is None:
        raise click.UsageError("Nothing can be read, as stdin is closed.", click.get_current_context())
    if query is None or query == "-":
        data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise click.UsageError(
                f"The query on stdin is longer than {_MOST_BYTES:,} bytes.", click.get_current_context()
            )
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"The query on stdin is not UTF-8: {error}", click.get_current_context()) from None

    return query


def _value(value: str) -> str | int | float:
    number = _NUMBER.fullmatch(value)
    if number is None:
        return value

    return float(value) if number[2] else int(value)
