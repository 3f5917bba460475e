"""The files of models on this machine, their owners and their cards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lading import formats
from lading.cards.addresses import stated_uris
from lading.catalog.artifacts import known_artifacts
from lading.catalog.checkpoints.holdings import held_checkpoints, known_uris
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import FoundArtifact, LocalCheckpoint
from lading.catalog.store import AssetStore
from lading.checkpoints.card_links import heads_of, names_of
from lading.sources.cache import Cache, Entry, entry_key
from lading.system.display import counted, human_bytes, representation
from lading.system.filesystem import FileStat
from lading.system.uris import path_uri, shown_name, shown_uri, uri_path


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsageEntry:
    """The files of one model, or orphans, on this machine."""

    name: str
    """The name of the model; without a card, the path or the address of the checkpoint, artifact or orphan."""
    bytes: int
    """The bytes of the files that are there."""
    kind: str
    """The owners of the files, see :data:`lading.catalog.records.CopyKind`, separated by commas."""
    files: int
    complete: bool
    """``True`` if all files are there, as they were when they were recorded."""
    verified: bool
    """``True`` if all of them were verified in this state."""
    path: str
    """The path of the file, or of the folder that contains all of them."""
    checkpoint: str | None
    revision: str | None

    def __repr__(self) -> str:
        return representation(
            self,
            self.name,
            f"{human_bytes(self.bytes)} in {counted(self.files, 'file')}",
            "" if self.complete else "incomplete",
            self.path,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """The result of :func:`disk_usage`."""

    holdings: tuple[DiskUsageEntry, ...]
    """The entries by name. Models with the same checkpoint, or the same file, each count it."""
    orphans: tuple[DiskUsageEntry, ...]
    """The files that this catalog fetched to lading's cache and no card names in any environment."""
    bytes: int
    """The bytes of ``holdings``, counting each file once."""
    orphan_bytes: int

    def __repr__(self) -> str:
        return representation(
            self,
            f"{human_bytes(self.bytes)} of {counted(len(self.holdings), 'model')}",
            f"{human_bytes(self.orphan_bytes)} of {counted(len(self.orphans), 'orphan')}",
        )


def disk_usage(pattern: str | None = None, *, store: CardStore | None = None) -> DiskUsage:
    """Return the files of models on this machine, as far as the catalog knows them, and the orphans in lading's cache.

    :param pattern: a shell-style pattern of names; orphans have no names, and always count.

    :raises CatalogError: the catalog cannot be read.
    """
    store = open_store(store)
    held = held_checkpoints(store.database)
    names = names_of(store, {checkpoint.uri for checkpoint in held})

    seen: _Sizes = {}
    found = [
        _holding(name, checkpoint, stats)
        for checkpoint in held
        for name in names.get(checkpoint.uri) or [shown_name(checkpoint.uri)]
        if (pattern is None or fnmatchcase(name, pattern)) and (stats := _look(_paths_of(checkpoint), seen))
    ]

    # `index` and `verify` know the files of some artifacts: quantized weights are tensors, too.
    known = {checkpoint.uri for checkpoint in held}
    artifacts = [_artifact_entry(a) for a in known_artifacts(store.database) if path_uri(a.path) not in known]
    found += [entry for entry in artifacts if pattern is None or fnmatchcase(entry.name, pattern)]

    orphaned: _Sizes = {}
    orphans = _orphan_holdings(find_orphans(store, held), orphaned)

    return DiskUsage(
        holdings=tuple(sorted(found, key=lambda holding: (holding.name, holding.checkpoint or ""))),
        orphans=tuple(orphans),
        bytes=sum(seen.values()) + sum(entry.bytes for entry in found if entry.checkpoint is None),
        orphan_bytes=sum(orphaned.values()),
    )


def _artifact_entry(found: FoundArtifact) -> DiskUsageEntry:
    """Return the entry of an artifact as it was when it was found."""
    return DiskUsageEntry(
        name=str(found.path),
        bytes=found.artifact.bytes,
        kind="adopted",
        files=found.artifact.files,
        complete=True,
        verified=False,
        path=str(found.path),
        checkpoint=None,
        revision=None,
    )


_Sizes = dict[tuple[int, int], int]
"""The sizes of files in bytes, by device and inode: a file may have several names."""


def _look(paths: Iterable[Path], seen: _Sizes) -> dict[Path, os.stat_result]:
    """Return the state of the files that are there; add their sizes to ``seen``."""
    stats: dict[Path, os.stat_result] = {}
    for path in paths:
        with suppress(OSError):
            stats[path] = os.stat(path)
    seen.update(_sizes_of(stats))

    return stats


def _sizes_of(stats: Mapping[Path, os.stat_result]) -> _Sizes:
    return {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats.values()}


def _paths_of(checkpoint: LocalCheckpoint) -> list[Path]:
    return [copy.path for copy in checkpoint.copies]


def _holding(name: str, checkpoint: LocalCheckpoint, stats: Mapping[Path, os.stat_result]) -> DiskUsageEntry:
    there = [copy for copy in checkpoint.copies if copy.path in stats]
    intact = {copy.file: copy for copy in there if FileStat.from_stat(stats[copy.path]) == copy.stat}
    shards = [intact.get(shard.name) for shard in checkpoint.shards]

    return DiskUsageEntry(
        name=name,
        bytes=sum(_sizes_of(stats).values()),
        kind=",".join(sorted({copy.kind for copy in there})),
        files=len(there),
        complete=bool(shards) and None not in shards,
        verified=bool(shards) and all(copy is not None and copy.verified_at is not None for copy in shards),
        path=_common_path(list(stats)),
        checkpoint=shown_uri(checkpoint.uri),
        revision=checkpoint.revision or None,
    )


def _common_path(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)


# --- orphans ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphans:
    """The files that this catalog fetched to lading's cache and no card of it names in any environment."""

    cache: Cache
    entries: tuple[tuple[Entry, tuple[Path, ...]], ...]
    """Entries fetched for cards that were removed, and the files of each that nothing else needs."""
    strays: tuple[Path, ...]
    """Files without an entry, and rewrites of files."""
    needed: frozenset[str]
    """The SHA-256 of files that something needs."""


def own_cache(store: AssetStore) -> Cache:
    """Return lading's cache, as the catalog of ``store`` uses it."""
    return Cache(store.settings.cache_dir, catalog=store.settings.catalog_id)


def find_orphans(store: AssetStore, held: Sequence[LocalCheckpoint]) -> Orphans:
    """Return the files that this catalog fetched to lading's cache and no card names.

    Several catalogs may share the cache, and a new one may replace a lost one. So an entry counts only if it belongs to
    this catalog, and to a checkpoint that this catalog knows.

    :param held: all checkpoints with files on this machine.
    """
    cache = own_cache(store)
    stated = _stated(store)
    stated_keys = set(map(entry_key, stated))
    named = set(names_of(store, [checkpoint.uri for checkpoint in held]))
    named |= {checkpoint.uri for checkpoint in held if stated.intersection(heads_of(checkpoint.uri))}
    known = {entry_key(head) for uri in known_uris(store.database) for head in heads_of(uri)}

    def digests(of: Iterable[LocalCheckpoint]) -> set[str]:
        found = (cache.digest_of(copy.path) for checkpoint in of for copy in checkpoint.copies)
        return {sha256 for sha256 in found if sha256 is not None}

    unnamed = [checkpoint for checkpoint in held if checkpoint.uri not in named]
    needed = digests(checkpoint for checkpoint in held if checkpoint.uri in named) | cache.files_of_others()
    ours = digests(unnamed)  # extra files of a checkpoint may come from another source

    gone: list[Entry] = []
    shared = cache.has_unknown_entries()
    for entry in cache.entries():
        files = _digests_of(entry)
        mine = bool(cache.catalog) and entry.catalog == cache.catalog
        if mine and entry.key not in stated_keys and (entry.key in known or files & ours):
            gone.append(entry)
        else:
            needed |= files
            shared |= not mine or entry.key not in stated_keys

    in_entries = needed.union(*map(_digests_of, gone))
    kept = {copy.path for checkpoint in held if checkpoint.uri in named for copy in checkpoint.copies}
    own = {copy.path for checkpoint in unnamed for copy in checkpoint.copies}
    strays = [path for path in cache.files() if cache.digest_of(path) not in in_entries]
    strays += [path for path in (*cache.repacked_files(), *formats.rewritten_files(cache.folder)) if path not in kept]

    return Orphans(
        cache=cache,
        entries=tuple(
            (entry, tuple(path for sha256 in _digests_of(entry) - needed if (path := cache.find(sha256)) is not None))
            for entry in sorted(gone, key=lambda entry: (entry.uri, entry.key))
        ),
        # An unknown file belongs to this catalog only if it is the only one.
        strays=tuple(path for path in strays if path in own or not shared),
        needed=frozenset(needed),
    )


def _digests_of(entry: Entry) -> set[str]:
    return {file.sha256 for file in entry.files.values()}


def _stated(store: AssetStore) -> set[str]:
    """Return every address and path that a card or an overlay states, in any environment."""
    found: set[str] = set()
    for entry in store.entries()[0]:
        inner = "/".join(str(part) for key in ("checkpoint_path", "state_dict") if (part := entry.metadata.get(key)))
        for _, _, uri in stated_uris(entry):
            path = uri_path(uri)
            for each in () if path is None else (path, path / inner):
                made = formats.rewritten(each, cache=store.settings.cache_dir)
                found |= set() if made is None else {path_uri(made)}
            found.add(uri.rstrip("/"))

    return found


def _orphan_holdings(orphans: Orphans, seen: _Sizes) -> list[DiskUsageEntry]:
    groups: list[tuple[str, tuple[Path, ...], str | None]] = [
        (entry.uri, paths, entry.uri) for entry, paths in orphans.entries
    ]
    groups += [(str(path), (path,), None) for path in orphans.strays]
    looked = [(name, paths, uri, _look(paths, seen)) for name, paths, uri in groups]

    return [
        DiskUsageEntry(
            name=name,
            bytes=sum(stat.st_size for stat in stats.values()),
            kind="cache",
            files=len(stats),
            complete=len(stats) == len(paths),
            verified=False,
            path=_common_path(list(stats)) if stats else str(orphans.cache.folder),
            checkpoint=uri,
            revision=None,
        )
        for name, paths, uri, stats in looked
    ]
