"""`lading index`."""

from __future__ import annotations

import click

from lading.cli.command import command, no_restrict, one_object
from lading.cli.complete import complete_target
from lading.cli.describe import checkpoint_object, checkpoint_pairs
from lading.cli.names import name_or_path
from lading.cli.output import write_json, write_pairs
from lading.system.uris import shown_uri


@command("index")
@click.argument("target", metavar="NAME|PATH|URI", shell_complete=complete_target)
@no_restrict
@one_object
def index(target: str, no_restrict: bool, as_json: bool) -> None:
    """Index a local or remote checkpoint in the catalog.

    Records its tensors, and reads only the headers of its files: those of the card NAME, of the file or folder at PATH,
    or of the checkpoint at hg://org/name or https://... Use it also to accept files that were changed on purpose.

    For example: lading index hg://Qwen/Qwen3-0.6B
    """
    from lading.catalog.store import get_asset_store
    from lading.checkpoints.locate import index_checkpoint

    store = get_asset_store()
    found = target if "://" in target else name_or_path(target, store)
    stored = index_checkpoint(found, restrict=not no_restrict, store=store)

    if as_json:
        write_json(checkpoint_object(stored))
    else:
        write_pairs({"checkpoint": shown_uri(stored.uri), **checkpoint_pairs(stored)})
