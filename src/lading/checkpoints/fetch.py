"""The download of a checkpoint's files, with a check of every byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lading.cards.card import CheckpointRef
from lading.catalog.records import LocalCopy
from lading.catalog.store import AssetStore
from lading.checkpoints.address import source_of
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.fetch_to_index import fetch_and_index, was_fetched_to_index
from lading.checkpoints.published import recorded_files
from lading.checkpoints.recording import fetched_check, known_content, record_fetched
from lading.checkpoints.verification import record_rewritten
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, InternalError
from lading.formats.safetensors import index_file
from lading.sources.source import Snapshot
from lading.system.filesystem import FileStat
from lading.system.settings import Settings
from lading.system.uris import shown_uri
from lading.transfer.files import ShardFile

if TYPE_CHECKING:
    from lading.gangs import Gang


def fetch_checkpoint(
    checkpoint: Checkpoint, store: AssetStore | None, *, settings: Settings, progress: bool
) -> Checkpoint:
    """Return the checkpoint with its files, after fetching missing ones.

    :param store: the store that finds known content, and records the files.

    :raises FetchError: the source cannot be reached, answers nonsense, or publishes something else by now.
    :raises DigestMismatchError: the bytes are not those that were published or recorded.
    :raises OSError: the disk is full, or the cache cannot be written.
    """
    if checkpoint.files is not None:
        return checkpoint
    ref = checkpoint.ref
    if ref is None:
        raise InternalError(f"the checkpoint {shown_uri(checkpoint.uri)} has no source to fetch it from")

    if was_fetched_to_index(checkpoint.manifest):
        return _fetch_to_index_again(checkpoint, ref, store, settings=settings, progress=progress)

    source = source_of(ref, revision=checkpoint.revision, settings=settings)
    shards = checkpoint.manifest.shards
    files = recorded_files(shards, inner=source.inner)
    snapshot = Snapshot(uri=checkpoint.uri, revision=checkpoint.revision, files=files)

    fetched = source.fetch(snapshot, files, known=known_content(store), progress=progress)
    copies, checks = [], []
    for i, (file, shard) in enumerate(zip(fetched, shards, strict=True)):
        if not file.published and not index_file(file.path).tensors_equal(checkpoint.manifest.only(i)):
            raise replaced_error(file.name, path=file.path)
        copies.append(LocalCopy(file=shard.name, path=file.path, stat=file.stat, kind=source.kind))
        checks.append(fetched_check(file, shard.name, shard.sha256))
    record_fetched(checkpoint, copies, checks, store)

    paths = tuple(ShardFile(path=file.path, stat=file.stat, sha256=file.sha256) for file in fetched)

    return replace(checkpoint, files=paths, trusted=checkpoint.published is None)


def _fetch_to_index_again(
    checkpoint: Checkpoint, ref: CheckpointRef, store: AssetStore | None, *, settings: Settings, progress: bool
) -> Checkpoint:
    fetched = fetch_and_index(
        ref, store=store, settings=settings, progress=progress, revision=checkpoint.revision or None
    )
    if not fetched.manifest.tensors_equal(checkpoint.manifest):
        raise replaced_error(checkpoint.where)
    record_fetched(checkpoint, fetched.copies, fetched.checks, store)
    checkpoint = replace(checkpoint, files=fetched.files, trusted=checkpoint.published is None)
    if fetched.rewritten and store is not None:
        record_rewritten(checkpoint, store)

    return checkpoint


def share(checkpoint: Checkpoint, root: Gang, find: Callable[[Checkpoint], Checkpoint]) -> Checkpoint:
    """Return the checkpoint with its files, on every rank: one rank of each host finds or fetches them.

    :param find: returns the checkpoint with its files.

    Raises what ``find`` does, on the rank that calls it.
    """
    if root.channel is None:  # alone, or simulated
        return find(checkpoint)

    found: Checkpoint | None = None
    if root.local_rank == 0:
        same_host = root.hosts[root.rank] == root.hosts[0]
        with root.at_work():
            found = find(checkpoint if same_host else _on_this_host(checkpoint))

    answers = root.gather_objects(None if found is None else (found.files, found.trusted))
    mine = answers[root.local_ranks[0]]

    return replace(
        checkpoint,
        files=None if mine is None else mine[0],
        trusted=all(answer[1] for answer in answers if answer is not None),
    )


def _on_this_host(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint for a host without the catalog: with the same paths, or without files, to fetch them."""
    if checkpoint.ref is not None or checkpoint.files is None:
        return replace(checkpoint, files=None, trusted=False)

    files = []
    for file, shard in zip(checkpoint.files, checkpoint.manifest.shards, strict=True):
        try:
            stat = FileStat.from_stat(os.stat(file.path))
        except FileNotFoundError:
            raise CheckpointNotFoundError(
                file.path,
                f"{file.path}, a file of {checkpoint.name}, is not on the host {os.uname().nodename}. Put it there, or "
                "on a file system that all hosts share.",
            ) from None
        if stat.size != shard.size:
            raise CorruptModelCheckpointError(
                file.path,
                f"{file.path} on the host {os.uname().nodename} has {stat.size} bytes, but {shard.size} on that of "
                "rank 0. Copy it there again.",
            )
        files.append(ShardFile(path=file.path, stat=stat))

    return replace(checkpoint, files=tuple(files), trusted=False)


def replaced_error(name: str, *, path: Path | None = None) -> CorruptModelCheckpointError:
    return CorruptModelCheckpointError(
        path or name,
        f"{name} as it was fetched holds other tensors than it did when it was indexed: it was replaced at its source. "
        "Index it again with `lading index`.",
    )
