"""Checkpoints elsewhere whose tensors are only known once their bytes are here: what ``torch.save`` wrote, archives.

The place of each tensor in such a file is told by parts of it that lie at its end, or anywhere: it is fetched first,
and indexed then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from lading import formats
from lading.card import CheckpointRef
from lading.catalog.provenance import now
from lading.catalog.records import Check, LocalCopy
from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.fetch.source import Known
from lading.fetch.sources import HTTP_SCHEMES, HUB_SCHEMES, open_source
from lading.filesystem import FileStat
from lading.formats.folder import is_index, is_torch_format
from lading.manifest import Manifest, Shard
from lading.settings import Settings

_ARCHIVE = ".tar"


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A checkpoint that was fetched to be known."""

    manifest: Manifest
    revision: str
    copy: LocalCopy
    check: Check


def comes_whole(ref: CheckpointRef) -> bool:
    """Whether the checkpoint is to be fetched before it can be indexed, by the names in its address."""
    if ref.scheme not in (*HTTP_SCHEMES, *HUB_SCHEMES):
        return False

    path = PurePosixPath(urlsplit(ref.uri).path if ref.path is None else f"{urlsplit(ref.uri).path}/{ref.path}")

    return any(part.endswith(_ARCHIVE) for part in path.parts) or (
        is_torch_format(path.name) and not is_index(path.name)
    )


def fetch_whole(ref: CheckpointRef, *, known: Known, progress: bool, revision: str | None = None) -> Whole:
    """Fetch the file of a checkpoint, and index it.

    :param known: where content is on this machine already.
    :param revision: default: the one that the address names, or what is published now.

    :raises CheckpointNotFoundError: the source has no such file, or the archive no such member.
    :raises FetchError: it cannot be reached, or answers nonsense.
    :raises DigestMismatchError: what came is not what is published.
    :raises CorruptModelCheckpointError: what came breaks the rules of its format.
    :raises PolicyError: it would import what a state dict does not need.
    :raises NotSupportedError: a format that is not read here.
    """
    settings = Settings.from_environment()
    inner, member = _split(ref)
    source = open_source(ref.uri, inner_path=inner, revision=revision, settings=settings)
    snapshot = source.snapshot()
    name, member = _file_of(source.inner, member)
    file = snapshot.file(name)
    if file is None:
        raise CheckpointNotFoundError(ref.key, f"{ref.uri} has no file {name!r}.")

    (fetched,) = source.fetch(snapshot, [file], known=known, progress=progress)
    path = formats.readable(fetched.path, member=member, cache=settings.cache_dir)
    in_place = path == fetched.path
    manifest = formats.index(path, member=member if in_place else None)
    (shard,) = manifest.shards
    published = file.sha256 if in_place else None

    return Whole(
        manifest=replace(manifest, shards=(Shard(name=name, size=shard.size, sha256=published),)),
        revision=snapshot.revision,
        copy=LocalCopy(
            file=name,
            path=path,
            stat=FileStat.from_stat(path.stat()),
            kind="cache" if not in_place else source.kind if fetched.own else "adopted",
            verified_at=now(),
        ),
        check=Check(
            file=name, path=fetched.path, stat=fetched.stat, method="sha256", expected=file.sha256, found=fetched.sha256
        ),
    )


def _split(ref: CheckpointRef) -> tuple[str | None, str | None]:
    """The path inside the source, and the member of the archive there, where the address itself is one."""
    if ref.path is not None and urlsplit(ref.uri).path.endswith(_ARCHIVE):
        return None, ref.path

    return ref.path, None


def _file_of(inner: str | None, member: str | None) -> tuple[str, str | None]:
    """The file within the source, and the member of it that is the checkpoint, if it is an archive."""
    if inner is None:
        raise NotSupportedError("Expected the path of a file within the source, found none.")
    if member is not None:
        return inner, member

    parts = PurePosixPath(inner).parts
    for i, part in enumerate(parts[:-1]):
        if part.endswith(_ARCHIVE):
            return "/".join(parts[: i + 1]), "/".join(parts[i + 1 :])

    return inner, None
