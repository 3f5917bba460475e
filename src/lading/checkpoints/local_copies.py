"""The local copies of a checkpoint: those that are intact, and those that were verified as they are."""

from __future__ import annotations

import os
from collections.abc import Iterable

from lading.catalog.records import LocalCopy, StoredCheckpoint
from lading.catalog.store import AssetStore
from lading.system.filesystem import FileStat
from lading.transfer.files import ShardFile


def copies_as_known(stored: StoredCheckpoint) -> tuple[ShardFile, ...] | None:
    """Return the files of all shards, if each is on this machine and as it was when it was recorded."""
    copies = intact_copies(stored)
    if copies is None:
        return None

    return tuple(
        ShardFile(path=copy.path, stat=copy.stat, sha256=shard.sha256)
        for shard, copy in zip(stored.manifest.shards, copies, strict=True)
    )


def all_verified(stored: StoredCheckpoint) -> bool:
    """Return whether every shard was verified in the state that the catalog has of it on this machine."""
    verified = {copy.file for copy in stored.copies if copy.verified_at is not None}

    return all(shard.name in verified for shard in stored.manifest.shards)


def was_verified(stored: StoredCheckpoint, store: AssetStore) -> bool:
    """Return whether the catalog has digests that state the right bytes."""
    if any(shard.sha256 is not None for shard in stored.manifest.shards):
        return True

    return bool(store.tensor_digests(stored.uri))


def intact_copies(stored: StoredCheckpoint) -> list[LocalCopy] | None:
    """Return the copy of each shard, if each is on this machine and as it was when it was recorded."""
    known = best_copies(stored.copies)
    found = [known.get(shard.name) for shard in stored.manifest.shards]
    intact = [copy for copy in found if copy is not None and _worth(copy) == 2]

    return intact if len(intact) == len(found) else None


def best_copies(copies: Iterable[LocalCopy]) -> dict[str, LocalCopy]:
    """Return for each file the copy that is as it was recorded; else one that is there; else any.

    There may be several, on file systems that come and go.
    """
    return {copy.file: copy for copy in sorted(copies, key=_worth)}


def _worth(copy: LocalCopy) -> int:
    try:
        found = FileStat.from_stat(os.stat(copy.path))
    except OSError:
        return 0

    return 2 if found == copy.stat else 1
