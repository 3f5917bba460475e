"""Access to the files of a checkpoint, and errors for damaged ones."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError
from lading.system import filesystem

FETCH_AGAIN = "Fetch the checkpoint again, or save it again."
"""The advice about most damaged files."""


def corrupt(
    label: str,
    where: str,
    *,
    expected: str,
    found: str,
    hint: str = FETCH_AGAIN,
) -> CorruptModelCheckpointError:
    """Return the error for a file that breaks the rules of its format.

    :param label: the path or the address of the file.
    :param where: the part of the file that is wrong; empty for the file as a whole.
    :param hint: how to fix it.
    """
    part = f" {where}:" if where else ""

    return CorruptModelCheckpointError(label, f"{label}:{part} expected {expected}, found {found}. {hint}")


LFS_POINTER = b"version "
"""The start of a Git LFS pointer, which a clone holds in place of a large file.

Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""


def lfs_pointer_error(label: str) -> CorruptModelCheckpointError:
    """Return the error for a Git LFS pointer."""
    return corrupt(
        label,
        "",
        expected="the content of the file",
        found="a pointer of Git LFS to it",
        hint="Run `git lfs pull` in the clone to fetch it.",
    )


def refuse_lfs_pointer(start: bytes, label: str) -> None:
    """Check that a file does not start as a Git LFS pointer.

    :raises CorruptModelCheckpointError: it does.
    """
    if start.startswith(LFS_POINTER):
        raise lfs_pointer_error(label)


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A readable file of a checkpoint, local or remote."""

    name: str
    """The name within the checkpoint."""
    label: str
    """The path or the address, for errors."""
    size: int
    """The size in bytes."""
    read: Callable[[int, int], bytes]
    """A function that reads the bytes at (offset, size), or fewer at the end of the file."""


@contextmanager
def open_file(path: Path) -> Iterator[File]:
    """Open a local file for the duration of the block.

    Raises what :func:`open_regular` does.
    """
    with open_regular(path) as (file, size):

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        yield File(name=path.name, label=str(path), size=size, read=read)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, following symbolic links, and yield it with its size in bytes.

    Anything else is not opened, as that can block (a FIFO) or have effects (a device).

    :raises CheckpointNotFoundError: ``path`` does not exist.
    :raises CorruptModelCheckpointError: ``path`` is not a regular file, its links form a cycle, or the file changed
        before the end of the block.
    :raises OSError: the file cannot be opened or read.
    """
    with open_checkpoint_file(path) as file:
        before = os.fstat(file.fileno())
        try:
            yield file, before.st_size
        except CorruptModelCheckpointError as error:
            # If the file was written to meanwhile, that explains the error better.
            _require_unchanged(path, before, os.fstat(file.fileno()), cause=error)
            raise
        except OSError as error:
            error.filename = error.filename or os.fspath(path)  # `read` does not name the file
            raise

        _require_unchanged(path, before, os.fstat(file.fileno()))


def open_checkpoint_file(path: Path) -> BinaryIO:
    """Open a regular file; raises what :func:`open_regular` does, except that the caller checks for changes."""
    try:
        return filesystem.open_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(path, f"{path}: expected a file of a checkpoint, found nothing there.") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            problem = "expected a regular file, found symbolic links that form a cycle"
        elif isinstance(error, filesystem.UnfitFileError):
            problem = str(error.strerror)
        else:
            raise
        raise CorruptModelCheckpointError(
            path, f"{path}: {problem}. Put the file there, or a symbolic link to it."
        ) from error


def _require_unchanged(
    path: Path, before: os.stat_result, after: os.stat_result, cause: Exception | None = None
) -> None:
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise corrupt(
            str(path),
            "",
            expected=f"a file of {before.st_size} bytes that does not change while it is read",
            found=f"that it was modified and has {after.st_size} bytes",
            hint="Try again when it is complete.",
        ) from cause
