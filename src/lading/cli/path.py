"""`lading path`."""

from __future__ import annotations

import os

import click

from lading.cli.command import command
from lading.cli.complete import complete_model


@command("path")
@click.argument("name", shell_complete=complete_model)
def path(name: str) -> None:
    """Print where a model's checkpoint is on this machine.

    It is a folder or a file; where the files of a checkpoint are not in one folder under their own names, each has a
    line.

    For example: ls "$(lading path qwen3_0.6b)"
    """
    from lading.catalog.store import get_asset_store
    from lading.checkpoints.locate import local_paths

    store = get_asset_store()
    for found in local_paths(store.retrieve_card(name), store):
        # As bytes: a path need not be text.
        click.echo(os.fsencode(found))
