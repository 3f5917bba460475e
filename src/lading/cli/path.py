"""`lading path`."""

from __future__ import annotations

import os

import click

from lading.cli.command import command
from lading.cli.complete import complete_model


@command("path")
@click.argument("name", shell_complete=complete_model)
def path(name: str) -> None:
    """Print the local path of a model's checkpoint.

    The path is a folder or a file. If the files of the checkpoint are not in one folder under their own names, prints
    the path of each file on a line.

    For example: ls "$(lading path qwen3_0.6b)"
    """
    from lading.catalog.store import get_asset_store
    from lading.checkpoints.locate import local_paths

    store = get_asset_store()
    for found in local_paths(store.retrieve_card(name), store):
        # A path may not be valid text, so it is printed as bytes.
        click.echo(os.fsencode(found))
