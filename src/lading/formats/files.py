"""Access to the files of a checkpoint, and errors for damaged ones."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def corrupt(
    label: str,
    where: str,
    *,
    expected: str,
    found: str,
    hint: str = "Fetch the checkpoint again, or save it again.",
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
    _require_regular(path, _stat(path))

    with open(path, "rb", opener=_open_at_once) as file:
        # The path may have been replaced after the check, so the opened file is checked, too.
        before = os.fstat(file.fileno())
        _require_regular(path, before)

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


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(path, f"{path}: expected a file of a checkpoint, found nothing there.") from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _not_regular(path, "symbolic links that form a cycle") from error


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _not_regular(path, _KINDS.get(stat.S_IFMT(found.st_mode), "something else"))


def _not_regular(path: Path, found: str) -> CorruptModelCheckpointError:
    return corrupt(
        str(path), "", expected="a regular file", found=found, hint="Put the file there, or a symbolic link to it."
    )


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


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
