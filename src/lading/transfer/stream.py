"""Files of a checkpoint at their source, whose bytes a load reads from there, without a file in between."""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from lading.errors import InternalError
from lading.sources.source import RemoteFile, Snapshot, Source

HOST_CONNECTIONS = 32
"""The most requests that the ranks of a host have in progress at once, together."""

CONNECTIONS = 12
"""The most requests that a rank has in progress at once: enough to hide a round trip of 50 ms at 1 Gbit/s."""


class StoppedError(Exception):
    """A read that another failure has ended."""


class Stream:
    """The source of a checkpoint during one load, and the count of the bytes that came from there.

    :param ranks: the number of ranks on this host, which share its connections.
    :param check: raises if the load has to end, such as because another rank failed.
    """

    def __init__(
        self, source: Source, snapshot: Snapshot, *, ranks: int = 1, check: Callable[[], None] = lambda: None
    ) -> None:
        self._source = source
        self._snapshot = snapshot
        self.check = check
        self.connections = max(2, min(CONNECTIONS, HOST_CONNECTIONS // ranks))
        self.bytes_read = 0
        self.requests = 0
        self.digests: Mapping[str, FileDigest] = {}
        """The digests of whole files that the reads in progress take, by the names of the files."""
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def read(self, file: RemoteFile, offset: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of a file from ``offset`` on, by one request.

        :raises StoppedError: :meth:`stop` was called.

        Other errors are those of the source.
        """
        if self._stopped.is_set():
            raise StoppedError
        try:
            self._source.read(self._snapshot, file, offset, into)
        except Exception:
            if self._stopped.is_set():
                raise StoppedError from None
            raise
        with self._lock:
            self.bytes_read += len(into)
            self.requests += 1

    def stop(self) -> None:
        """End all reads, those in progress, too."""
        self._stopped.set()
        for digest in self.digests.values():
            digest.stop()
        self._source.close()

    @contextmanager
    def stopped_on_error(self) -> Iterator[None]:
        """End all reads if the block raises."""
        try:
            yield
        except BaseException:
            self.stop()
            raise

    @contextmanager
    def hashing(self, digests: Mapping[str, FileDigest]) -> Iterator[None]:
        """Have the reads inside the block bring these files whole, and take their digests."""
        self.digests = digests
        try:
            yield
        finally:
            self.digests = {}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamedFile:
    """A file at its source."""

    stream: Stream
    file: RemoteFile

    def open(self) -> AbstractContextManager[StreamedShard]:
        """Return the file, which needs no descriptor."""
        return nullcontext(StreamedShard(self.stream, self.file))


class StreamedShard:
    """A file that is read from its source; a :class:`~lading.transfer.files.Shard`."""

    remote = True

    def __init__(self, stream: Stream, file: RemoteFile) -> None:
        self.stream = stream
        self.file = file

    def is_cold(self, offset: int) -> bool:
        return False

    def fill(self, offset: int, memory: memoryview, *, direct: bool = False) -> None:
        self.stream.read(self.file, offset, memory)

    def map(self) -> mmap.mmap:
        raise InternalError(f"{self.file.name} is read from its source, and cannot be mapped")


class FileDigest:
    """The SHA-256 of a file whose parts arrive in any order.

    The part that comes next is hashed by the thread that brings it, or, if it arrived early, by the thread that brings
    the one before.

    :param size: the size of the file.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._sha256 = hashlib.sha256()
        self._at = 0
        self._waiting: dict[int, memoryview] = {}
        self._busy = False
        self._stopped = False
        self._changed = threading.Condition()

    def arrived(self, begin: int, memory: memoryview, *, stays: bool) -> None:
        """Add the bytes from the offset ``begin`` on.

        Threads take the parts of a file in its order, so those before this one are in the hands of other threads.

        :param stays: ``True`` if ``memory`` keeps these bytes; otherwise this waits until they are hashed.

        :raises StoppedError: :meth:`stop` was called.
        """
        end = begin + len(memory)
        with self._changed:
            if end > self._at:
                kept = self._waiting.get(begin)
                self._waiting[begin] = memory if kept is None or len(kept) < len(memory) else kept
            while not stays or not self._busy:
                part = None if self._busy else self._next()
                if part is not None:
                    self._hash(part)
                elif stays or self._at >= end:
                    return
                elif self._stopped:
                    raise StoppedError
                else:
                    self._changed.wait()

    def _next(self) -> memoryview | None:
        """Take the bytes that come next from those that wait."""
        for begin in sorted(self._waiting):
            if begin > self._at:
                return None
            part = self._waiting.pop(begin)[self._at - begin :]
            if len(part):
                return part

        return None

    def _hash(self, part: memoryview) -> None:
        """Hash the next bytes, while other threads may add theirs."""
        self._busy = True
        self._changed.release()
        try:
            self._sha256.update(part)
        finally:
            self._changed.acquire()
            self._busy = False
            self._at += len(part)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the waits of all threads."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def hexdigest(self) -> str:
        """Return the SHA-256, after all bytes have arrived."""
        if self._at != self._size:
            raise InternalError(f"{self._size} bytes of a file should have been hashed, but {self._at} were")

        return self._sha256.hexdigest()
