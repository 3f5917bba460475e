"""What is on this machine, whose it is, and for which cards."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lading import formats
from lading.card import AssetCard, CheckpointRef, checkpoint_ref, path_uri, uri_path
from lading.catalog.holdings import held_checkpoints
from lading.catalog.records import HeldCheckpoint
from lading.catalog.store import AssetStore, get_asset_store
from lading.errors import AssetCardError
from lading.fetch.cache import Cache
from lading.filesystem import FileStat
from lading.settings import Settings
from lading.sidecar import base_uri

log = logging.getLogger("lading")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Files of one model, or of nobody, on this machine."""

    name: str
    """Of the model; where no card names the checkpoint its URI, or the path of a file of no checkpoint."""
    bytes: int
    """Of the files that are there."""
    kind: str
    """Whose files they are, see :data:`lading.catalog.records.CopyKind`; several kinds are separated by commas."""
    files: int
    complete: bool
    """Whether all files are there, as they were when they were recorded."""
    verified: bool
    """Whether all of them were seen with the right digest, in just this state."""
    path: str
    """Of the file, or of the folder that holds all of them."""
    checkpoint: str | None
    revision: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """What :func:`disk_usage` found."""

    holdings: tuple[Holding, ...]
    """By name. Models of one checkpoint, or of one file in different checkpoints, each count it."""
    orphans: tuple[Holding, ...]
    """What is in lading's cache and belongs to no card."""
    bytes: int
    """Of ``holdings``, each file once."""
    orphan_bytes: int


def disk_usage(pattern: str | None = None, *, store: AssetStore | None = None) -> DiskUsage:
    """The files of models on this machine, as far as the catalog knows them, and what lading's cache holds besides.

    :param pattern: a shell-style pattern of names; orphans have none, and are always counted.

    :raises CatalogError: the catalog cannot be read.
    """
    store = store or get_asset_store()
    held = held_checkpoints(store.database)
    names = names_of(store, {checkpoint.uri for checkpoint in held})

    found: list[Holding] = []
    seen: dict[tuple[int, int], int] = {}
    for checkpoint in held:
        for name in names.get(checkpoint.uri) or [checkpoint.uri]:
            if pattern is None or fnmatchcase(name, pattern):
                holding = _holding(name, checkpoint, seen)
                found += [] if holding is None else [holding]

    orphaned: dict[tuple[int, int], int] = {}
    orphans = _orphan_holdings(find_orphans(store, held), orphaned)

    return DiskUsage(
        holdings=tuple(sorted(found, key=lambda holding: (holding.name, holding.checkpoint or ""))),
        orphans=tuple(orphans),
        bytes=sum(seen.values()),
        orphan_bytes=sum(orphaned.values()),
    )


def _holding(name: str, checkpoint: HeldCheckpoint, seen: dict[tuple[int, int], int]) -> Holding | None:
    there = [(copy, stat) for copy in checkpoint.copies if (stat := _stat(copy.path)) is not None]
    if not there:
        return None
    seen.update({(stat.st_dev, stat.st_ino): stat.st_size for _, stat in there})

    intact = {copy.file: copy for copy, stat in there if FileStat.from_stat(stat) == copy.stat}
    shards = [intact.get(shard.name) for shard in checkpoint.shards]

    return Holding(
        name=name,
        bytes=sum({(stat.st_dev, stat.st_ino): stat.st_size for _, stat in there}.values()),
        kind=",".join(sorted({copy.kind for copy, _ in there})),
        files=len(there),
        complete=bool(shards) and all(copy is not None for copy in shards),
        verified=bool(shards) and all(copy is not None and copy.verified_at is not None for copy in shards),
        path=_common_path([copy.path for copy, _ in there]),
        checkpoint=checkpoint.uri,
        revision=checkpoint.revision or None,
    )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _common_path(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)


# --- cards -----------------------------------------------------------------------------------------------------------


def catalog_uri(ref: CheckpointRef) -> str:
    """What the catalog knows the checkpoint of a card by."""
    path = uri_path(ref.uri)
    if path is None:
        return ref.key
    path = path if ref.path is None else path / ref.path

    return path_uri(formats.rewritten(path, cache=Settings.from_environment().cache_dir) or path)


def cards_with(store: AssetStore, wanted: Callable[[str], bool]) -> list[tuple[AssetCard, CheckpointRef]]:
    """The cards, with their overlays, whose checkpoint is of a URI that is wanted. A bad card is logged and left out.

    :param wanted: is asked for ``checkpoint`` alone; what a card says of a ``checkpoint_path`` inside comes behind.
    """
    found = []
    for model in store.models(include_all=True):
        if not model.checkpoint or not wanted(model.checkpoint):
            continue
        try:
            card = store.maybe_retrieve_card(model.name)
            if card is not None:
                found.append((card, checkpoint_ref(card)))
        except AssetCardError as error:
            log.warning("A card of the catalog cannot be used: %s", error)

    return found


def names_of(store: AssetStore, uris: Iterable[str]) -> dict[str, list[str]]:
    """The names of the cards whose models are loaded from each of these checkpoints, or from what a sidecar is of."""
    bases = {uri: base_uri(uri) or uri for uri in uris}
    wanted = set(bases.values())
    heads = {head for uri in wanted for head in _heads(uri)}
    # What was rewritten is not known by the address of what it was made of.
    any_rewritten = any(map(_is_rewritten, wanted))

    def may_be(uri: str) -> bool:
        return uri.rstrip("/") in heads or (any_rewritten and uri_path(uri) is not None)

    names: dict[str, list[str]] = {}
    for card, ref in cards_with(store, may_be):
        uri = catalog_uri(ref)
        if uri in wanted:
            names.setdefault(uri, []).append(card.name)

    return {uri: names[base] for uri, base in bases.items() if base in names}


def _is_rewritten(uri: str) -> bool:
    path = uri_path(uri)

    return path is not None and formats.is_rewritten(path, Settings.from_environment().cache_dir)


def _heads(uri: str) -> list[str]:
    """A URI, and what it lies in, as a ``checkpoint`` may say with a ``checkpoint_path`` inside."""
    heads = [uri.rstrip("/")]
    while "/" in heads[-1].partition("://")[2]:
        heads.append(heads[-1].rpartition("/")[0])

    return heads


# --- what belongs to no card -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphans:
    """What is in lading's cache and belongs to no card."""

    cache: Cache
    uris: tuple[str, ...]
    """What was fetched for cards that are no more."""
    entries: dict[str, tuple[Path, ...]]
    """The files of each of ``uris`` that nobody else needs."""
    strays: tuple[Path, ...]
    """Files that were not fetched for, or made of, anything that is known."""
    needed: frozenset[str]
    """The SHA-256 of files that somebody needs."""


def find_orphans(store: AssetStore, held: Sequence[HeldCheckpoint]) -> Orphans:
    """Look for them.

    :param held: all checkpoints of which files are on this machine.
    """
    cache = Cache(Settings.from_environment().cache_dir)
    entries = list(cache.entries())
    sources = {entry.uri for entry in entries}
    with_cards = {ref.uri for _, ref in cards_with(store, sources.__contains__)}
    named = names_of(store, [checkpoint.uri for checkpoint in held])

    needed = {file.sha256 for entry in entries if entry.uri in with_cards for file in entry.files.values()}
    needed |= {
        sha256
        for checkpoint in held
        if checkpoint.uri in named
        for copy in checkpoint.copies
        if (sha256 := cache.digest_of(copy.path)) is not None
    }

    orphans = {
        entry.uri: tuple(
            path
            for file in entry.files.values()
            if file.sha256 not in needed and (path := cache.find(file.sha256)) is not None
        )
        for entry in entries
        if entry.uri not in with_cards
    }
    kept = {copy.path for checkpoint in held if checkpoint.uri in named for copy in checkpoint.copies}
    known = needed | {file.sha256 for entry in entries for file in entry.files.values()}

    return Orphans(
        cache=cache,
        uris=tuple(sorted(orphans)),
        entries=orphans,
        strays=(
            *(path for path in cache.files() if cache.digest_of(path) not in known),
            *(path for path in cache.repacked_files() if path not in kept),
            *(path for path in formats.rewritten_files(cache.folder) if path not in kept),
        ),
        needed=frozenset(needed),
    )


def _orphan_holdings(orphans: Orphans, seen: dict[tuple[int, int], int]) -> list[Holding]:
    groups: list[tuple[str, tuple[Path, ...], str | None]] = [(uri, orphans.entries[uri], uri) for uri in orphans.uris]
    groups += [(str(path), (path,), None) for path in orphans.strays]

    found = []
    for name, paths, uri in groups:
        there = [(path, stat) for path in paths if (stat := _stat(path)) is not None]
        seen.update({(stat.st_dev, stat.st_ino): stat.st_size for _, stat in there})
        found.append(
            Holding(
                name=name,
                bytes=sum(stat.st_size for _, stat in there),
                kind="cache",
                files=len(there),
                complete=len(there) == len(paths),
                verified=False,
                path=_common_path([path for path, _ in there]) if there else str(orphans.cache.folder),
                checkpoint=uri,
                revision=None,
            )
        )

    return found
