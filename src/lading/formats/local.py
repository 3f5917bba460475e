"""The public functions of this package: the manifest of a checkpoint of any format.

:func:`index` reads local checkpoints, and :func:`index_files` remote ones. They need neither torch nor the safetensors
package, and never run code that a file names.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from lading.errors import CheckpointNotFoundError, LadingError
from lading.formats.any_format import read_part, read_tensors
from lading.formats.distributed_checkpoint import index_distributed
from lading.formats.files import open_regular
from lading.formats.first_bytes import SIZE, is_tar, is_torch
from lading.formats.folder import (
    FILE_NAME,
    INDEX_NAME,
    METADATA_NAME,
    checkpoint_file,
    container_of,
    folder_of,
    is_index,
    nested,
)
from lading.formats.manifest import Manifest, Shard
from lading.formats.rank_parts import index_parts, part_files
from lading.formats.remote import Files, NotByHeadersError, index_files
from lading.formats.safetensors import join
from lading.formats.shard_index import index_shards, read_index_at
from lading.formats.tar import find_member
from lading.formats.torch_save import rewrite
from lading.formats.torch_save.reader import NonContiguousError
from lading.formats.torch_save.rewrite import is_rewritten, rewritten_files

__all__ = [
    "FILE_NAME",
    "INDEX_NAME",
    "Files",
    "NonContiguousError",
    "NotByHeadersError",
    "container_of",
    "index",
    "folder_of",
    "index_files",
    "is_rewritten",
    "nested",
    "originals",
    "readable",
    "rewritten",
    "rewritten_files",
]

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def index(path: Path | str, *, member: str | None = None, cache: Path | None = None, restrict: bool = True) -> Manifest:
    """Return the manifest of the checkpoint at ``path``, in the order (shard, offset).

    :param path: a file of safetensors or of ``torch.save`` (by its first bytes, not its name), the index of several
        files, a path into an uncompressed tar archive (``a.tar/b/model.pt``), to a nested state dict
        (``checkpoint.pt/ema.module``), or a folder. In a folder, the first of
        these is read: ``model.safetensors.index.json``, ``model.safetensors``, ``consolidated.00.pth`` and following,
        ``pp_00/tp_00/sdp_00.pt`` and following, ``.metadata`` of ``torch.distributed.checkpoint``,
        ``pytorch_model.bin.index.json``, ``pytorch_model.bin``. Symbolic links to regular files are followed.
    :param member: the name of the checkpoint in the archive at ``path``, or the dotted path of its state dict in the
        file there; the manifest's offsets are in that file.
    :param cache: a folder in which to rewrite the checkpoint, once, if its tensors are not contiguous. The manifest is
        then that of the result of :func:`readable`: a safetensors file, or the index of several.
    :param restrict: whether to refuse a file of ``torch.save`` that names anything that a state dict does not need;
        else such objects are skipped. They are never imported. Only this argument can loosen the rule, no card can.

    :raises CheckpointNotFoundError: ``path`` does not exist, or is a folder or archive without a checkpoint.
    :raises NotSupportedError: the format, or a tensor, is not supported.
    :raises CorruptModelCheckpointError: a file breaks the rules of its format, or changed while it was read; a file
        that the index names is missing; or ``path`` is neither a folder nor a regular file.
    :raises RefusedPickleError: a file of ``torch.save`` would import something that a state dict does not need.
    :raises ModelCheckpointError: a file cannot be rewritten within the limits of time and memory.
    :raises OSError: a file cannot be read, for example without permission.
    """
    path, member = _split(Path(path), member)
    try:
        return _index(path, member, restrict)
    except NonContiguousError:
        if cache is None:
            raise

    return _index(_rewritten(path, member, cache, restrict), None, restrict)


def readable(path: Path | str, *, member: str | None = None, cache: Path, restrict: bool = True) -> Path:
    """Return the path with contiguous tensors of the checkpoint: ``path``, or that of a rewritten file in the cache.

    The parameters and errors are those of :func:`index`, which returns the manifest of the returned path (given the
    same ``member``, if it is the same path).
    """
    file, inner = _split(Path(path), member)
    try:
        _index(file, inner, restrict)
    except NonContiguousError:
        return _rewritten(file, inner, cache, restrict)

    return Path(path)


def originals(path: Path | str) -> list[Path]:
    """Return the files that hold the tensors of the torch checkpoint at ``path``; raises what :func:`index` does."""
    return [original.path for original in _originals(*_split(Path(path), None))[1]]


def rewritten(path: Path | str, *, member: str | None = None, cache: Path) -> Path | None:
    """Return the rewritten file in the cache for the current checkpoint at ``path``; ``None`` without one."""
    try:
        file, found = _originals(*_split(Path(path), member))
        if found[0].path == file:
            return rewrite.rewritten(found[0], cache)
        return rewrite.rewritten_all(found, cache)
    except (LadingError, OSError):
        return None


def _split(path: Path, member: str | None) -> tuple[Path, str | None]:
    container = container_of(path) if member is None else None
    if container is None:
        return path, member
    outer = container.parent if container.name == METADATA_NAME and container not in path.parents else container

    return container, path.relative_to(outer).as_posix()


def _index(path: Path, member: str | None, restrict: bool) -> Manifest:
    if member is not None:
        return _index_member(path, member, restrict)
    path, parts = _find(path)
    if parts:
        return index_parts(path, parts, restrict=restrict)
    if path.name == METADATA_NAME:
        return index_distributed(path.parent, restrict=restrict)
    if is_index(path.name):
        return index_shards(path, restrict=restrict)

    return join([read_part(path, restrict=restrict)])


def _index_member(path: Path, member: str, restrict: bool) -> Manifest:
    if path.name == METADATA_NAME:
        return index_distributed(path.parent, restrict=restrict, state_dict=member)

    with open_regular(path) as (file, size):
        shard = Shard(name=path.name, size=size)
        if _is_archive(file, path, member):
            base, length = find_member(file, member, size=size, label=str(path))
            label = f"{path}[{member}]"
            header = read_tensors(file, base=base, size=length, name=member, label=label, restrict=restrict)
        else:
            header = read_tensors(
                file, base=0, size=size, name=path.name, label=str(path), restrict=restrict, state_dict=member
            )

    return join([(shard, header)])


def _is_archive(file: BinaryIO, path: Path, member: str) -> bool:
    """Return whether a file that ``member`` is inside of holds files, and not state dicts.

    :raises CheckpointNotFoundError: it holds neither.
    """
    file.seek(0)
    head = file.read(SIZE)
    if is_torch(head):
        return False
    if is_tar(head) or path.name.lower().endswith(_ARCHIVES):
        return True

    raise CheckpointNotFoundError(
        path / member,
        f"{path / member}: expected {path.name} to be an archive or a file of `torch.save`, found a file of another "
        "format, which holds one checkpoint or none. Name the file alone.",
    )


def _find(path: Path) -> tuple[Path, list[tuple[str, str]]]:
    """Return the file of a folder to read first; or the folder, and the files in it that ranks saved."""
    if not path.is_dir():
        return path, []
    # Broken links are listed, too, so that a broken index is an error and not skipped.
    names = {entry.name for entry in path.iterdir()}
    if not names & {INDEX_NAME, FILE_NAME} and (parts := part_files(path, names)):
        return path, parts

    return path / checkpoint_file(names, where=path, torch=True), []


def _rewritten(path: Path, member: str | None, cache: Path, restrict: bool) -> Path:
    file, found = _originals(path, member)
    if found[0].path == file:
        return rewrite.rewrite(found[0], cache, restrict=restrict)
    if is_index(file.name):
        made = {
            each.path.name: rewrite.rewrite(each, cache, restrict=restrict) if each.path.exists() else each.path
            for each in found
        }
        index_shards(file, shards=made)  # raises if index and files disagree

    return rewrite.rewrite_all(found, cache, restrict=restrict)


def _originals(path: Path, member: str | None) -> tuple[Path, list[rewrite.Original]]:
    """Return the file to read first, and those that hold the tensors: that one, or several of an index or of ranks."""
    if member is not None:
        with open_regular(path) as (file, size):
            if not _is_archive(file, path, member):
                return path, [rewrite.Original(path, state_dict=member)]
            base, length = find_member(file, member, size=size, label=str(path))
        return path, [rewrite.Original(path, base=base, size=length)]

    path, parts = _find(path)
    if parts:
        return path, [rewrite.Original(path / name, suffix=suffix) for name, suffix in parts]
    if is_index(path.name):
        return path, [rewrite.Original(path.parent / name) for name in read_index_at(path).tensors]

    return path, [rewrite.Original(path)]
