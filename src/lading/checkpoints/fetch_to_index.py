"""Remote checkpoints whose tensors are known only after a download: files of ``torch.save``, and archives.

Parts at the end of such a file, or anywhere in it, state the place of each tensor: so lading fetches it first, and then
indexes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from lading import formats
from lading.cards.card import CheckpointRef
from lading.catalog.records import Check, LocalCopy, now
from lading.catalog.store import AssetStore
from lading.checkpoints.published import PublishedCheckpoint, PublishedFiles, published_config, require_whole
from lading.checkpoints.recording import BestEffort, known_content
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError
from lading.formats.config_json import refuse_quantized_config
from lading.formats.folder import is_index, is_torch_format
from lading.formats.manifest import Manifest
from lading.formats.remote import find_checkpoint
from lading.formats.shard_index import index_shards, read_index_at
from lading.sources.open import HTTP_SCHEMES, HUB_SCHEMES, open_source
from lading.sources.source import FetchedFile, RemoteFile, Snapshot, Source
from lading.system.filesystem import FileStat
from lading.system.settings import Settings
from lading.system.uris import shown_uri

_ARCHIVE = ".tar"


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedCheckpoint(PublishedCheckpoint):
    """A checkpoint that was fetched for its manifest, with the local copy of each shard."""

    copies: Sequence[LocalCopy]
    originals: Sequence[LocalCopy]
    """Fetched files that another file replaces, which is their rewrite."""
    checks: Sequence[Check]


def must_fetch_to_index(ref: CheckpointRef) -> bool:
    """Return whether lading has to fetch the checkpoint before indexing it, by the names in its address.

    For a folder, the list of its files decides: :class:`lading.formats.NotByHeadersError`.
    """
    if ref.scheme not in (*HTTP_SCHEMES, *HUB_SCHEMES):
        return False

    path = PurePosixPath(urlsplit(ref.uri).path if ref.path is None else f"{urlsplit(ref.uri).path}/{ref.path}")

    return any(part.endswith(_ARCHIVE) for part in path.parts) or is_torch_format(path.name)


def was_fetched_to_index(manifest: Manifest) -> bool:
    """Return whether a remote checkpoint had to be fetched for its manifest."""
    # By the names of the files: the manifest may be that of a rewrite, which is safetensors.
    return not any(shard.name.lower().endswith(".safetensors") for shard in manifest.shards)


def fetch_and_index(
    ref: CheckpointRef,
    *,
    store: AssetStore | None,
    settings: Settings,
    progress: bool,
    revision: str | None = None,
    restrict: bool = True,
    name: str | None = None,
) -> FetchedCheckpoint:
    """Fetch the files of a checkpoint and index them.

    :param store: the store that finds known content, and knows which rewritten files are intact. The caller records
        the download.
    :param revision: default: the one that the address names, or the current one.
    :param restrict: as :func:`lading.formats.index` takes it.
    :param name: the name of the card, for messages.

    :raises CheckpointNotFoundError: the source has no such file, or the archive no such member.
    :raises FetchError: it cannot be reached, or answers nonsense.
    :raises DigestMismatchError: the bytes are not those that are published.
    :raises CorruptModelCheckpointError: a file breaks the rules of its format.
    :raises RefusedPickleError: it would import what a state dict does not need.
    :raises NotSupportedError: a format that lading does not read, or quantized weights.
    """
    inner, member = _split(ref)
    source = open_source(ref.uri, inner_path=inner, revision=revision, settings=settings)
    fetch = _Fetch(source=source, store=store, cache=settings.cache_dir, progress=progress, restrict=restrict)
    snapshot = source.snapshot()
    card_name, (name, member) = name, _file_of(source.inner, member)
    hf_config: Mapping[str, object] = {}
    if member is None:
        require_whole(source, snapshot, ref, card_name)
        folder, file = find_checkpoint(shown_uri(snapshot.uri), frozenset(each.name for each in snapshot.files), name)
        hf_config = published_config(PublishedFiles(source, snapshot), folder)
        refuse_quantized_config(hf_config, ref.shown)
        if is_index(file):
            return fetch.sharded(snapshot, folder, file, hf_config)
        name = folder + file
    published = snapshot.file(name) if name is not None else None
    if published is None:
        raise CheckpointNotFoundError(ref.shown, f"{shown_uri(ref.uri)} has no file {name!r}.")

    (fetched,) = fetch.files(snapshot, [published])
    copy = fetch.readable(fetched, published.name.rpartition("/")[2], member=member)
    inner = member if copy.path == fetched.path else None
    manifest = formats.index(copy.path, member=inner, restrict=restrict)
    (shard,) = manifest.shards

    named = replace(manifest, shards=(replace(shard, name=copy.file),))

    return _whole(named, source, snapshot, hf_config, [published], [fetched], [copy])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fetch:
    """The state that the steps of a fetch share."""

    source: Source
    store: AssetStore | None
    cache: Path
    progress: bool
    restrict: bool

    def files(self, snapshot: Snapshot, files: Sequence[RemoteFile], *, quiet: bool = False) -> Sequence[FetchedFile]:
        """Fetch files, unless the catalog knows where their content is."""
        known = known_content(self.store)

        return self.source.fetch(snapshot, files, known=known, progress=self.progress and not quiet)

    def sharded(self, snapshot: Snapshot, folder: str, file: str, hf_config: Mapping[str, object]) -> FetchedCheckpoint:
        """Fetch the files that the index ``file`` in ``folder`` names."""
        (index,) = self.files(snapshot, [each for each in snapshot.files if each.name == folder + file], quiet=True)
        names = list(read_index_at(index.path, name=file).tensors)
        snapshot = self.source.with_siblings(snapshot, [folder + name for name in names])
        shards = [snapshot.file(folder + name) for name in names]
        if None in shards:
            where = f"{shown_uri(snapshot.uri)}/{folder}{file}"
            raise CorruptModelCheckpointError(
                where,
                f"{where}: expected the file {names[shards.index(None)]!r} beside it, found none. Ask its publisher "
                "for it.",
            )

        there = [shard for shard in shards if shard is not None]
        fetched = self.files(snapshot, there)
        copies = [self.readable(each, name) for each, name in zip(fetched, names, strict=True)]
        paths = {copy.file: copy.path for copy in copies}
        manifest = index_shards(index.path, name=file, shards=paths, restrict=self.restrict)

        return _whole(manifest, self.source, snapshot, hf_config, there, fetched, copies)

    def readable(self, fetched: FetchedFile, name: str, *, member: str | None = None) -> LocalCopy:
        """Return the copy of a file, or of its rewrite, under the name of its shard."""
        before = formats.rewritten(fetched.path, member=member, cache=self.cache)
        if before is not None and not _is_good(before, self.store):
            before.unlink(missing_ok=True)
        path = formats.readable(fetched.path, member=member, cache=self.cache, restrict=self.restrict)

        return LocalCopy(
            file=name,
            path=path,
            stat=FileStat.from_stat(path.stat()),
            kind=self.source.kind if path == fetched.path else "cache",
            verified_at=now(),
        )


def _is_good(path: Path, store: AssetStore | None) -> bool:
    """Return whether the rewrite of a file is as it was when it was made. It has no published digest, only a record in
    the catalog; if that cannot keep one, this accepts the rewrite, as otherwise every load would make it again.
    """
    if store is None or not store.database.writable:
        return True
    with BestEffort("the catalog cannot say whether %s is good, so it is made again", path):
        return store.is_verified(path)
    return False


def _whole(
    manifest: Manifest,
    source: Source,
    snapshot: Snapshot,
    hf_config: Mapping[str, object],
    published: Sequence[RemoteFile],
    fetched: Sequence[FetchedFile],
    copies: Sequence[LocalCopy],
) -> FetchedCheckpoint:
    shards, checks = [], []
    for shard, stated, file, copy in zip(manifest.shards, published, fetched, copies, strict=True):
        shards.append(replace(shard, sha256=stated.sha256 if copy.path == file.path else None))
        checks.append(
            Check(
                file=shard.name if copy.path == file.path else str(file.path),
                path=file.path,
                stat=file.stat,
                method="sha256",
                expected=stated.sha256,
                found=file.sha256,
            )
        )

    originals = [
        LocalCopy(file=str(file.path), path=file.path, stat=file.stat, kind=source.kind)
        for file, copy in zip(fetched, copies, strict=True)
        if copy.path != file.path
    ]

    return FetchedCheckpoint(
        manifest=replace(manifest, shards=tuple(shards)),
        revision=snapshot.revision,
        hf_config=hf_config,
        inner=source.inner,
        snapshot=snapshot,
        copies=copies,
        originals=originals,
        checks=checks,
    )


def _split(ref: CheckpointRef) -> tuple[str | None, str | None]:
    """Return the path inside the source, and the member of the archive there, if the address itself is an archive."""
    if ref.path is not None and urlsplit(ref.uri).path.endswith(_ARCHIVE):
        return None, ref.path

    return ref.path, None


def _file_of(inner: str | None, member: str | None) -> tuple[str | None, str | None]:
    """Return the file or folder within the source and, for an archive, the member that is the checkpoint.

    :raises NotSupportedError: the path does not name a member of an archive.
    """
    if member is not None or inner is None:
        return inner, member

    parts = PurePosixPath(inner).parts
    for i, part in enumerate(parts[:-1]):
        if part.endswith(_ARCHIVE):
            return "/".join(parts[: i + 1]), "/".join(parts[i + 1 :])

    return inner, None
