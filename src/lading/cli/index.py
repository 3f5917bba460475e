"""`lading index`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lading.cli.command import command
from lading.cli.complete import complete_target
from lading.cli.options import no_restrict
from lading.cli.output import Column, Form, dtype_text, listing_options, write_objects, write_pairs
from lading.cli.selection import Selection, select_models
from lading.system.display import counted, human_bytes, human_count
from lading.system.uris import shown_uri

if TYPE_CHECKING:
    from lading.cards.card import AssetCard
    from lading.catalog.store import StoredCheckpoint

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
    the checkpoint at hg://org/name, https://... or s3://... Use it also to accept files that were changed on purpose.
    NAME may be a pattern with * and ? as in a shell.

    For example: lading index hg://Qwen/Qwen3-0.6B
    """
    from lading.catalog.store import get_asset_store
    from lading.checkpoints.locate import index_checkpoint

    store = get_asset_store()
    objects: list[dict[str, object]] = []

    def index_one(name: str, target: AssetCard | Path) -> None:
        stored = index_checkpoint(target, restrict=not no_restrict, store=store)
        objects.append(checkpoint_object(stored))
        if form is Form.TABLE and not selection.several:
            write_pairs({"checkpoint": shown_uri(stored.uri), **checkpoint_pairs(stored)})

    selection.each_model(index_one, store)

    if form is not Form.TABLE or selection.several:
        write_objects(objects, form, table=_TABLE, single=not selection.several)
    selection.finish()


def checkpoint_object(stored: StoredCheckpoint) -> dict[str, object]:
    """Return the description of a checkpoint for JSON."""
    manifest = stored.manifest

    return {
        "uri": shown_uri(stored.uri),
        "revision": stored.revision or None,
        "format": manifest.format,
        "tensors": len(manifest),
        "parameters": manifest.parameters,
        "bytes": manifest.total_bytes,
        "dtypes": manifest.dtype_counts,
        "shards": [{"name": shard.name, "bytes": shard.size, "sha256": shard.sha256} for shard in manifest.shards],
        "indexed_at": stored.indexed_at or None,
    }


def checkpoint_pairs(stored: StoredCheckpoint) -> dict[str, object]:
    """Return the description of a checkpoint for :func:`lading.cli.output.write_pairs`."""
    manifest = stored.manifest

    return {
        **({"revision": stored.revision} if stored.revision else {}),
        "format": manifest.format,
        "size": human_bytes(manifest.total_bytes),
        "parameters": human_count(manifest.parameters),
        "dtypes": dtype_text(manifest.dtype_counts),
        "tensors": f"{len(manifest)} in {counted(len(manifest.shards), 'shard')}",
    }
