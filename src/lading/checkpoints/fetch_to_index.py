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
from lading.catalog.records import ORIGINAL, Check, LocalCopy, now
from lading.catalog.store import AssetStore
from lading.checkpoints.address import file_in, has_inside, split_inside
from lading.checkpoints.published import PublishedCheckpoint, PublishedFiles, published_config, require_complete
from lading.checkpoints.recording import BestEffort, extra_copy, fetched_check, known_content
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, NotSupportedError
from lading.formats.config_json import refuse_quantized_config
from lading.formats.folder import is_index
from lading.formats.manifest import Manifest
from lading.formats.remote import find_checkpoint
from lading.formats.shard_index import index_shards, read_index_at
from lading.sources.open import SCHEMES, open_source
from lading.sources.source import FetchedFile, Source
from lading.system.filesystem import FileStat
from lading.system.settings import Settings
from lading.system.uris import shown_uri
from lading.transfer.files import ShardFile


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedCheckpoint(PublishedCheckpoint):
    """A checkpoint that was fetched for its manifest."""

    files: tuple[ShardFile, ...]
    copies: Sequence[LocalCopy]
    """The copy of each shard, and the originals of those that are rewrites."""
    checks: Sequence[Check]

    @property
    def rewritten(self) -> bool:
        """True if a file is a rewrite of what was fetched."""
        return len(self.copies) > len(self.files)


def must_fetch_to_index(ref: CheckpointRef) -> bool:
    """Return whether lading has to fetch the checkpoint before indexing it, by the names in its address.

    For a folder, the list of its files decides: :class:`lading.formats.NotByHeadersError`.
    """
    if ref.scheme not in SCHEMES or ref.scheme == "file":
        return False

    path = PurePosixPath(urlsplit(ref.uri).path if ref.path is None else f"{urlsplit(ref.uri).path}/{ref.path}")

    return any(map(has_inside, path.parts))


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
    inner, member = split_inside(ref)
    source = open_source(ref.uri, inner_path=inner, revision=revision, settings=settings)
    snapshot = source.snapshot()
    path, member = file_in(source.inner, member)
    known = known_content(store)
    file = (path or "").rpartition("/")[2]
    folder = (path or "").removesuffix(file)
    hf_config: Mapping[str, object] = {}
    if member is None:
        require_complete(source, snapshot, ref, name)
        folder, file = find_checkpoint(shown_uri(snapshot.uri), frozenset(each.name for each in snapshot.files), path)
        hf_config = published_config(PublishedFiles(source, snapshot), folder)
        refuse_quantized_config(hf_config, ref.shown)
    names, index = [file], None
    if member is None and is_index(file):
        published = [each for each in snapshot.files if each.name == folder + file]
        index = source.fetch(snapshot, published, known=known, progress=False)[0].path
        names = list(read_index_at(index, name=file).tensors)
        snapshot = source.with_siblings(snapshot, [folder + each for each in names])
    published = [each for each in (snapshot.file(folder + name) for name in names) if each is not None]
    if missing := [each for each in names if snapshot.file(folder + each) is None]:
        if index is None:
            raise CheckpointNotFoundError(ref.shown, f"{shown_uri(ref.uri)} has no file {folder + file!r}.")
        where = f"{shown_uri(snapshot.uri)}/{folder}{file}"
        raise CorruptModelCheckpointError(
            where, f"{where}: expected the file {missing[0]!r} beside it, found none. Ask its publisher for it."
        )

    fetched = source.fetch(snapshot, published, known=known, progress=progress)
    copies = [
        _readable(found, shard_name, source, store, member=member, cache=settings.cache_dir, restrict=restrict)
        for found, shard_name in zip(fetched, names, strict=True)
    ]
    if index is None:
        place = copies[0].path
        manifest = formats.index(place, member=member if place == fetched[0].path else None, restrict=restrict)
        manifest = replace(manifest, shards=(replace(manifest.shards[0], name=names[0]),))
    else:
        places = {copy.file: copy.path for copy in copies}
        manifest = index_shards(index, name=file, shards=places, restrict=restrict)

    shards, originals, checks = [], [], []
    for shard, stated, found, copy in zip(manifest.shards, published, fetched, copies, strict=True):
        rewritten = copy.path != found.path
        shards.append(replace(shard, sha256=None if rewritten else stated.sha256))
        checks.append(fetched_check(found, str(found.path) if rewritten else shard.name, stated.sha256))
        if rewritten:
            originals.append(extra_copy(found, source))
            checks.append(replace(checks[-1], file=shard.name, method=ORIGINAL))

    return FetchedCheckpoint(
        manifest=replace(manifest, shards=tuple(shards)),
        revision=snapshot.revision,
        hf_config=hf_config,
        inner=source.inner,
        snapshot=snapshot,
        files=tuple(ShardFile(path=copy.path, stat=copy.stat) for copy in copies),
        copies=[*copies, *originals],
        checks=checks,
    )


def not_streamed_error(name: str, where: str) -> NotSupportedError:
    """Create the error for a checkpoint that has to be fetched first, but is to be streamed."""
    return NotSupportedError(
        f"{where}: expected safetensors files to stream, found a file of `torch.save` or an archive, whose tensors are "
        f"known only after a download. Fetch it by `lading pull {name}`, and load it without `stream`."
    )


def _readable(
    fetched: FetchedFile,
    name: str,
    source: Source,
    store: AssetStore | None,
    *,
    member: str | None,
    cache: Path,
    restrict: bool,
) -> LocalCopy:
    """Return the copy of a file, or of its rewrite, under the name of its shard."""
    before = formats.rewritten(fetched.path, member=member, cache=cache)
    if before is not None and not _is_good(before, store):
        before.unlink(missing_ok=True)
    path = formats.readable(fetched.path, member=member, cache=cache, restrict=restrict)
    kind = source.kind if path == fetched.path else "cache"

    return LocalCopy(file=name, path=path, stat=FileStat.from_stat(path.stat()), kind=kind, verified_at=now())


def _is_good(path: Path, store: AssetStore | None) -> bool:
    """Return whether the rewrite of a file is as it was when it was made. It has no published digest, only a record in
    the catalog; if that cannot keep one, this accepts the rewrite, as otherwise every load would make it again.
    """
    if store is None or not store.database.writable:
        return True
    with BestEffort("the catalog cannot say whether %s is good, so it is made again", path):
        return store.is_verified(path)
    return False
