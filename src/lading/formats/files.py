"""The files of a checkpoint: how they are opened, and how it is said what is wrong with one."""

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
    hint: str = "Fetch the checkpoint again, or save it anew.",
) -> CorruptModelCheckpointError:
    """The error for a file that breaks the rules of its format.

    :param label: the path or the address of the file.
    :param where: the part of the file that is wrong; empty where it is the file as a whole.
    :param hint: what to do next.
    """
    part = f" {where}:" if where else ""

    return CorruptModelCheckpointError(label, f"{label}:{part} expected {expected}, found {found}. {hint}")


LFS_POINTER = b"version "
"""What a pointer of Git LFS begins with: the file that a clone holds in the place of a large one.

Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""


def stands_for_another(label: str) -> CorruptModelCheckpointError:
    """The error for a pointer of Git LFS."""
    return corrupt(
        label,
        "",
        expected="the file's own bytes",
        found="a pointer of Git LFS, which stands for them",
        hint="`git lfs pull` in the clone brings them.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of a checkpoint that can be read, wherever it is."""

    name: str
    """Beside the other files of the checkpoint."""
    label: str
    """Its path or address, for errors."""
    size: int
    """Bytes."""
    read: Callable[[int, int], bytes]
    """(offset, size) → these bytes, or as many of them as there are."""


@contextmanager
def open_file(path: Path) -> Iterator[File]:
    """The file on this machine that ``path`` leads to, for as long as the block lasts.

    Raises what :func:`open_regular` does.
    """
    with open_regular(path) as (file, size):

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        yield File(name=path.name, label=str(path), size=size, read=read)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open the regular file that ``path`` leads to, through symbolic links too, and give it with its size in bytes.

    Never waits: what is not a regular file is not even opened, since that alone can block (a FIFO) or act (a device).

    :raises CheckpointNotFoundError: nothing is there.
    :raises CorruptModelCheckpointError: ``path`` leads to something else or in a circle, or the file changed before the
        block was left.
    :raises OSError: the file cannot be opened or read.
    """
    _require_regular(path, _stat(path))

    with open(path, "rb", opener=_open_at_once) as file:
        # Another file may have taken the place of the one that was looked at first.
        before = os.fstat(file.fileno())
        _require_regular(path, before)

        try:
            yield file, before.st_size
        except CorruptModelCheckpointError as error:
            # Whatever is wrong with it, a file that is being written explains it better.
            _require_unchanged(path, before, os.fstat(file.fileno()), cause=error)
            raise
        except OSError as error:
            error.filename = error.filename or os.fspath(path)  # `read` does not say what it read
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
        raise _not_regular(path, "symbolic links that lead in a circle") from error


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
            found=f"that it was written to meanwhile and has {after.st_size} bytes",
            hint="Try again when it is complete.",
        ) from cause


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
