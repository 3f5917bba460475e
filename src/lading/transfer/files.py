"""Files of a checkpoint: how they are read, and those on this machine, through the page cache or past it."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from lading.errors import CorruptModelCheckpointError
from lading.planning.plan import PAGE
from lading.system.filesystem import FileStat, on_network


class Shard(Protocol):
    """A file whose bytes can be read now. Several threads read it."""

    remote: bool
    """``True`` if each read is a request to another machine."""

    def is_cold(self, offset: int) -> bool:
        """Return whether the byte at ``offset`` would come from the disk, and can come past the page cache."""

    def fill(self, offset: int, memory: memoryview, *, direct: bool = False) -> None:
        """Read ``len(memory)`` bytes at ``offset``.

        :param direct: past the page cache, if the file system allows it; ``memory`` must begin where ``offset`` does,
            modulo the page size.
        """

    def map(self) -> mmap.mmap:
        """Return a private, writable mapping of the whole file.

        Writes to the mapping change neither the file nor other mappings of it.
        """


class File(Protocol):
    """A file of a checkpoint, on this machine or at its source."""

    def open(self) -> AbstractContextManager[Shard]:
        """Open it for the time of a block, whose end raises if the file has changed meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A file to read from, and the state in which its manifest was read."""

    path: Path
    stat: FileStat
    sha256: str | None = field(default=None, compare=False)
    """The SHA-256 of its bytes, if other processes may replace it with the same bytes at any time: when several fetch
    one file and no lock works, the last one's stays."""

    def open(self) -> AbstractContextManager[OpenShard]:
        """Open it as :func:`open_shard` does."""
        return open_shard(self)


@contextmanager
def open_shard(file: ShardFile) -> Iterator[OpenShard]:
    """Open a file, and check at the end of the block that it is still as it was when its manifest was read.

    :raises CorruptModelCheckpointError: it is not.
    :raises OSError: it cannot be opened.
    """
    # If a FIFO replaced the file, the load must not wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    shard = OpenShard(file, os.open(file.path, flags), flags)
    try:
        if not shard.has_expected_bytes():
            shard.check_unchanged()
        yield shard
        shard.check_unchanged()
    finally:
        shard.close()


class OpenShard:
    """An open file; a :class:`Shard`."""

    remote = False

    def __init__(self, file: ShardFile, fd: int, flags: int) -> None:
        self.file = file
        self.fd = fd
        self._expected = file.stat
        self._cold: dict[int, bool] = {}
        self._direct = -1
        """A descriptor that reads past the page cache, if the file system has that."""
        if not on_network(file.path):  # direct I/O differs between network file systems
            try:
                self._direct = os.open(file.path, flags | os.O_DIRECT)
            except OSError:
                pass
        # Another file may have taken the place of the one that is open.
        if self._direct >= 0 and not os.path.samestat(os.fstat(fd), os.fstat(self._direct)):
            os.close(self._direct)
            self._direct = -1

    def close(self) -> None:
        os.close(self.fd)
        if self._direct >= 0:
            os.close(self._direct)

    def has_expected_bytes(self) -> bool:
        """Return whether another file with the known right bytes has replaced it."""
        found = FileStat.from_stat(os.fstat(self.fd))
        if self.file.sha256 is None or found == self._expected or found.size != self._expected.size:
            return False

        with open(self.fd, "rb", closefd=False) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.file.sha256:
                return False

        self._expected = found

        return True

    def check_unchanged(self) -> None:
        """Check that the file is as it was when its manifest was read.

        :raises CorruptModelCheckpointError: it is not.
        """
        stat = os.fstat(self.fd)
        expected, found = self._expected, FileStat.from_stat(stat)
        # A replaced file is, to a process that has it open, what it was but for one time.
        replaced = stat.st_nlink == 0 and found == replace(expected, ctime_ns=found.ctime_ns)
        if found != expected and not replaced:
            raise CorruptModelCheckpointError(
                self.file.path,
                f"{self.file.path} changed while it was loaded: expected {expected.size} bytes, modified at "
                f"{expected.mtime_ns} ns, found {found.size} bytes, modified at {found.mtime_ns} ns. Load it again "
                "when nothing writes to it any more.",
            )

    def is_cold(self, offset: int) -> bool:
        if self._direct < 0:
            return False
        # The kernel answers and then fetches the page, so a second question gets another answer.
        if offset not in self._cold:
            cold = self._cold[offset] = self._peek(offset) is False
            if cold:
                self._advise_random()

        return self._cold[offset]

    def is_cached(self, offset: int) -> bool:
        """Return whether the byte at ``offset`` is known to be in the page cache."""
        return self._peek(offset) is True

    def _peek(self, offset: int) -> bool | None:
        """Return whether a byte is in the page cache; ``None`` on a file system that cannot say."""
        try:
            return os.preadv(self.fd, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False
        except OSError:
            return None

    def _advise_random(self) -> None:
        """Turn read-ahead off: the bytes between reads are not needed, and those after a read would look as if they
        were cached and need no direct read.
        """
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def map(self) -> mmap.mmap:
        return mmap.mmap(self.fd, self.file.stat.size, access=mmap.ACCESS_COPY)

    def fill(self, offset: int, memory: memoryview, *, direct: bool = False) -> None:
        """Read as :meth:`Shard.fill` describes.

        :raises CorruptModelCheckpointError: the file ends before.
        """
        done = self._read_direct(offset, memory) if direct else 0
        self._read(offset + done, memory[done:])

    def _read_direct(self, offset: int, memory: memoryview) -> int:
        """Read past the page cache in one call and return the number of bytes read, perhaps zero."""
        end = offset + len(memory)
        head, tail = offset % PAGE, end % PAGE
        first, last = (PAGE - head) % PAGE, len(memory) - tail
        if first >= last:
            return 0

        # In a page that is wanted in part, the bytes around that part belong to another thread and must not be written.
        edges = memoryview(mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        buffers = [memory[first:last]]
        if head:
            buffers.insert(0, edges[:PAGE])
        if tail:
            buffers.append(edges[PAGE:])
        try:
            count = os.preadv(self._direct, buffers, offset - head) - head
        except OSError:
            return 0  # some file systems accept the flag and refuse the read

        if count < len(memory):
            count = min(count, last)  # the last page is incomplete
        else:
            count = len(memory)
            memory[last:] = edges[PAGE : PAGE + tail]
        if count < first:
            return 0
        memory[:first] = edges[PAGE - first : PAGE]

        return count

    def _read(self, offset: int, memory: memoryview) -> None:
        at, end = 0, len(memory)
        while at < end:
            count = os.preadv(self.fd, [memory[at:]], offset + at)
            if count == 0:
                raise CorruptModelCheckpointError(
                    self.file.path,
                    f"{self.file.path} ends early: expected {end - at} more bytes at offset {offset + at}, found the "
                    "end of the file. It was cut while it was loaded; fetch it again.",
                )
            at += count
