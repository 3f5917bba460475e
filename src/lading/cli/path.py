"""`lading path`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.complete import complete_target
from lading.cli.output import Form, listing_options, write_rows
from lading.cli.selection import Selection, select_models

if TYPE_CHECKING:
    from lading.cards.card import AssetCard


@command("path")
@select_models("NAME|PATH|URI", complete=complete_target, here=True)
@listing_options
def path(selection: Selection, form: Form) -> None:
    """Print the local paths of checkpoints.

    NAME may be a pattern with * and ? as in a shell. The path is a folder or a file. If the files of the checkpoint are
    not in one folder under their own names, prints the path of each file on a line.

    For example: ls "$(lading path qwen3_0.6b)"
    """
    from lading.catalog.store import get_asset_store
    from lading.checkpoints.locate import local_paths

    store = get_asset_store()
    rows: list[tuple[Path, str]] = []

    def find(name: str, card: AssetCard | Path) -> None:
        # The caller of a script may be elsewhere. Links stay: the names in a cache are those of its links.
        rows.extend((Path(os.path.abspath(found)), name) for found in local_paths(card, store))  # noqa: PTH100

    selection.each_model(find, store, ask=False)

    if form in (Form.TABLE, Form.NAMES):
        for found, _ in rows:
            # A path may not be valid text, so it is printed as bytes.
            click.echo(os.fsencode(found))
    else:
        write_rows(("path", "model"), rows, form)
    selection.finish()
