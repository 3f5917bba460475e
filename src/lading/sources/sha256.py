"""The SHA-256 of whole files, by which a copy is *verified*."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from lading.errors import CorruptModelCheckpointError
from lading.formats.files import open_checkpoint_file
from lading.system.filesystem import FileStat

_STEP = 1 << 20
"""Bytes per read: few enough to stay in the processor's cache until they are hashed."""


def sha256_file(path: Path, *, progress: Callable[[int], None] | None = None) -> tuple[str, FileStat]:
    """Return the SHA-256 of a regular file in lower-case hexadecimal, and the state of the file that has it.

    Symbolic links are followed. Anything but a regular file is not opened, as that can block (a FIFO) or have effects
    (a device).

    :param progress: called with the number of bytes of each read, in the calling thread.

    :raises CheckpointNotFoundError: it does not exist (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: it is not a regular file, or it changed while it was read.
    :raises OSError: it cannot be read.
    """
    with open_checkpoint_file(path) as file:
        before = FileStat.from_stat(os.fstat(file.fileno()))
        digest = _hash(file.fileno(), progress, path)
        after = FileStat.from_stat(os.fstat(file.fileno()))

    if after != before:
        raise CorruptModelCheckpointError(
            path,
            f"{path} changed while it was read: expected {before.size} bytes, modified at {before.mtime_ns} ns, found "
            f"{after.size} bytes, modified at {after.mtime_ns} ns. Try again when nothing writes to it any more.",
        )

    return digest, after


def _hash(fd: int, progress: Callable[[int], None] | None, path: Path) -> str:
    sha256, buffer = hashlib.sha256(), bytearray(_STEP)
    memory = memoryview(buffer)

    while True:
        try:
            count = os.readv(fd, [buffer])
        except OSError as error:
            error.filename = os.fspath(path)  # `readv` does not name the file
            raise
        if count == 0:
            return sha256.hexdigest()
        sha256.update(memory[:count])
        if progress is not None:
            progress(count)
