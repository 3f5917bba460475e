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

    For example: ls "$(lading path qwen3_0.6b)"
    """
    from lading.card import checkpoint_ref, split_name, uri_path
    from lading.catalog.store import get_asset_store
    from lading.errors import CheckpointNotFoundError, ModelGatedError
    from lading.fetch import fetch

    card = get_asset_store().retrieve_card(name)
    ref = checkpoint_ref(card)
    if ref.gated:
        raise ModelGatedError(card.name, ref.info_url)
    if uri_path(ref.uri) is None:
        raise CheckpointNotFoundError(
            ref.uri,
            f"The checkpoint of {name!r} is at {ref.uri}, not on this machine. Download it, and import a card "
            f"`name: {split_name(name)[0]}@user` with `checkpoint: /path/to/it`.",
        )

    # As bytes: a path need not be text.
    click.echo(os.fsencode(fetch(ref.uri, inner_path=ref.path)))
