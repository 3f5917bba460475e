"""Checkpoints as sources publish them: what one holds, by its index and headers, before anything is fetched."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from lading.card import CheckpointRef, shown_uri
from lading.errors import FetchError
from lading.fetch.source import RemoteFile, Snapshot, Source
from lading.fetch.sources import open_source
from lading.formats.config_json import parse_config_json, require_size
from lading.formats.folder import is_checkpoint_file
from lading.formats.remote import index_files, index_names
from lading.manifest import Manifest
from lading.settings import Settings

CONFIG_NAME = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A checkpoint as a source publishes it."""

    manifest: Manifest
    """With the SHA-256 of each shard, where the source publishes it."""
    revision: str
    """The commit that it is of; empty where the source has none."""
    hf_config: Mapping[str, object]
    """The ``config.json`` beside it; empty where there is none."""
    inner: str | None
    """The checkpoint within the source, a file or a folder; ``None``: the source as a whole."""
    snapshot: Snapshot


def index_source(ref: CheckpointRef, *, revision: str | None = None) -> Published:
    """Read index and headers of a checkpoint that is elsewhere.

    :param revision: default: the one that the address names, or what is published now.

    :raises CheckpointNotFoundError: the source says that there is no such thing.
    :raises FetchError: it cannot be reached, or answers nonsense.
    :raises CorruptModelCheckpointError: an index or a header breaks the rules of its format.
    :raises NotByHeadersError: it was written by ``torch.save``, and is to be fetched first (:mod:`lading.whole`).
    :raises NotSupportedError: a scheme, or a format, that is not read here.
    """
    source = open_source(ref.uri, inner_path=ref.path, revision=revision, settings=Settings.from_environment())
    snapshot = source.snapshot()
    if not source.lists:
        named = index_names(PublishedFiles(source, snapshot), name=source.inner)
        snapshot = source.beside(snapshot, named)
    files = PublishedFiles(source, snapshot)
    manifest = index_files(files, name=source.inner)

    folder = name_in_source(source.inner, "", shards=[shard.name for shard in manifest.shards])
    digests = {file.name: file.sha256 for file in snapshot.files}
    shards = tuple(replace(shard, sha256=digests[folder + shard.name]) for shard in manifest.shards)

    return Published(
        manifest=replace(manifest, shards=shards),
        revision=snapshot.revision,
        hf_config=published_config(files, folder),
        inner=source.inner,
        snapshot=snapshot,
    )


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


class PublishedFiles:
    """The files of a source, as formats read them."""

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
        return self._source.read(self._snapshot, self.file(name), offset, size)

    def file(self, name: str) -> RemoteFile:
        return self._files[name]


def published_config(files: PublishedFiles, folder: str) -> Mapping[str, object]:
    """Return what the ``config.json`` in a folder of a source says; nothing where there is none.

    :raises CorruptModelCheckpointError: it is too large, or is not a JSON object.
    """
    name = folder + CONFIG_NAME
    size = (files.file(name).size or 0) if name in files.names() else 0
    if not size:
        return {}

    label = f"{files.label}/{name}"
    require_size(size, label=label)

    return parse_config_json(files.read(name, 0, size), label=label)
