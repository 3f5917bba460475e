"""`lading list`."""

from __future__ import annotations

import sys

import click

from lading.cli.command import command
from lading.cli.complete import complete_family, complete_model
from lading.cli.names import has_wildcard, require_family, unknown_model
from lading.cli.output import Column, Form, listing_options, note, write_rows
from lading.system.display import human_bytes

STATUSES = {"ready": "green", "remote": None, "gated": "yellow", "unknown-family": "yellow", "broken": "red"}
"""The statuses of models, and the color of each."""

_TABLE = (
    Column(name="name", keep=True),
    Column(name="family"),
    Column(name="arch"),
    Column(name="status", color=STATUSES.get),
    Column(name="bytes", heading="size", show=human_bytes, right=True),
    Column(name="license"),
)


@command("list")
@click.argument("pattern", required=False, shell_complete=complete_model)
@click.option("--all", "include_all", is_flag=True, help="Also list cards that are not models, but bases of others.")
@click.option("--family", metavar="FAMILY", shell_complete=complete_family, help="Only models of this family.")
@click.option(
    "--status", type=click.Choice(list(STATUSES)), metavar="STATUS", help=f"Only models that are {', '.join(STATUSES)}."
)
@click.option("--search", metavar="WORDS", help="Only models with all these words in their names or fields.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N models.")
@listing_options
def list_models(
    pattern: str | None,
    include_all: bool,
    family: str | None,
    status: str | None,
    search: str | None,
    limit: int | None,
    form: Form,
) -> None:
    """List the models of the catalog.

    PATTERN is a name with * and ? as in a shell.

    For example: lading list 'qwen*' --status ready
    """
    from dataclasses import fields

    from lading.catalog.store import ModelSummary, get_asset_store

    store = get_asset_store()
    limit = None if limit is None else min(limit, sys.maxsize)
    models = store.models(pattern, include_all=include_all, family=family, status=status, search=search, limit=limit)

    if not models:
        if family is not None:
            require_family(family, store)
        if pattern is not None and not has_wildcard(pattern) and not store.models(pattern, include_all=True):
            raise unknown_model(pattern, store)
        note("no model matches." + ("" if include_all else " `--all` lists all cards."))
        if form is Form.TABLE:
            return

    columns = [f.name for f in fields(ModelSummary)]
    write_rows(columns, [[getattr(m, c) for c in columns] for m in models], form, table=_TABLE)
