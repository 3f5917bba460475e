"""`lading pull`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.options import dry_run, no_progress
from lading.cli.output import Column, Form, listing_options, write_rows
from lading.cli.selection import Selection, select_models
from lading.system.display import human_bytes

if TYPE_CHECKING:
    from lading.cards.card import AssetCard

_COLUMNS = ("name", "bytes", "fetched", "path", "model", "revision")
_TABLE = (
    Column(name="model"),
    Column(name="name", heading="file", keep=True),
    Column(name="bytes", heading="size", show=human_bytes, right=True),
    Column(name="fetched", show=lambda fetched: "fetched" if fetched else "here"),
    Column(name="path"),
)
_DRY_TABLE = (*_TABLE[:3], Column(name="fetched", show=lambda fetched: "to fetch" if fetched else "here"))


@command("pull")
@select_models("NAME|URI")
@click.option("--revision", metavar="R", help="A branch, a tag or a commit; default: the card's, or the latest.")
@click.option(
    "--include",
    metavar="PATTERN",
    multiple=True,
    help="More files, such as 'tokenizer*'; for a web server, plain names.",
)
@dry_run
@no_progress
@listing_options
def pull(
    selection: Selection,
    revision: str | None,
    include: tuple[str, ...],
    dry_run: bool,
    no_progress: bool,
    form: Form,
) -> None:
    """Fetch the latest published checkpoints of models.

    Before a fetch, checks by the headers that the checkpoint fits its architecture; after it, checks all bytes by their
    digests. Loads use the fetched revision until the next pull. NAME may be a pattern with * and ? as in a shell.

    For example: lading pull qwen3_0.6b --include 'tokenizer*'
    """
    from lading.catalog.store import get_asset_store
    from lading.operations.pull import pull_model

    store = get_asset_store()
    rows: list[tuple[object, ...]] = []

    def pull_one(name: str, card: AssetCard | Path) -> None:
        report = pull_model(
            card, revision=revision, include=include, dry_run=dry_run, progress=not no_progress, store=store
        )
        rows.extend((f.name, f.size, f.fetched, f.path, report.name, report.revision) for f in report.files)

    selection.each_model(pull_one, store)

    write_rows(_COLUMNS, rows, form, table=_DRY_TABLE if dry_run else _TABLE)
    selection.finish()
