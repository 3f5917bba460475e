"""Checkpoints: the manifest, the files on this machine, and their state."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self

from blake3 import blake3

from lading import formats
from lading.cards.card import CheckpointRef
from lading.catalog.records import (
    HEADER,
    Check,
    CheckpointContents,
    CopyKind,
    DigestDocument,
    LocalCopy,
    SourceCheck,
    StoredCheckpoint,
)
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, InternalError, PolicyError
from lading.formats.digests import Digests
from lading.formats.manifest import Manifest
from lading.system.filesystem import FileStat
from lading.system.uris import path_uri
from lading.transfer.files import File, ShardFile
from lading.transfer.stream import Stream, StreamedFile

_MOST_HEADER = 256 << 20
"""The most bytes outside of tensors to hash; headers of safetensors have at most 100 MB."""

RECENT_NS = 50_000_000
"""The resolution of file systems' times, some milliseconds: a younger file may change without a change of its times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose tensors are known; its files may still be elsewhere."""

    name: str
    """The name of the card, or the path."""
    uri: str
    """The URI by which the catalog knows it."""
    where: str
    """The place for messages: a path, or the address of its source."""
    manifest: Manifest
    files: tuple[ShardFile, ...] | None
    """One for each shard of the manifest, with its state when its header was read; ``None`` before a download."""
    trusted: bool = False
    """``True`` if all files were verified in the state that they are in."""
    pinned: tuple[int, ...] = ()
    """The shards whose SHA-256 the card states, by their positions in the manifest."""
    published: DigestDocument | None = None
    """The document that publishes the digests of the tensors; ``None`` if no card names one."""
    digests: Digests | None = None
    """The digests of that document, if they were read just now; else the catalog has them."""
    ref: CheckpointRef | None = None
    """The source to fetch it from; ``None`` for a local checkpoint."""
    revision: str = ""
    """The commit of the source that has this manifest."""
    hf_config: Mapping[str, object] | None = None
    """The ``config.json`` beside it, if it was read together with the manifest."""
    streamed: tuple[StreamedFile, ...] | None = None
    """The files at their source, one for each shard, if a load reads them there."""

    @property
    def stream(self) -> Stream | None:
        """The source that the files are read from; ``None`` if they are on this machine."""
        return self.streamed[0].stream if self.streamed else None

    def readable(self) -> Sequence[File]:
        """Return the files to read, on this machine or at their source.

        :raises InternalError: they were not fetched.
        """
        return self.here() if self.streamed is None else self.streamed

    def place(self, shard: int) -> Path | str:
        """Return the path of a file, or its name and address if it is read at its source."""
        if self.streamed is None:
            return self.here()[shard].path
        name = self.manifest.shards[shard].name

        return self.where if self.where.endswith(f"/{name}") else f"{self.where}: {name}"

    def here(self) -> tuple[ShardFile, ...]:
        """Return the files on this machine.

        :raises InternalError: they were not fetched.
        """
        if self.files is None:
            raise InternalError(f"the checkpoint {self.where} is to be read, but was not fetched")

        return self.files

    def check(self, shard: int, method: str, *, expected: str | None, found: str | None) -> Check:
        """Return the result of a check of a file, in the state in which it is known.

        :param shard: the position of the file in the manifest.
        """
        file = self.here()[shard]
        name = self.manifest.shards[shard].name

        return Check(file=name, path=file.path, stat=file.stat, method=method, expected=expected, found=found)

    def outcome(self, shard: int, method: str, *, expected: str | None, found: str | None) -> SourceCheck:
        """Return the result of a check of a file, which may be at its source."""
        if self.streamed is None:
            return self.check(shard, method, expected=expected, found=found)

        return SourceCheck(file=self.manifest.shards[shard].name, method=method, expected=expected, found=found)


def remote_checkpoint(name: str, ref: CheckpointRef, manifest: Manifest, revision: str) -> Checkpoint:
    """Return the checkpoint of a card at a source, without files."""
    return Checkpoint(
        name=name, uri=ref.key, where=ref.shown, manifest=manifest, files=None, ref=ref, revision=revision
    )


def path_checkpoint(path: Path, *, cache: Path, restrict: bool = True) -> Checkpoint:
    """Return the checkpoint at a path, without reading or writing the catalog.

    :param cache: lading's cache, for what has to be rewritten to be read.
    :param restrict: as :func:`lading.formats.index` takes it.

    :raises CheckpointNotFoundError: nothing is there (also a ``FileNotFoundError``).
    """
    return LocalCheckpointFiles.read(path, cache=cache, restrict=restrict).checkpoint(str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCheckpointFiles:
    """The checkpoint at a path of this machine, and the state of all files that determine its tensors."""

    path: Path
    manifest: Manifest
    stats: Mapping[str, FileStat]
    """The states of the files, by their names within the folder."""
    kind: CopyKind = "source"
    """Whose the files are: ``cache`` where they were made in the cache."""
    made_of: Path | None = None
    """The original checkpoint, if this one is its rewrite in the cache."""

    @classmethod
    def read(cls, path: Path, *, cache: Path, restrict: bool = True, rewrite: bool = True) -> Self:
        """Read all headers, and check that the files did not change meanwhile.

        If tensors are not ranges of bytes, this returns the rewritten checkpoint in the cache.

        :param cache: lading's cache.
        :param rewrite: whether to rewrite; if not, such tensors raise :class:`lading.formats.NonContiguousError`.
        """
        start = time.time_ns()
        try:
            manifest = formats.index(path, restrict=restrict)
        except formats.NonContiguousError:
            if not rewrite:
                raise
            made = cls.read(formats.readable(path, cache=cache, restrict=restrict), cache=cache, restrict=restrict)
            return replace(made, made_of=path)
        stats = _stat_files(manifest, path)

        if any(stat.ctime_ns > start - RECENT_NS for stat in stats.values()):
            again = formats.index(path, restrict=restrict)
            if again != manifest or _stat_files(again, path) != stats:
                raise CorruptModelCheckpointError(
                    path, f"{path} changed while its headers were read. Try again when nothing writes to it any more."
                )

        kind: CopyKind = "cache" if formats.is_rewritten(path, cache) else "source"

        return cls(path=path, manifest=manifest, stats=stats, kind=kind)

    @classmethod
    def as_known(cls, path: Path, stored: StoredCheckpoint) -> Self | None:
        """Return the checkpoint with the catalog's manifest; ``None`` if any of its files is in another state."""
        if path.is_dir() and stored.manifest.index_name is None and (path / formats.INDEX_NAME).exists():
            return None  # a new index decides
        try:
            stats = _stat_files(stored.manifest, path)
        except OSError:
            return None

        known = {copy.file: copy.stat for copy in stored.copies}
        if stats != {name: known.get(name) for name in stats}:
            return None

        return cls(path=path, manifest=stored.manifest, stats=stats)

    def checkpoint(self, name: str, *, trusted: bool = False) -> Checkpoint:
        """Return it as a checkpoint with a name."""
        folder = formats.folder_of(self.path)
        shards = self.manifest.shards

        return Checkpoint(
            name=name,
            uri=path_uri(self.path),
            where=str(self.made_of or self.path),
            manifest=self.manifest,
            files=tuple(ShardFile(path=folder / shard.name, stat=self.stats[shard.name]) for shard in shards),
            trusted=trusted,
        )

    def copies(self) -> list[LocalCopy]:
        """Return its files as the catalog records them."""
        folder = formats.folder_of(self.path)

        return [
            LocalCopy(file=file, path=folder / file, stat=stat, kind=self.kind) for file, stat in self.stats.items()
        ]

    def contents(self, *, accept: bool = False, moved_from: str | None = None) -> CheckpointContents:
        """Return it as the catalog records it, with digests of the bytes outside of tensors.

        :raises OSError: a file cannot be read.
        """
        checkpoint = self.checkpoint(str(self.path))

        return CheckpointContents(
            uri=checkpoint.uri,
            manifest=self.manifest,
            copies=self.copies(),
            checks=header_checks(checkpoint, {}),
            accept=accept,
            moved_from=moved_from,
        )


def _stat_files(manifest: Manifest, path: Path) -> dict[str, FileStat]:
    folder = formats.folder_of(path)
    names = [shard.name for shard in manifest.shards]
    if manifest.index_name is not None:
        names.append(manifest.index_name)

    return {name: FileStat.from_stat(os.stat(folder / name)) for name in names}


def header_checks(
    checkpoint: Checkpoint, known: Mapping[str, str], chosen: Collection[int] | None = None
) -> list[Check]:
    """Return checks of the bytes of files outside of tensors: of a safetensors file, its header.

    This skips files with a known SHA-256, which checks all bytes, and archives, whose bytes belong mostly to others.

    :param known: recorded digests, by the names of files.
    :param chosen: positions of files; default: all.

    :raises OSError: a file cannot be read.
    """
    manifest, checks = checkpoint.manifest.flat(), []
    for i, (shard, file) in enumerate(zip(manifest.shards, checkpoint.here(), strict=True)):
        if shard.sha256 is not None or (chosen is not None and i not in chosen):
            continue
        ends = sorted((manifest.offsets[t], manifest.offsets[t] + manifest.nbytes(t)) for t in manifest.tensors_of(i))
        if file.stat.size - sum(end - start for start, end in ends) > _MOST_HEADER:
            continue
        found = _digest_between(file.path, [*ends, (file.stat.size, file.stat.size)])
        checks.append(checkpoint.check(i, HEADER, expected=known.get(shard.name), found=found))

    return checks


def _digest_between(path: Path, ranges: Sequence[tuple[int, int]]) -> str:
    """Return the BLAKE3 of all bytes before and between sorted ranges of a file."""
    digest, at = blake3(), 0
    with path.open("rb") as file:
        for start, end in ranges:
            file.seek(at)
            while at < start and (data := file.read(min(start - at, 1 << 20))):
                digest.update(data)
                at += len(data)
            at = max(at, end)

    return digest.hexdigest()


def local_checkpoint(path: Path, *, inner_path: str | None = None) -> Path:
    """Return ``path``, or ``inner_path`` below it, if it exists.

    :raises CheckpointNotFoundError: it does not (also a ``FileNotFoundError``).
    :raises PolicyError: ``inner_path`` leads out of ``path``.
    """
    if inner_path is not None:
        inner = PurePosixPath(inner_path)
        if inner.is_absolute() or ".." in inner.parts or "\0" in inner_path:
            raise PolicyError(f"`checkpoint_path` must be a path inside the checkpoint, but is {inner_path!r}.")
        path = path / inner

    # The format of a file decides about a path that continues inside of it.
    if not path.exists() and formats.container_of(path) is None:
        raise CheckpointNotFoundError(path, f"No checkpoint is at {path}: the path does not exist.")

    return path
