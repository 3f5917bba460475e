"""Checkpoints as sources publish them: the manifest from index and headers, without a download."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from lading.cards.card import CheckpointRef
from lading.errors import CheckpointNotFoundError, FetchError
from lading.formats.config_json import CONFIG_NAME, parse_config_json, require_size
from lading.formats.folder import FILE_NAME, is_checkpoint_file, is_index, some_names
from lading.formats.manifest import Manifest, Shard
from lading.formats.remote import find_checkpoint, index_files, index_names
from lading.sources.hub.address import HubAddress
from lading.sources.open import open_source
from lading.sources.source import RemoteFile, Snapshot, Source, read_bytes
from lading.system.settings import Settings
from lading.system.uris import shown_uri


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedCheckpoint:
    """A checkpoint as a source publishes it."""

    manifest: Manifest
    """The manifest, with the SHA-256 of each shard if the source publishes it."""
    revision: str
    """The commit of the source; empty if it has no commits."""
    hf_config: Mapping[str, object]
    """The ``config.json`` beside it; empty without such a file."""
    inner: str | None
    """The checkpoint within the source, a file or a folder; ``None``: the source as a whole."""
    snapshot: Snapshot


def index_source(
    ref: CheckpointRef, *, settings: Settings, revision: str | None = None, name: str | None = None
) -> PublishedCheckpoint:
    """Read index and headers of a remote checkpoint.

    :param revision: default: the one that the address names, or the current one.
    :param name: the name of the card, for messages.

    :raises CheckpointNotFoundError: the source has no such file or repository.
    :raises FetchError: it cannot be reached, or answers nonsense.
    :raises CorruptModelCheckpointError: an index or a header breaks the rules of its format.
    :raises NotByHeadersError: ``torch.save`` wrote it, so it has to be fetched first
        (:mod:`lading.checkpoints.fetch_to_index`).
    :raises NotSupportedError: a scheme, or a format, that lading does not read.
    """
    source = open_source(ref.uri, inner_path=ref.path, revision=revision, settings=settings)
    snapshot = source.snapshot()
    if not source.lists:
        named = index_names(PublishedFiles(source, snapshot), name=source.inner)
        snapshot = source.with_siblings(snapshot, named)
    require_complete(source, snapshot, ref, name)
    files = PublishedFiles(source, snapshot)
    manifest = index_files(files, name=source.inner)

    folder = name_in_source(source.inner, "", shards=[shard.name for shard in manifest.shards])
    published = {file.name: file for file in snapshot.files}
    shards = tuple(_identified(shard, published[folder + shard.name], snapshot) for shard in manifest.shards)

    return PublishedCheckpoint(
        manifest=replace(manifest, shards=shards),
        revision=snapshot.revision,
        hf_config=published_config(files, folder),
        inner=source.inner,
        snapshot=snapshot,
    )


def _identified(shard: Shard, file: RemoteFile, snapshot: Snapshot) -> Shard:
    """Return the shard with what shows later that its content is the same: a digest, or else the validator."""
    pinned = bool(snapshot.revision) or file.sha256 is not None

    return replace(shard, sha256=file.sha256, validator=None if pinned else file.etag)


_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


def require_complete(source: Source, snapshot: Snapshot, ref: CheckpointRef, name: str | None) -> None:
    """Check that all files of a checkpoint are in the cache, if the source may not be asked for others.

    :param name: the name of the card, for messages.

    :raises FetchError: some are not; the message names them, and the command that fetches them.
    """
    if not snapshot.partial:
        return
    here = frozenset(file.name for file in snapshot.files)
    try:
        folder, file = find_checkpoint(ref.shown, here, source.inner)
    except CheckpointNotFoundError:
        missing = _expected(here, source.inner)
    else:
        named = index_names(PublishedFiles(source, snapshot), name=folder + file) if is_index(file) else ()
        missing = [each for each in (name_in_source(folder + file, each) for each in named) if each not in here]
    if missing:
        fetch = f"lading pull {name or ref.shown}"
        if not name and snapshot.revision:
            fetch = f"hf download {HubAddress.from_uri(ref.uri).repo} --revision {snapshot.revision}"
        part = f"the revision {snapshot.revision}" if snapshot.revision else "it"
        raise FetchError(
            f"{ref.shown}: only a part of {part} is on this machine, and LADING_OFFLINE or HF_HUB_OFFLINE is set, so "
            f"the rest is not known. Missing: {some_names(missing)}. Run `{fetch}` where there is a network."
        )


def _expected(here: Collection[str], inner: str | None) -> list[str]:
    """Return the files that a checkpoint without its first file should have, by the names of the others."""
    if inner is not None and is_checkpoint_file(inner):
        return [inner]
    folder = "" if inner is None else f"{inner.strip('/')}/"
    for each in sorted(here):
        match = _SHARD.fullmatch(each.removeprefix(folder))
        if match is not None and each.startswith(folder):
            stem, count, suffix = match["stem"], match["count"], match["suffix"]
            shards = [f"{folder}{stem}-{n:05d}-of-{count}{suffix}" for n in range(1, min(int(count), 1000) + 1)]
            return [name for name in (*shards, f"{folder}{stem}{suffix}.index.json") if name not in here]

    return [f"{folder}{FILE_NAME}"]


def name_in_source(inner: str | None, file: str, *, shards: Collection[str] = ()) -> str:
    """Return the name within the source of a file of the checkpoint.

    :param inner: the checkpoint within the source: a file, or a folder.
    :param shards: the names of its files, beside one another; a file whose name has no known suffix is one of them.
    """
    if inner is None:
        return file
    folder, _, last = inner.rpartition("/")
    if not is_checkpoint_file(inner) and last not in shards:
        folder = inner.strip("/")

    return f"{folder}/{file}" if folder else file


def recorded_files(shards: Sequence[Shard], *, inner: str | None) -> tuple[RemoteFile, ...]:
    """Return the files of an indexed checkpoint as its source had them then, so that other content is refused.

    :param inner: the checkpoint within the source.
    """
    names = [shard.name for shard in shards]

    return tuple(
        RemoteFile(
            name=name_in_source(inner, shard.name, shards=names),
            size=shard.size,
            sha256=shard.sha256,
            # The digest of the bytes decides, if it is known: a server may give the same ones another validator.
            etag=None if shard.sha256 is not None else shard.validator,
        )
        for shard in shards
    )


class PublishedFiles:
    """The files of a source, with the interface that formats read."""

    def __init__(self, source: Source, snapshot: Snapshot) -> None:
        self._source = source
        self._snapshot = snapshot
        self._files = {file.name: file for file in snapshot.files}

    @property
    def label(self) -> str:
        return shown_uri(self._snapshot.uri)

    def names(self) -> Collection[str]:
        return self._files

    def size(self, name: str) -> int:
        size = self.file(name).size
        if size is None:
            raise FetchError(
                f"{self.label}: the server does not say how many bytes {name} has, and its header is not read without "
                "that. Have it served with a Content-Length."
            )

        return size

    def read(self, name: str, offset: int, size: int) -> bytes:
        return read_bytes(self._source, self._snapshot, self.file(name), offset, size)

    def file(self, name: str) -> RemoteFile:
        return self._files[name]


def published_config(files: PublishedFiles, folder: str) -> Mapping[str, object]:
    """Return the ``config.json`` in a folder of a source; empty if it does not exist.

    :raises CorruptModelCheckpointError: it is too large, or is not a JSON object.
    """
    name = folder + CONFIG_NAME
    size = (files.file(name).size or 0) if name in files.names() else 0
    if not size:
        return {}

    label = f"{files.label}/{name}"
    require_size(size, label=label)

    return parse_config_json(files.read(name, 0, size), label=label)
