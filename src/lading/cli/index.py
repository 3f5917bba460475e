"""`lading index`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lading.cli.command import command, no_restrict
from lading.cli.complete import complete_target
from lading.cli.describe import checkpoint_object, checkpoint_pairs, dtype_text
from lading.cli.output import Column, Form, listing_options, write_objects, write_pairs
from lading.cli.selection import Selection, select_models
from lading.system.display import human_bytes, human_count
from lading.system.uris import shown_uri

if TYPE_CHECKING:
    from lading.cards.card import AssetCard

_TABLE = (
    Column(name="uri", heading="checkpoint", keep=True),
    Column(name="format"),
    Column(name="bytes", heading="size", show=human_bytes, right=True),
    Column(name="parameters", show=human_count, right=True),
    Column(name="dtypes", show=dtype_text),
    Column(name="tensors", right=True),
)


@command("index")
@select_models("NAME|PATH|URI", complete=complete_target)
@no_restrict
@listing_options
def index(selection: Selection, no_restrict: bool, form: Form) -> None:
    """Index local or remote checkpoints in the catalog.

    Records tensors, and reads only the headers of files: those of the card NAME, of the file or folder at PATH, or of
    the checkpoint at hg://org/name or https://... Use it also to accept files that were changed on purpose. NAME may be
    a pattern with * and ? as in a shell.

    For example: lading index hg://Qwen/Qwen3-0.6B
    """
    from lading.catalog.store import get_asset_store
    from lading.checkpoints.locate import index_checkpoint
    from lading.checkpoints.names import find_card

    store = get_asset_store()
    objects: list[dict[str, object]] = []

    def index_one(name: str, target: AssetCard | Path) -> None:
        stored = index_checkpoint(target, restrict=not no_restrict, store=store)
        objects.append(checkpoint_object(stored))
        if form is Form.TABLE and not selection.several:
            write_pairs({"checkpoint": shown_uri(stored.uri), **checkpoint_pairs(stored)})

    selection.each(selection.resolve(lambda name: find_card(name, store), store), index_one)

    if form is not Form.TABLE or selection.several:
        write_objects(objects, form, table=_TABLE, single=not selection.several)
    selection.finish()
