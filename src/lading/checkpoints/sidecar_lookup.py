"""The sidecar of a checkpoint: whether the catalog knows one, whether it is still true, whether all hosts have it."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.sidecar import IDENTITY, Sidecar, identity_of, matrices_of, sidecar_uri
from lading.errors import CatalogError
from lading.gangs import Gang, Gangs
from lading.system.filesystem import FileStat
from lading.transfer.files import ShardFile

log = logging.getLogger("lading")


def with_known_sidecar(checkpoint: Checkpoint, store: AssetStore, gangs: Gangs) -> Checkpoint:
    """The checkpoint at a path with its sidecar for these gangs, if the catalog knows both.

    The first rank alone asks the catalog; where there are columns to be split, all ranks have to call this.
    """
    if gangs.tp.size == 1:
        return checkpoint

    def find() -> Sidecar | None:
        return with_sidecar(_as_verified(checkpoint, store), store, gangs.tp.size).sidecar

    return agree_on_sidecar(replace(checkpoint, sidecar=gangs.root.first(find)), gangs.root)


def _as_verified(checkpoint: Checkpoint, store: AssetStore) -> Checkpoint:
    """The checkpoint at a path, trusted if the catalog saw all its files verified in just this state."""
    try:
        stored = store.checkpoint(checkpoint.uri)
    except (CatalogError, OSError) as error:
        log.warning("the catalog cannot be asked for a sidecar of %s: %s", checkpoint.name, error)
        return checkpoint
    if stored is None or not stored.manifest.tensors_equal(checkpoint.manifest):
        return checkpoint
    verified = {(copy.path, copy.stat) for copy in stored.copies if copy.verified_at is not None}

    return replace(checkpoint, trusted={(file.path.absolute(), file.stat) for file in checkpoint.here()} <= verified)


def with_sidecar(checkpoint: Checkpoint, store: AssetStore, tp: int) -> Checkpoint:
    """The checkpoint with its sidecar for ``tp`` ranks, if the catalog knows one that is true.

    One that is not is left aside, and the log says why: what is wrong with it must neither be loaded nor stop a load.
    """
    if tp == 1:
        return checkpoint
    try:
        found = find_sidecar(checkpoint, store, tp)
    except (CatalogError, OSError) as error:
        found = f"it cannot be read from the catalog: {error}"
    if isinstance(found, str):
        log.warning(
            "the sidecar of %s for tp=%d is left aside, as %s; `lading repack %s --tp %d` makes it anew",
            *(checkpoint.name, tp, found, checkpoint.name, tp),
        )
        return checkpoint

    return checkpoint if found is None else replace(checkpoint, sidecar=found)


def find_sidecar(checkpoint: Checkpoint, store: AssetStore, tp: int) -> Sidecar | str | None:
    """The sidecar of a checkpoint that the catalog knows, if it is true; else what is wrong with it.

    It is true if its file is as it was when its bytes were verified, and if it was made of the bytes that are recorded
    of the checkpoint. So it stands for the checkpoint only where that was seen to have these, in its present state.

    :returns: ``None`` where there is none, or the checkpoint was not verified as it is.

    :raises CatalogError: the catalog cannot be read.
    """
    if not checkpoint.trusted:
        return None
    uri = sidecar_uri(checkpoint.uri, tp)
    stored = store.checkpoint(uri)
    if stored is None or not stored.copies:
        return None

    true = [copy for copy in stored.copies if copy.verified_at is not None and _stat(copy.path) == copy.stat]
    if not true:
        path = stored.copies[0].path
        return f"its file {path} is {'not as it was when it was verified' if path.exists() else 'gone'}"
    tensors = matrices_of(checkpoint.manifest, stored.manifest, tp)
    roots = {} if tensors is None else store.tensor_digests(checkpoint.uri)
    identity = None if tensors is None else identity_of(checkpoint.manifest, tensors, roots)
    if tensors is None or identity is None or identity != stored.manifest.metadata.get(IDENTITY):
        return "it is not known to be of the weights that the checkpoint has now"

    file = ShardFile(path=true[0].path, stat=true[0].stat)

    return Sidecar(uri=uri, tp=tp, manifest=stored.manifest, file=file, tensors=tensors)


def agree_on_sidecar(checkpoint: Checkpoint, root: Gang) -> Checkpoint:
    """The checkpoint with its sidecar if all ranks see the file as it was when it was verified; else none has it."""
    if checkpoint.sidecar is None:
        return checkpoint

    file = checkpoint.sidecar.file
    if all(root.gather_objects(_stat(file.path) == file.stat)):
        return checkpoint
    if root.rank == 0:
        log.warning("the sidecar %s is left aside, as not all ranks see it as it was when it was verified", file.path)

    return replace(checkpoint, sidecar=None)


def _stat(path: Path) -> FileStat | None:
    try:
        return FileStat.from_stat(os.stat(path))
    except OSError:
        return None
