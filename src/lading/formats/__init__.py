"""Checkpoint formats: each of them differs from the others only in how it gives a manifest.

The door is :func:`index`. It needs neither torch nor the safetensors package.
"""

from __future__ import annotations

import os
from pathlib import Path

from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.formats.safetensors import index_file
from lading.formats.sharded import index_shards
from lading.manifest import Manifest

__all__ = ["index"]

INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"

_INDEX_SUFFIX = ".safetensors.index.json"
_OTHER_FORMATS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".npz", ".onnx",
)  # fmt: skip


def index(path: Path | str) -> Manifest:
    """The manifest of the checkpoint at ``path``, with its columns in the order (shard, offset).

    :param path: a safetensors file, an index of several, or a folder with one of these under its usual name:
        ``model.safetensors.index.json`` or ``model.safetensors``. Where a folder has both, the index decides. Symbolic
        links are followed, as long as they lead to regular files.

    :raises CheckpointNotFoundError: nothing is at ``path``, or no checkpoint is in that folder.
    :raises NotSupportedError: what is there is of a format that is not read here.
    :raises CorruptModelCheckpointError: a file breaks the rules of its format, or changed while it was read; one that
        the index names is missing; or what is at ``path`` is neither a folder nor a regular file.
    :raises OSError: a file cannot be read, for want of a permission say.
    """
    path = Path(path)

    if path.is_dir():
        return _index_folder(path)
    if path.name.endswith(_INDEX_SUFFIX):
        return index_shards(path)
    if path.suffix in _OTHER_FORMATS and path.exists():
        raise _not_supported(path, repr(path.name))

    return index_file(path)


def _index_folder(folder: Path) -> Manifest:
    if _is_listed(folder / INDEX_NAME):
        return index_shards(folder / INDEX_NAME)
    if _is_listed(folder / FILE_NAME):
        return index_file(folder / FILE_NAME)

    names = sorted(entry.name for entry in folder.iterdir())
    if found := [name for name in names if name.endswith((".safetensors", _INDEX_SUFFIX))]:
        raise CheckpointNotFoundError(
            folder,
            f"{folder}: expected {INDEX_NAME} or {FILE_NAME}, found {_some(found)}. To read one of these, give the "
            f"path of the file instead of the folder's.",
        )
    if found := [name for name in names if name.endswith(_OTHER_FORMATS)]:
        raise _not_supported(folder, _some(found))

    raise CheckpointNotFoundError(
        folder, f"{folder}: expected {INDEX_NAME} or {FILE_NAME}, found {_some(names) or 'an empty folder'}."
    )


def _is_listed(path: Path) -> bool:
    """Whether the folder has an entry of that name; a link that leads nowhere is one, and must not be passed over."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False

    return True


def _not_supported(path: Path, found: str) -> NotSupportedError:
    return NotSupportedError(
        f"{path}: expected a safetensors checkpoint, found {found}, of a format that is not read here. Convert it with "
        f"`safetensors.torch.save_file` (transformers: `model.save_pretrained(folder)`)."
    )


def _some(names: list[str]) -> str:
    more = len(names) - 8

    return ", ".join(map(repr, names[:8])) + (f" and {more} more" if more > 0 else "")
