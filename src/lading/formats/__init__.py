"""Checkpoint formats: each of them differs from the others only in how it gives a manifest.

The door is :func:`index`. It needs neither torch nor the safetensors package, and runs nothing that a file names.
"""

from __future__ import annotations

import os
from pathlib import Path

from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.formats import rewrite, safetensors, torch_pt
from lading.formats.files import open_regular
from lading.formats.parts import index_consolidated, index_fairseq2_sharded, is_consolidated, is_fairseq2_sharded
from lading.formats.safetensors import index_file
from lading.formats.sharded import index_shards
from lading.formats.tar import find_member
from lading.manifest import Manifest, Shard

__all__ = ["index", "readable"]

INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"

_BIN_INDEX_NAME = "pytorch_model.bin.index.json"
_BIN_NAME = "pytorch_model.bin"

_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_OTHER_FORMATS = (".pkl", ".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".npz", ".onnx")


def index(path: Path | str, *, member: str | None = None, cache: Path | None = None, restrict: bool = True) -> Manifest:
    """The manifest of the checkpoint at ``path``, with its columns in the order (shard, offset).

    :param path: a file of safetensors or of ``torch.save`` (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), the index of
        several, an uncompressed tar archive, or a folder with one of these: the first that is there of
        ``model.safetensors.index.json``, ``model.safetensors``, ``consolidated.00.pth`` and its like,
        ``pp_00/tp_00/sdp_00.pt`` and its like, ``pytorch_model.bin.index.json`` and ``pytorch_model.bin``. Symbolic
        links are followed, as long as they lead to regular files.
    :param member: the name of the checkpoint in the archive at ``path``, whose offsets are then the manifest's.
    :param cache: a folder to rewrite the checkpoint in, once, if its tensors are no ranges of bytes. The manifest is
        then the one of that file, which :func:`readable` names.
    :param restrict: refuse a file of ``torch.save`` that names anything that a state dict does not need. Where it is
        not set, such objects are passed over; what they name is imported in neither case. There is no way from one to
        the other but this argument.

    :raises CheckpointNotFoundError: nothing is at ``path``, or no checkpoint is in that folder or archive.
    :raises NotSupportedError: what is there is of a format that is not read here, or has tensors that are not.
    :raises CorruptModelCheckpointError: a file breaks the rules of its format, or changed while it was read; one that
        the index names is missing; or what is at ``path`` is neither a folder nor a regular file.
    :raises PolicyError: a file of ``torch.save`` would import what a state dict does not need.
    :raises ModelCheckpointError: a file cannot be rewritten within the limits of time and memory.
    :raises OSError: a file cannot be read, for want of a permission say.
    """
    path = Path(path)
    try:
        return _index(path, member, restrict)
    except torch_pt.NonContiguousError:
        if cache is None:
            raise

    return index_file(_rewritten(path, member, cache, restrict))


def readable(path: Path | str, *, member: str | None = None, cache: Path, restrict: bool = True) -> Path:
    """Where the tensors of the checkpoint at ``path`` are ranges of bytes: there, or in a file of the cache.

    Takes and raises what :func:`index` does. :func:`index` gives the manifest of what is at the returned path (with the
    same ``member``, if it is the same path).
    """
    path = Path(path)
    try:
        _index(path, member, restrict)
    except torch_pt.NonContiguousError:
        return _rewritten(path, member, cache, restrict)

    return path


def _index(path: Path, member: str | None, restrict: bool) -> Manifest:
    if member is not None:
        return _index_member(path, member, restrict)
    if path.is_dir():
        return _index_folder(path, restrict)
    if path.name.endswith(_INDEX_SUFFIXES):
        return index_shards(path, restrict=restrict)
    if path.suffix in _TORCH:
        return torch_pt.index_file(path, restrict=restrict)
    if path.suffix in _OTHER_FORMATS and path.exists():
        raise _not_supported(path, repr(path.name))
    if path.suffix == ".tar" and path.exists():
        raise NotSupportedError(f"{path}: expected the name of a member of this archive, found none given.")

    return index_file(path)


def _index_folder(folder: Path, restrict: bool) -> Manifest:
    if _is_listed(folder / INDEX_NAME):
        return index_shards(folder / INDEX_NAME)
    if _is_listed(folder / FILE_NAME):
        return index_file(folder / FILE_NAME)
    if is_consolidated(folder):
        return index_consolidated(folder, restrict=restrict)
    if is_fairseq2_sharded(folder):
        return index_fairseq2_sharded(folder, restrict=restrict)
    if _is_listed(folder / _BIN_INDEX_NAME):
        return index_shards(folder / _BIN_INDEX_NAME, restrict=restrict)
    if _is_listed(folder / _BIN_NAME):
        return torch_pt.index_file(folder / _BIN_NAME, restrict=restrict)

    names = sorted(entry.name for entry in folder.iterdir())
    if found := [name for name in names if name.endswith((".safetensors", *_INDEX_SUFFIXES, *_TORCH))]:
        raise CheckpointNotFoundError(
            folder,
            f"{folder}: expected {INDEX_NAME}, {FILE_NAME} or another usual name, found {_some(found)}. To read one of "
            f"these, give the path of the file instead of the folder's.",
        )
    if found := [name for name in names if name.endswith(_OTHER_FORMATS)]:
        raise _not_supported(folder, _some(found))

    raise CheckpointNotFoundError(
        folder, f"{folder}: expected {INDEX_NAME} or {FILE_NAME}, found {_some(names) or 'an empty folder'}."
    )


def _index_member(path: Path, member: str, restrict: bool) -> Manifest:
    label = f"{path}[{member}]"
    with open_regular(path) as (file, size):
        base, length = find_member(file, member, size=size, label=str(path))
        shard = Shard(name=path.name, size=size)
        if not member.endswith(_TORCH):
            header = safetensors.read_header_at(file, base=base, size=length, label=label)
            return safetensors.manifest_of(shard, header)
        placed = torch_pt.place_tensors(file, base=base, size=length, label=label, restrict=restrict)

    return torch_pt.manifest_of(placed, shard, label=label)


def _rewritten(path: Path, member: str | None, cache: Path, restrict: bool) -> Path:
    if member is not None:
        with open_regular(path) as (file, size):
            base, length = find_member(file, member, size=size, label=str(path))
        return rewrite.rewrite(path, cache, base=base, size=length, restrict=restrict)
    if path.is_dir() and _is_listed(path / _BIN_NAME) and not is_consolidated(path):
        path = path / _BIN_NAME
    if path.suffix not in _TORCH:
        raise NotSupportedError(
            f"{path}: expected tensors in row-major order, found one of another order in a checkpoint of several "
            "files. Only a checkpoint of one file is rewritten; load this one with torch, and save it as safetensors."
        )

    return rewrite.rewrite(path, cache, restrict=restrict)


def _is_listed(path: Path) -> bool:
    """Whether the folder has an entry of that name; a link that leads nowhere is one, and must not be passed over."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False

    return True


def _not_supported(path: Path, found: str) -> NotSupportedError:
    return NotSupportedError(
        f"{path}: expected a checkpoint of safetensors or of `torch.save`, found {found}, of a format that is not read "
        f"here. Convert it with `safetensors.torch.save_file` (transformers: `model.save_pretrained(folder)`)."
    )


def _some(names: list[str]) -> str:
    more = len(names) - 8

    return ", ".join(map(repr, names[:8])) + (f" and {more} more" if more > 0 else "")
