"""`lading list`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from lading.cli.command import command
from lading.cli.complete import complete_family, complete_model
from lading.cli.families import require_family
from lading.cli.options import Size
from lading.cli.output import Column, Form, listing_options, note, write_rows
from lading.cli.selection import has_wildcard
from lading.errors import did_you_mean
from lading.formats.manifest import BITS, FLOAT_NAMES
from lading.system.display import human_bytes, human_count

STATUSES = {
    "ready": "green", "remote": None, "gated": "yellow", "unknown-family": "yellow", "broken": "red",
    "unregistered": None, "unloadable": "yellow",
}  # fmt: skip
"""The statuses of models, and of files without a card, and the color of each."""


def _size(size: int | str) -> str:
    return size if isinstance(size, str) else human_bytes(size)


_TABLE = (
    Column(name="name", keep=True),
    Column(name="family"),
    Column(name="arch"),
    Column(name="status", color=STATUSES.get),
    Column(name="parameters", show=human_count, right=True),
    Column(name="bytes", heading="size", show=_size, right=True),
    Column(name="license"),
)
_OTHERS = (Column(name="shards", right=True), Column(name="kind"))
"""The columns that the table shows on request, and not as plain text."""


@command("list")
@click.argument("pattern", required=False, shell_complete=complete_model)
@click.option(
    "--all",
    "include_all",
    is_flag=True,
    help="Also list cards that are not models, and all on this machine without a card.",
)
@click.option("--family", metavar="FAMILY", shell_complete=complete_family, help="Only models of this family.")
@click.option(
    "--status", type=click.Choice(list(STATUSES)), metavar="STATUS", help=f"Only models that are {', '.join(STATUSES)}."
)
@click.option("--local", is_flag=True, help="Only models with files on this machine.")
@click.option(
    "--dtype",
    type=click.Choice(tuple(dict.fromkeys((*FLOAT_NAMES, *map(str.lower, BITS)))), case_sensitive=False),
    metavar="DTYPE",
    help="Only models that are mostly of this dtype, such as bf16.",
)
@click.option("--min-size", type=Size(), metavar="SIZE", help="Only models of at least this size, such as 10GB.")
@click.option("--max-size", type=Size(), metavar="SIZE", help="Only models of at most this size.")
@click.option("--search", metavar="WORDS", help="Only models with all these words in their names or fields.")
@click.option(
    "--sort",
    type=click.Choice(("name", "size", "modified")),
    default="name",
    help="By name; the largest first; or the one first whose files on this machine changed last.",
)
@click.option(
    "--columns", metavar="COLUMNS", help="The columns to show, in this order, such as name,size,dtypes,local_path."
)
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N models.")
@listing_options
def list_models(
    pattern: str | None,
    include_all: bool,
    family: str | None,
    columns: str | None,
    limit: int | None,
    min_size: int | None,
    max_size: int | None,
    form: Form,
    **conditions: Any,
) -> None:
    """List the models of the catalog.

    PATTERN is a name with * and ? as in a shell.

    For example: lading list 'qwen*' --local --max-size 10GB --sort size
    """
    from dataclasses import fields

    from lading.catalog.listing import WITHOUT_CARD
    from lading.catalog.store import ModelSummary, get_asset_store

    known = [f.name for f in fields(ModelSummary)]
    chosen = known if columns is None else _chosen(columns, known)
    store = get_asset_store()
    limit = None if limit is None else min(limit, sys.maxsize)
    models = store.models(
        pattern,
        include_all=include_all,
        unregistered=include_all or conditions["status"] in WITHOUT_CARD,
        family=family,
        min_bytes=min_size,
        max_bytes=max_size,
        limit=limit,
        **conditions,
    )

    if not models:
        if family is not None:
            require_family(family, store)
        if (
            pattern is not None
            and not has_wildcard(pattern)
            and not store.models(pattern, include_all=True, unregistered=True)
        ):
            from lading.checkpoints.names import unknown_model

            raise unknown_model(pattern, store)
        unknown = " Dtypes are known of models that were indexed or loaded." if conditions["dtype"] else ""
        note("no model matches." + unknown + ("" if include_all else " `--all` lists all cards."))

    if columns is not None:
        table: Sequence[Column] = [_column(name) for name in chosen]
    else:
        table = (*_TABLE, _column("kind")) if any(model.kind for model in models) else _TABLE
    rows = [[getattr(m, c) for c in chosen] for m in models]
    if form is Form.TABLE and "bytes" in chosen:
        at = chosen.index("bytes")
        for model, row in zip(models, rows, strict=True):
            if model.bytes is None and model.parameters is not None:
                row[at] = f"~{human_bytes(2 * model.parameters)}"
    write_rows(chosen, rows, form, table=table)


def _chosen(columns: str, known: Sequence[str]) -> list[str]:
    """Return the names of the columns that a list of names or headings chooses, each once.

    :raises click.BadParameter: a name is not known.
    """
    names = {name: name for name in known} | {c.heading: c.name for c in _TABLE if c.heading is not None}
    chosen: dict[str, None] = {}
    for word in columns.split(","):
        name = names.get(word.strip())
        if name is None:
            raise click.BadParameter(
                f"{word.strip()!r} is not a column.{did_you_mean(word, names)} The columns are {', '.join(names)}",
                click.get_current_context(),
                param_hint="--columns",
            )
        chosen[name] = None

    return list(chosen)


def _column(name: str) -> Column:
    return next((c for c in (*_TABLE, *_OTHERS) if c.name == name), Column(name=name, heading=name.replace("_", " ")))
