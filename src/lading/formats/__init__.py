"""Checkpoint formats: each of them differs from the others only in how it gives a manifest.

The doors are :func:`index`, for what is on this machine, and :func:`index_files`, for what is anywhere. They need
neither torch nor the safetensors package.
"""

from __future__ import annotations

from pathlib import Path

from lading.formats.folder import FILE_NAME, INDEX_NAME, checkpoint_file, is_index, is_other_format, not_supported
from lading.formats.remote import Files, index_files
from lading.formats.safetensors import index_file
from lading.formats.sharded import index_shards
from lading.manifest import Manifest

__all__ = ["FILE_NAME", "INDEX_NAME", "Files", "index", "index_files"]


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
        # A link that leads nowhere is listed, too: an index must not be passed over.
        path = path / checkpoint_file((entry.name for entry in path.iterdir()), where=path)
    if is_index(path.name):
        return index_shards(path)
    if is_other_format(path.name) and path.exists():
        raise not_supported(path, repr(path.name))

    return index_file(path)
