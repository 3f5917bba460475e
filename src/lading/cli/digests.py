"""`lading digests`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.complete import complete_target
from lading.cli.options import GivenPath, no_progress
from lading.cli.output import Column, Form, listing_options, note, printable, write_rows
from lading.cli.selection import Selection, select_models
from lading.system.display import counted

if TYPE_CHECKING:
    from lading.cards.card import AssetCard

_COLUMNS = ("file", "digest", "origin", "model")
_TABLE = (
    Column(name="model"),
    Column(name="file", keep=True),
    Column(name="origin"),
    Column(name="digest"),
)


@command("digests")
@select_models("NAME|PATH|URI", complete=complete_target, here=True)
@click.option(
    "--write", type=GivenPath(dir_okay=False), metavar="FILE", help="Write a document that the field digests takes."
)
@no_progress
@listing_options
def digests(selection: Selection, write: str | None, no_progress: bool, form: Form) -> None:
    """Show or publish the digests of checkpoints.

    Shows the digest of the tensors of each file, as lading verify compares it, and where it comes from: published by
    the card, or recorded. Unknown digests are taken from the files on this machine. With --write, writes the digests of
    one model to FILE, by which other machines verify every slice that they read. NAME may be a pattern with * and ? as
    in a shell.

    For example: lading digests qwen3_0.6b --write digests.json
    """
    from lading.catalog.store import get_asset_store
    from lading.checkpoints.names import find_card
    from lading.operations.digests import read_digests, write_digests

    store = get_asset_store()
    rows: list[tuple[object, ...]] = []
    targets = selection.resolve(lambda name: find_card(name, store, ask=False), store)
    if write is not None and selection.several:
        raise click.UsageError("--write takes the digests of one model: give one NAME, and write one FILE for each.")

    def show(name: str, target: AssetCard | Path) -> None:
        shown = not no_progress
        if write is None:
            report = read_digests(target, progress=shown, store=store)
        else:
            report = write_digests(target, write, progress=shown, store=store)
            note(f"wrote the digests of {counted(len(report.tensors), 'tensor')} of {printable(name)} to {write}")
        origin = report.published or "recorded"
        rows.extend((file, digest, origin, report.name) for file, digest in report.files.items())

    selection.each(targets, show)

    if write is None:
        write_rows(_COLUMNS, rows, form, table=_TABLE)
    selection.finish()
