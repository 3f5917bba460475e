"""The relocation of checkpoints in the catalog, after their files were moved."""

from __future__ import annotations

import logging
from pathlib import Path

from lading.catalog.checkpoints.holdings import known_uris
from lading.catalog.edit_cards import relocate_cards
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import CardChange, CheckpointContents
from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import LocalCheckpointFiles
from lading.errors import CheckpointNotFoundError, ModelCheckpointMismatchError
from lading.formats.folder import is_there
from lading.operations.moved import may_have_changed
from lading.system.filesystem import expand_home
from lading.system.uris import path_uri, uri_path

log = logging.getLogger("lading")


def relocate_checkpoints(
    old: str | Path, new: str | Path, *, dry_run: bool = False, store: CardStore | None = None
) -> tuple[CardChange, ...]:
    """Have all cards that name a path, or one below it, name another one, to which you have moved the files.

    The catalog keeps the digests of the checkpoints, so that their next load verifies them. Of a checkpoint without
    digests, whose files have other times of modification now, this logs what was compared.

    :param old: the path of a checkpoint, or of a folder with checkpoints in it; nothing need be there any more.
    :param new: the path that takes its place.
    :param dry_run: whether to change nothing, and only return the changes.

    :raises CheckpointNotFoundError: the catalog knows nothing at ``old``, nothing is at ``new``, or a checkpoint is not
        there (also a ``FileNotFoundError``).
    :raises ModelCheckpointMismatchError: at the new place are other tensors, or another checkpoint that the catalog
        knows, while the one at ``old`` is still there; nothing was changed.
    :raises PolicyError: a watched file or a package states one of the cards; nothing was changed.
    :raises CatalogError: the catalog cannot be written.
    """
    store = open_store(store)
    if not dry_run:
        store.database.require_writable()
    after = expand_home(new).resolve()
    # A link that the move has left at the old place does not count.
    before = expand_home(old).absolute()
    before = before.parent.resolve() / before.name
    if before == after:
        return ()
    if not is_there(after):
        raise CheckpointNotFoundError(after, f"Nothing is at {after}. Move the files first; lading moves none.")
    contents = [
        _moved(uri, after / path.relative_to(before), store)
        for uri in sorted(known_uris(store.database))
        if (path := uri_path(uri)) is not None and path.is_relative_to(before)
        # What is gone from both places is not there to be moved.
        if is_there(path) or is_there(after / path.relative_to(before))
    ]

    changes = tuple(relocate_cards(store.database, before, after, contents, dry_run=dry_run))
    if not changes and not contents:
        raise CheckpointNotFoundError(
            before,
            f"The catalog knows no checkpoint at {before}, nor below it. `lading list --all --local --columns "
            "name,local_path` shows those that it knows.",
        )

    return changes


def _moved(uri: str, path: Path, store: AssetStore) -> CheckpointContents:
    """Return the contents of a checkpoint at its new place.

    :raises CheckpointNotFoundError: nothing is there.
    :raises ModelCheckpointMismatchError: it has other tensors there, or is another checkpoint.
    """
    found = LocalCheckpointFiles.read(path, cache=store.settings.cache_dir)
    stored = store.checkpoint(uri)
    if stored is not None and not stored.manifest.tensors_equal(found.manifest):
        raise ModelCheckpointMismatchError(
            path,
            f"{path} is expected to hold the tensors of {uri_path(uri)}, but has others. Nothing was changed; add it "
            f"as a checkpoint of its own: `lading add {path}`.",
        )

    if stored is not None and may_have_changed(stored, found, store):
        compared = "the names, dtypes and shapes of the tensors"
        before = uri_path(uri)
        if before is not None and is_there(before) and store.checkpoint(path_uri(path)) is not None:
            raise ModelCheckpointMismatchError(
                path,
                f"{path} is expected to be the checkpoint that was at {before}. It has {compared} of that one, but "
                "both are still there, the catalog knows both, and it has no digests to compare. Nothing was changed. "
                f"Remove the files at {before}, or run `lading remove-card` for the card of one of them.",
            )
        log.warning(
            "%s: compared only %s with those of %s; the catalog has no digests of its bytes, and the times of its "
            "files have changed",
            path, compared, before,
        )  # fmt: skip

    return found.contents(moved_from=uri)
