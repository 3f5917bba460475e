"""Local paths and ``file://`` URIs: nothing to fetch, only to find."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from lading.errors import CheckpointNotFoundError, PolicyError


def local_checkpoint(path: Path, *, inner_path: str | None = None) -> Path:
    """``path``, or ``inner_path`` below it, if something is there.

    :raises CheckpointNotFoundError: nothing is (also a ``FileNotFoundError``).
    :raises PolicyError: ``inner_path`` leads out of ``path``.
    """
    if inner_path is not None:
        inner = PurePosixPath(inner_path)
        if inner.is_absolute() or ".." in inner.parts or "\0" in inner_path:
            raise PolicyError(f"`checkpoint_path` must be a path inside the checkpoint, but is {inner_path!r}.")
        path = path / inner

    # What a path means that leads on into a file, the file's format tells.
    if not path.exists() and not any(parent.is_file() for parent in path.parents):
        raise CheckpointNotFoundError(path, f"No checkpoint is at {path}: there is no such file or folder.")

    return path
