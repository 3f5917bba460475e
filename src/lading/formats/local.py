"""Checkpoint formats: each of them differs from the others only in how it gives a manifest.

The doors are :func:`index`, for what is on this machine, and :func:`index_files`, for what is anywhere. They need
neither torch nor the safetensors package, and run nothing that a file names.
"""

from __future__ import annotations

from pathlib import Path

from lading.errors import LadingError
from lading.formats.any_format import read_part, read_tensors
from lading.formats.files import open_regular
from lading.formats.folder import FILE_NAME, INDEX_NAME, checkpoint_file, is_index
from lading.formats.manifest import Manifest, Shard
from lading.formats.rank_parts import (
    consolidated_parts,
    fairseq2_parts,
    index_consolidated,
    index_fairseq2_sharded,
    is_consolidated,
    is_fairseq2_sharded,
)
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
    "archive_of",
    "index",
    "index_files",
    "is_rewritten",
    "readable",
    "rewritten",
    "rewritten_files",
]

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def index(path: Path | str, *, member: str | None = None, cache: Path | None = None, restrict: bool = True) -> Manifest:
    """The manifest of the checkpoint at ``path``, with its columns in the order (shard, offset).

    :param path: a file of safetensors or of ``torch.save`` (its first bytes tell which, whatever its name), the index
        of several, an uncompressed tar archive, or a folder with one of these under its usual name, the first that is
        there: ``model.safetensors.index.json``, ``model.safetensors``, ``consolidated.00.pth`` and its like,
        ``pp_00/tp_00/sdp_00.pt`` and its like, ``pytorch_model.bin.index.json``, ``pytorch_model.bin``. Symbolic links
        are followed, as long as they lead to regular files. A path may lead on into an archive: ``a.tar/b/model.pt``.
    :param member: the name of the checkpoint in the archive at ``path``, of which the manifest's offsets are.
    :param cache: a folder to rewrite the checkpoint in, once, if its tensors are no ranges of bytes. The manifest is
        then the one of what :func:`readable` names: a safetensors file, or the index of several.
    :param restrict: refuse a file of ``torch.save`` that names anything that a state dict does not need. Where it is
        not set, such objects are passed over; what they name is imported in neither case. No card can loosen it: that
        takes this argument.

    :raises CheckpointNotFoundError: nothing is at ``path``, or no checkpoint is in that folder or archive.
    :raises NotSupportedError: what is there is of a format that is not read here, or has tensors that are not.
    :raises CorruptModelCheckpointError: a file breaks the rules of its format, or changed while it was read; one that
        the index names is missing; or what is at ``path`` is neither a folder nor a regular file.
    :raises RefusedPickleError: a file of ``torch.save`` would import what a state dict does not need.
    :raises ModelCheckpointError: a file cannot be rewritten within the limits of time and memory.
    :raises OSError: a file cannot be read, for want of a permission say.
    """
    path, member = _split(Path(path), member)
    try:
        return _index(path, member, restrict)
    except NonContiguousError:
        if cache is None:
            raise

    return _index(_rewritten(path, member, cache, restrict), None, restrict)


def readable(path: Path | str, *, member: str | None = None, cache: Path, restrict: bool = True) -> Path:
    """Where the tensors of the checkpoint at ``path`` are ranges of bytes: there, or in files of the cache.

    Takes and raises what :func:`index` does, which gives the manifest of what is at the returned path (with the same
    ``member``, if it is the same path).
    """
    file, inner = _split(Path(path), member)
    try:
        _index(file, inner, restrict)
    except NonContiguousError:
        return _rewritten(file, inner, cache, restrict)

    return Path(path)


def rewritten(path: Path | str, *, member: str | None = None, cache: Path) -> Path | None:
    """The file of the cache that was made of the checkpoint at ``path`` as it is now; ``None`` where there is none."""
    file, inner = _split(Path(path), member)
    try:
        return _find_rewritten(file, inner, cache)
    except (LadingError, OSError):
        return None


def archive_of(path: Path) -> Path | None:
    """The archive that ``path`` leads into; ``None`` where it is a path as any other."""
    archives = (parent for parent in path.parents if parent.name.lower().endswith(_ARCHIVES))

    return next((archive for archive in archives if archive.is_file()), None)


def _split(path: Path, member: str | None) -> tuple[Path, str | None]:
    archive = archive_of(path) if member is None else None

    return (path, member) if archive is None else (archive, path.relative_to(archive).as_posix())


def _index(path: Path, member: str | None, restrict: bool) -> Manifest:
    if member is not None:
        return _index_member(path, member, restrict)
    if path.is_dir():
        # A link that leads nowhere is listed, too: an index must not be passed over.
        names = {entry.name for entry in path.iterdir()}
        if not names & {INDEX_NAME, FILE_NAME}:
            if is_consolidated(names):
                return index_consolidated(path, restrict=restrict)
            if is_fairseq2_sharded(names):
                return index_fairseq2_sharded(path, restrict=restrict)
        path = path / checkpoint_file(names, where=path, torch=True)
    if is_index(path.name):
        return index_shards(path, restrict=restrict)
    part, kind = read_part(path, restrict=restrict)

    return join([part], kind=kind)


def _index_member(path: Path, member: str, restrict: bool) -> Manifest:
    label = f"{path}[{member}]"
    with open_regular(path) as (file, size):
        base, length = find_member(file, member, size=size, label=str(path))
        shard = Shard(name=path.name, size=size)
        header, kind = read_tensors(file, base=base, size=length, name=member, label=label, restrict=restrict)

    return join([(shard, header)], kind=kind)


def _rewritten(path: Path, member: str | None, cache: Path, restrict: bool) -> Path:
    if member is not None:
        base, size = _place_of(path, member)
        return rewrite.rewrite(path, cache, base=base, size=size, restrict=restrict)

    path = _checkpoint_file(path)
    parts = _parts(path)
    if parts is None:
        return rewrite.rewrite(path, cache, restrict=restrict)
    if is_index(path.name):
        files = [file for file, _ in parts]
        made = {f.name: rewrite.rewrite(f, cache, restrict=restrict) if f.exists() else f for f in files}
        index_shards(path, shards=made)  # which tells whether index and files agree

    return rewrite.rewrite_all(parts, cache, restrict=restrict)


def _find_rewritten(path: Path, member: str | None, cache: Path) -> Path | None:
    if member is not None:
        base, size = _place_of(path, member)
        return rewrite.rewritten(path, cache, base=base, size=size)

    path = _checkpoint_file(path)
    parts = _parts(path)

    return rewrite.rewritten(path, cache) if parts is None else rewrite.rewritten_all(parts, cache)


def _place_of(path: Path, member: str) -> tuple[int, int]:
    """Where a member of an archive begins, and its bytes."""
    with open_regular(path) as (file, size):
        return find_member(file, member, size=size, label=str(path))


def _checkpoint_file(path: Path) -> Path:
    """The file that decides in a folder; the folder itself where all of its files do, and any other path as it is."""
    if not path.is_dir():
        return path
    names = {entry.name for entry in path.iterdir()}
    if is_consolidated(names) or is_fairseq2_sharded(names):
        return path

    return path / checkpoint_file(names, where=path, torch=True)


def _parts(path: Path) -> list[tuple[Path, str]] | None:
    """The files of a checkpoint of several, each with what is put behind the names of its tensors; ``None`` where it is
    one file.
    """
    if is_index(path.name):
        return [(path.parent / name, "") for name in read_index_at(path).tensors]
    if not path.is_dir():
        return None
    consolidated = is_consolidated({entry.name for entry in path.iterdir()})

    return [(path / name, suffix) for name, suffix in (consolidated_parts if consolidated else fairseq2_parts)(path)]
