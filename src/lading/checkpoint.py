"""Checkpoints: where a card's is, what it holds, whether it is on this machine, and what the catalog knows of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lading import formats
from lading.card import AssetCard, CheckpointRef, checkpoint_ref, path_uri, uri_path
from lading.catalog.checkpoints import record_checkpoint, record_files
from lading.catalog.records import Check
from lading.catalog.store import AssetStore, LocalCopy, StoredCheckpoint, get_asset_store
from lading.errors import (
    CatalogError,
    CheckpointNotFoundError,
    CorruptModelCheckpointError,
    DigestMismatchError,
    InternalError,
    ModelGatedError,
)
from lading.fetch.file import local_checkpoint
from lading.fetch.source import Known
from lading.filesystem import FileStat
from lading.folder import read_hf_config, refuse_quantised_config
from lading.manifest import Manifest
from lading.published import index_source
from lading.settings import Settings
from lading.transfer.files import ShardFile
from lading.whole import comes_whole, fetch_whole

log = logging.getLogger("lading")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose tensors are known; its files may still be elsewhere."""

    name: str
    """Of the card, or the path."""
    uri: str
    """What the catalog knows it by."""
    where: str
    """Where it is, for messages: a path, or the address that it is fetched from."""
    manifest: Manifest
    files: tuple[ShardFile, ...] | None
    """One for each shard of the manifest, in the state in which it was looked at; ``None`` before they are fetched."""
    trusted: bool = False
    """Whether the catalog saw all files verified in just the state that they are in."""
    ref: CheckpointRef | None = None
    """Where to fetch it from; ``None`` for what is on this machine by itself."""
    revision: str = ""
    """The commit at the source that the manifest is of."""

    def here(self) -> tuple[ShardFile, ...]:
        """The files on this machine.

        :raises InternalError: they were not fetched.
        """
        if self.files is None:
            raise InternalError(f"the checkpoint {self.where} is to be read, but was not fetched")

        return self.files


def card_checkpoint(card: AssetCard, store: AssetStore, *, progress: bool = False) -> Checkpoint:
    """The checkpoint of a card, its manifest from the catalog where that is known and still true.

    One that is elsewhere is not fetched: its headers are read there, once, and pinned to what was published then. Only
    what ``torch.save`` wrote has to come first (:mod:`lading.whole`).

    :param progress: show a bar on stderr if it does.

    :raises ModelGatedError: the card names none.
    :raises CheckpointNotFoundError: nothing is where the card says.
    :raises FetchError: the source cannot be reached.
    :raises DigestMismatchError: other files are in the place of those that were verified.
    :raises NotSupportedError: it is quantised.
    """
    ref = checkpoint_ref(card)
    if ref.gated:
        raise ModelGatedError(card.name, ref.info_url)

    path = uri_path(ref.uri)
    if path is None:
        return _remote_checkpoint(card.name, ref, store, progress=progress)

    return _local_checkpoint(card.name, local_checkpoint(path, inner_path=ref.path), store)


def local_paths(card: AssetCard, store: AssetStore) -> list[Path]:
    """Where a card's checkpoint is on this machine: its folder or its file; else all of its files, one by one.

    :raises ModelGatedError: the card names none.
    :raises CheckpointNotFoundError: it is not on this machine.
    """
    ref = checkpoint_ref(card)
    path = uri_path(ref.uri)
    if path is not None:
        return [local_checkpoint(path, inner_path=ref.path)]

    stored = store.checkpoint(ref.key) if ref.uri else None
    files = None if stored is None else _copies_as_known(stored)
    if stored is None or files is None:
        if ref.gated:
            raise ModelGatedError(card.name, ref.info_url)
        raise CheckpointNotFoundError(
            ref.key,
            f"The checkpoint of {card.name!r} is at {ref.key}, not on this machine. `lading pull {card.name}` fetches "
            "it.",
        )

    paths = [file.path for file in files]
    folders = {each.parent for each in paths}
    named = all(file.name == shard.name for file, shard in zip(paths, stored.manifest.shards, strict=True))

    return [folders.pop()] if len(paths) > 1 and len(folders) == 1 and named else paths


def path_checkpoint(path: Path, *, restrict: bool = True) -> Checkpoint:
    """The checkpoint at a path, of which the catalog is not asked and learns nothing.

    :param restrict: as :func:`lading.formats.index` takes it.

    :raises CheckpointNotFoundError: nothing is there (also a ``FileNotFoundError``).
    """
    try:
        manifest, stats = _read(path, restrict=restrict)
    except formats.NonContiguousError:
        return path_checkpoint(_rewritten(path, restrict=restrict))

    return _here(str(path), path, manifest, stats)


def index_checkpoint(target: str | Path, *, store: AssetStore | None = None) -> StoredCheckpoint:
    """Read the manifest of a card's checkpoint, or of the one at a path or an address, and write it to the catalog.

    Of a checkpoint that is elsewhere only headers are read, a few megabytes, as they are published now. Files on this
    machine are taken as they are now: what was recorded of other bytes in their place is forgotten.

    :param target: the name of a card, a path, or an address such as ``hg://org/name``.

    :raises AssetNotFoundError: no card has that name.
    :raises CheckpointNotFoundError: nothing is there (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: the file breaks the rules of its format.
    :raises FetchError: the source cannot be reached.
    :raises CatalogError: the catalog cannot be written.
    """
    store = store or get_asset_store()
    card_name, ref = _ref_of(target, store)
    path = uri_path(ref.uri)
    if path is None and comes_whole(ref):
        whole = fetch_whole(ref, known=known_content(store), progress=False)
        uri, manifest, copies, revision = ref.key, whole.manifest, [whole.copy], whole.revision
    elif path is None:
        uri, copies = ref.key, []
        published = index_source(ref)
        manifest, revision = published.manifest, published.revision
    else:
        path = local_checkpoint(path, inner_path=ref.path)
        try:
            manifest, stats = _read(path)
        except formats.NonContiguousError:
            path = _rewritten(path)
            manifest, stats = _read(path)
        uri, copies, revision = path_uri(path), _copies(path, stats), ""

    require_writable(store)
    record_checkpoint(
        store.database, uri=uri, manifest=manifest, copies=copies, revision=revision, card_name=card_name, accept=True
    )
    stored = store.checkpoint(uri)
    if stored is None:
        raise InternalError(f"the manifest of {uri} was written to the catalog, but is not there")

    return stored


def _ref_of(target: str | Path, store: AssetStore) -> tuple[str | None, CheckpointRef]:
    """The card, if the target is one, and where the checkpoint is."""
    if isinstance(target, Path):
        return None, CheckpointRef(uri=path_uri(target.expanduser().absolute()), gated=False, info_url=None)
    if "://" in target:
        return None, CheckpointRef(uri=target, gated=False, info_url=None)

    card = store.retrieve_card(target)
    ref = checkpoint_ref(card)
    if ref.gated:
        raise ModelGatedError(card.name, ref.info_url)

    return card.name, ref


def require_writable(store: AssetStore) -> None:
    """:raises CatalogError: the catalog cannot be written."""
    if not store.database.writable:
        raise CatalogError(
            f"The catalog {store.database.url} cannot be written. Check the permissions of the file and its folder, or "
            "name another one in LADING_DATABASE_URL."
        )


# --- elsewhere -------------------------------------------------------------------------------------------------------


def known_content(store: AssetStore | None) -> Known:
    """Where the catalog knows a verified file of a digest."""

    def known(sha256: str) -> Path | None:
        if store is None:
            return None
        try:
            return store.find_content(sha256)
        except (CatalogError, OSError) as error:
            log.warning("the catalog cannot be asked for files that are here already: %s", error)
            return None

    return known


def _remote_checkpoint(name: str, ref: CheckpointRef, store: AssetStore, *, progress: bool) -> Checkpoint:
    stored = _stored(name, ref.key, store)
    if stored is not None:
        files = _copies_as_known(stored)
        return Checkpoint(
            name=name,
            uri=ref.key,
            where=ref.key,
            manifest=stored.manifest,
            files=files,
            trusted=files is not None and _all_verified(stored),
            ref=ref,
            revision=stored.revision,
        )

    if comes_whole(ref):
        return _whole_checkpoint(name, ref, store, progress=progress)

    published = index_source(ref)
    refuse_quantised_config(published.hf_config, ref.key)
    checkpoint = Checkpoint(
        name=name,
        uri=ref.key,
        where=ref.key,
        manifest=published.manifest,
        files=None,
        ref=ref,
        revision=published.revision,
    )
    _record(checkpoint, (), store)

    return checkpoint


def _whole_checkpoint(name: str, ref: CheckpointRef, store: AssetStore, *, progress: bool) -> Checkpoint:
    whole = fetch_whole(ref, known=known_content(store), progress=progress)
    checkpoint = Checkpoint(
        name=name,
        uri=ref.key,
        where=ref.key,
        manifest=whole.manifest,
        files=(ShardFile(path=whole.copy.path, stat=whole.copy.stat),),
        trusted=True,
        ref=ref,
        revision=whole.revision,
    )
    _record(checkpoint, [whole.copy], store, checks=[whole.check])

    return checkpoint


def _copies_as_known(stored: StoredCheckpoint) -> tuple[ShardFile, ...] | None:
    """The files of all shards, if each is on this machine and as it was when it was recorded."""
    known = {copy.file: copy for copy in stored.copies}
    files = []
    for shard in stored.manifest.shards:
        copy = known.get(shard.name)
        if copy is None or _stat(copy.path) != copy.stat:
            return None
        files.append(ShardFile(path=copy.path, stat=copy.stat))

    return tuple(files)


def _stat(path: Path) -> FileStat | None:
    try:
        return FileStat.from_stat(os.stat(path))
    except OSError:
        return None


# --- on this machine -------------------------------------------------------------------------------------------------


def _local_checkpoint(name: str, path: Path, store: AssetStore) -> Checkpoint:
    refuse_quantised_config(read_hf_config(path), path)

    stored = _stored(name, path_uri(path), store)
    if stored is not None:
        stats = _unchanged(stored, path)
        if stats is not None:
            return _here(name, path, stored.manifest, stats, trusted=_all_verified(stored))

    try:
        manifest, stats = _read(path)
    except formats.NonContiguousError:
        return _local_checkpoint(name, _rewritten(path), store)
    if stored is not None:
        _refuse_other_tensors(name, path, stored, manifest)
    checkpoint = _here(name, path, manifest, stats)
    _record(checkpoint, _copies(path, stats), store)

    return checkpoint


RECENT_NS = 50_000_000
"""File systems tell times in steps of some milliseconds: a file that is younger may change without looking changed."""


def _read(path: Path, *, restrict: bool = True) -> tuple[Manifest, dict[str, FileStat]]:
    """Read all headers, and make sure that the files are still those whose headers were read.

    :raises NonContiguousError: tensors are no ranges of bytes there, but are in the file that was :func:`_rewritten`.
    """
    start = time.time_ns()
    manifest = formats.index(path, restrict=restrict)
    stats = _stat_files(manifest, path)

    if any(stat.ctime_ns > start - RECENT_NS for stat in stats.values()):
        again = formats.index(path, restrict=restrict)
        if again != manifest or _stat_files(again, path) != stats:
            raise CorruptModelCheckpointError(
                path, f"{path} changed while its headers were read. Try again when nothing writes to it any more."
            )

    return manifest, stats


def _here(
    name: str, path: Path, manifest: Manifest, stats: Mapping[str, FileStat], *, trusted: bool = False
) -> Checkpoint:
    folder = _folder(path)
    files = tuple(ShardFile(path=folder / shard.name, stat=stats[shard.name]) for shard in manifest.shards)

    return Checkpoint(name=name, uri=path_uri(path), where=str(path), manifest=manifest, files=files, trusted=trusted)


def _rewritten(path: Path, *, restrict: bool = True) -> Path:
    return formats.readable(path, cache=Settings.from_environment().cache_dir, restrict=restrict)


def _folder(path: Path) -> Path:
    if archive := formats.archive_of(path):
        return archive.parent

    return path if path.is_dir() else path.parent


def _stat_files(manifest: Manifest, path: Path) -> dict[str, FileStat]:
    """The state of every file that determines what the checkpoint holds."""
    folder = _folder(path)
    names = [shard.name for shard in manifest.shards]
    if manifest.index_name is not None:
        names.append(manifest.index_name)

    return {name: FileStat.from_stat(os.stat(folder / name)) for name in names}


def _copies(path: Path, stats: Mapping[str, FileStat]) -> list[LocalCopy]:
    folder = _folder(path)

    return [LocalCopy(file=file, path=folder / file, stat=stat) for file, stat in stats.items()]


def _unchanged(stored: StoredCheckpoint, path: Path) -> dict[str, FileStat] | None:
    """The state of the files of a checkpoint whose manifest the catalog knows; ``None`` if any is in another one."""
    if path.is_dir() and stored.manifest.index_name is None and (path / formats.INDEX_NAME).exists():
        return None  # an index has come, and its word decides
    try:
        stats = _stat_files(stored.manifest, path)
    except OSError:
        return None

    known = {copy.file: copy.stat for copy in stored.copies}

    return stats if stats == {name: known.get(name) for name in stats} else None


def _refuse_other_tensors(name: str, path: Path, stored: StoredCheckpoint, manifest: Manifest) -> None:
    """:raises DigestMismatchError: the files that were verified were replaced by a checkpoint of other tensors."""
    if manifest.tensors_equal(stored.manifest) or not _was_verified(stored):
        return

    raise DigestMismatchError(
        path,
        f"{path} is not the checkpoint that was verified: it has other files or tensors now. If that is meant, "
        f"`lading index {name}` takes it for the right one.",
        expected=f"{len(stored.manifest)} tensors",
        found=f"{len(manifest)} tensors",
    )


# --- the catalog's word ----------------------------------------------------------------------------------------------


def _stored(name: str, uri: str, store: AssetStore) -> StoredCheckpoint | None:
    # All that the catalog can do here is to save the reading of headers, so its failures are not the load's.
    try:
        return store.checkpoint(uri)
    except (CatalogError, OSError) as error:
        log.warning("the manifest of %s cannot be read from the catalog: %s", name, error)
        return None


def _record(
    checkpoint: Checkpoint, copies: Sequence[LocalCopy], store: AssetStore, *, checks: Sequence[Check] = ()
) -> None:
    try:
        require_writable(store)
        record_checkpoint(
            store.database,
            uri=checkpoint.uri,
            manifest=checkpoint.manifest,
            copies=copies,
            revision=checkpoint.revision,
            card_name=checkpoint.name,
        )
        if checks:
            record_files(store.database, uri=checkpoint.uri, checks=checks)
    except (CatalogError, OSError) as error:
        log.warning("the manifest of %s is not in the catalog: %s", checkpoint.name, error)


def _all_verified(stored: StoredCheckpoint) -> bool:
    """Whether every shard was seen verified in the state that is known of it on this machine."""
    verified = {copy.file for copy in stored.copies if copy.verified_at is not None}

    return all(shard.name in verified for shard in stored.manifest.shards)


def _was_verified(stored: StoredCheckpoint) -> bool:
    return any(copy.verified_at is not None for copy in stored.copies)
