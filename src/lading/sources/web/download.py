"""Download of one file: in ranges over several connections, or in one stream, hashed on the way.

Ranges are requested only if a strong validator (``If-Range``) or a published digest shows that all of them have the
same content. If a server does not support ranges correctly, the whole file is requested.

Source: https://www.rfc-editor.org/rfc/rfc9110, sections 13 and 14.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from blake3 import blake3

from lading.errors import FetchError
from lading.sources.partial import Partial, Range
from lading.sources.source import RemoteFile
from lading.sources.web.connection import StoppedError
from lading.sources.web.redirects import shown
from lading.sources.web.responses import BadRanges, Unavailable, require_range, require_same, web_page_error
from lading.sources.web.transport import Resource, Response, Transport
from lading.system.threads import Worker

_HTML = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
MAX_SKIP = 64 << 20
"""The most bytes to read and drop before a range, if a server does not support ranges."""
_STEP = 1 << 20
_CHUNK = 1 << 18
"""The most bytes of one read of a connection: more rarely wait there."""
_GOOD = 1 << 20
"""The bytes after which a failed attempt counts as progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Concurrency:
    """The concurrency and the limits of a download."""

    connections: int = 32
    """The most connections; fewer are used for fewer pieces."""
    piece: int | None = None
    """The bytes of a range; default: 8 MiB, and 16 MiB for files of a GiB and more."""
    notes_every: float = 2
    """The seconds between two updates of the notes about ranges on the disk."""
    undeclared: int = 64 << 30
    """The most bytes of a file whose size the server does not declare."""

    def piece_of(self, size: int) -> int:
        return self.piece or (8 << 20 if size < 1 << 30 else 16 << 20)


class WorkerGroup:
    """Threads that end together, with their requests, when one of them fails or the block ends."""

    def __init__(self, transport: Transport) -> None:
        self.stop = transport.new_stop()
        self._threads: list[Worker] = []
        self._errors: list[BaseException] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        # A thread that cannot be woken (in name resolution) is left behind: it checks for the stop before it writes.
        until = time.monotonic() + 5
        for thread in self._threads:
            thread.wait(max(0.0, until - time.monotonic()))

    def start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised again in the calling thread
                self._errors.append(error)
                self.stop.set()

        thread = Worker(run, f"lading-fetch-{len(self._threads)}")
        self._threads.append(thread)
        thread.start()

    def watch(self, tick: Callable[[], None]) -> None:
        """Wait until all threads have ended, and call ``tick`` repeatedly in this thread; it may start more threads.

        :raises BaseException: the first error of a thread.
        """
        while True:
            alive = [thread for thread in self._threads if not thread.ended]
            tick()
            if self._errors:
                raise self._errors[0]
            if not alive and all(thread.ended for thread in self._threads):
                return
            for thread in alive[:1]:
                thread.wait(0.05)


class _Piece:
    """A range of the file; its bytes up to ``at`` are fetched."""

    __slots__ = ("_hasher", "_known", "_lock", "at", "end", "start")

    def __init__(self, start: int, end: int, known: Range | None = None) -> None:
        """:param known: the range itself, if it is on the disk already."""
        self.start = start
        self.end = end
        self.at = start if known is None else end
        self._known = known
        self._hasher = blake3()
        self._lock = threading.Lock()

    def arrived(self, chunk: memoryview) -> None:
        """Add bytes that were written to the file."""
        with self._lock:
            self._hasher.update(chunk)
            self.at += len(chunk)

    @property
    def done(self) -> Range | None:
        """The part of the range that is in the file; ``None`` if it is empty."""
        if self._known is not None:
            return self._known
        with self._lock:
            return Range(self.start, self.at, self._hasher.hexdigest()) if self.at > self.start else None


class Download:
    """The download of one file to a :class:`Partial`."""

    def __init__(
        self,
        transport: Transport,
        resource: Resource,
        part: Partial,
        *,
        concurrency: Concurrency,
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        """:param advance: called in the calling thread with the change in the number of bytes, maybe negative."""
        self._transport = transport
        self._resource = resource
        self._partial = part
        self._identity = part.identity
        self._concurrency = concurrency
        self._advance = advance
        self._what = repr(resource.label)
        self._group = WorkerGroup(transport)
        self._ranges_work = threading.Event()
        """Set once a range came as it was requested."""
        self._pieces: list[_Piece] = []
        self._waiting: deque[_Piece] = deque()
        """The pieces that no thread has begun to fetch."""
        self._first = 0
        """The index of the first piece that may be incomplete."""
        self.reported = 0
        """The bytes reported to ``advance``."""

    @property
    def done(self) -> list[Range]:
        """The ranges that are in the file."""
        return [done for piece in self._pieces if (done := piece.done) is not None]

    def fetch_ranges(self) -> str:
        """Fetch the missing ranges; return the SHA-256 of the whole file.

        :raises BadRanges: the server does not support ranges correctly.
        :raises LadingError: the file cannot be fetched.
        :raises OSError: the file cannot be written.
        """
        size = self._identity.size
        assert size is not None
        self._pieces = list(_split(size, self._concurrency.piece_of(size), self._partial.done))
        self._waiting = deque(piece for piece in self._pieces if piece.at < piece.end)
        most = min(self._concurrency.connections, len(self._waiting))
        started, digest = 0, hashlib.sha256()

        def tick() -> None:
            nonlocal started
            # The first connection shows whether the server supports ranges.
            wanted = most if self._ranges_work.is_set() else min(most, 1)
            while started < wanted:
                started += 1
                self._group.start(self._fetch_pieces)
            self._report(self._arrived())

        with self._group:
            self._group.start(lambda: self._hash(digest, size))
            self._group.watch(tick)

        return digest.hexdigest()

    def fetch_whole(self) -> str:
        """Fetch the file in one stream; return its SHA-256.

        :raises LadingError: the file cannot be fetched.
        :raises OSError: the file cannot be written.
        """
        piece = _Piece(0, 0)
        digests: list[str] = []

        def work() -> None:
            action = lambda: self._stream(piece)  # noqa: E731
            digests.append(self._transport.retry(action, what=self._what, stop=self._group.stop))

        with self._group:
            self._group.start(work)
            self._group.watch(lambda: self._report(piece.at))

        return digests[0]

    def _arrived(self) -> int:
        return sum(piece.at - piece.start for piece in self._pieces)

    def _report(self, count: int) -> None:
        if count != self.reported:
            self._advance(count - self.reported)
            self.reported = count

    # --- in threads --------------------------------------------------------------------------------------------------

    def _fetch_pieces(self) -> None:
        buffer = memoryview(bytearray(_CHUNK))
        while True:
            try:
                piece = self._waiting.popleft()
            except IndexError:
                return
            self._fetch_piece(piece, buffer)

    def _fetch_piece(self, piece: _Piece, buffer: memoryview) -> None:
        before = piece.at

        def attempt() -> None:
            nonlocal before
            before = piece.at
            self._fetch_range(piece, buffer)

        progressed = lambda: piece.at - before >= _GOOD  # noqa: E731
        self._transport.retry(attempt, what=self._what, stop=self._group.stop, progressed=progressed)

    def _fetch_range(self, piece: _Piece, buffer: memoryview) -> None:
        if piece.at == piece.end:
            return  # the last attempt failed behind the last byte
        headers = _range_headers(piece.at, piece.end, self._identity.etag)
        with self._transport.open("GET", self._resource, headers) as response:
            require_same(response, self._identity.etag, self._resource.label)
            require_range(response, piece.at, piece.end, self._identity.size)
            self._ranges_work.set()
            while piece.at < piece.end and (count := response.read_into(buffer[: piece.end - piece.at])):
                self._write(buffer[:count], piece.at)
                piece.arrived(buffer[:count])
            if piece.at < piece.end:
                raise Unavailable(f"{response.url.host} sent {piece.end - piece.at} bytes less than it declared")
            if response.read_into(buffer):
                raise BadRanges("a range is longer than its Content-Range")

    def _stream(self, piece: _Piece) -> str:
        size, piece.at = self._identity.size, 0
        limit = self._concurrency.undeclared if size is None else size
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        os.ftruncate(self._partial.fd, 0)

        with self._transport.open("GET", self._resource) as response:
            if response.status != 200:
                raise FetchError(f"{self._what} answers {response.status} to a request for the whole file.")
            require_same(response, self._identity.etag, self._resource.label)
            length = response.headers.get("content-length")
            if size is not None and length is not None and length != str(size):
                raise FetchError(f"{self._what} has {length[:20]} bytes, expected the published {size}. Try again.")
            while count := response.read_into(buffer):
                chunk = buffer[:count]
                if piece.at == 0 and _HTML.match(chunk):
                    raise web_page_error(self._resource.label)
                if piece.at + count > limit:
                    said = "that are published" if size is not None else "allowed for a file without a declared size"
                    raise FetchError(f"{self._what} sends more than the {limit} bytes {said}.")
                self._write(chunk, piece.at)
                digest.update(chunk)
                piece.at += count

        if size is not None and piece.at < size:
            raise Unavailable(f"{response.url.host} sent {size - piece.at} bytes less than the published size")

        return digest.hexdigest()

    def _write(self, memory: memoryview, at: int) -> None:
        while memory:
            if self._group.stop.is_set():
                raise StoppedError
            count = os.pwrite(self._partial.fd, memory, at)
            memory, at = memory[count:], at + count

    def _hash(self, digest: hashlib._Hash, size: int) -> None:
        """Hash the contiguous bytes from the start soon after they arrive, while they are in memory; save the notes."""
        buffer, at, noted = bytearray(_STEP), 0, time.monotonic()
        fd, stop = self._partial.fd, self._group.stop
        while at < size:
            if stop.is_set():
                raise StoppedError
            contiguous = self._contiguous_end()
            if at < contiguous:
                count = os.preadv(fd, [memoryview(buffer)[: min(_STEP, contiguous - at)]], at)
                if count == 0:
                    raise OSError(errno.EIO, "the file was truncated", str(self._partial.path))
                digest.update(memoryview(buffer)[:count])
                at += count
            else:
                stop.wait(0.01)
            if time.monotonic() - noted >= self._concurrency.notes_every:
                self._partial.note(self.done)
                noted = time.monotonic()

    def _contiguous_end(self) -> int:
        while self._first + 1 < len(self._pieces) and self._pieces[self._first].at == self._pieces[self._first].end:
            self._first += 1

        return self._pieces[self._first].at


def _split(size: int, most: int, done: Sequence[Range]) -> Iterator[_Piece]:
    """Yield pieces that cover the file: the done ranges, and missing ones of at most ``most`` bytes between them."""
    at = 0
    for known in done:
        yield from _missing(at, known.start, most)
        yield _Piece(known.start, known.end, known)
        at = known.end
    yield from _missing(at, size, most)


def _missing(start: int, end: int, most: int) -> Iterator[_Piece]:
    for at in range(start, end, most):
        yield _Piece(at, min(end, at + most))


def _range_headers(start: int, end: int, etag: str | None) -> dict[str, str]:
    headers = {"Range": f"bytes={start}-{end - 1}"}

    return headers if etag is None else {**headers, "If-Range": etag}


def read_range(
    transport: Transport,
    resource: Resource,
    file: RemoteFile,
    offset: int,
    into: memoryview,
    *,
    max_skip: int = MAX_SKIP,
) -> None:
    """Fill ``into``, which is not empty, with the bytes of a file from ``offset`` on.

    :param max_skip: the most bytes up to the end of the range that are read from the start of the file, if the server
        does not support ranges.

    :raises FetchError: the server does not support ranges, and the bytes are far from the start; or the content has
        changed.
    """
    end = offset + len(into)

    def attempt() -> None:
        with transport.open("GET", resource, _range_headers(offset, end, file.etag)) as response:
            require_same(response, file.etag, resource.label)
            try:
                require_range(response, offset, end, file.size)
                _fill(response, into)
            except BadRanges as error:
                whole = offset == 0 and end == file.size
                if response.status != 200 or (end > max_skip and not whole):
                    raise FetchError(
                        f"{shown(response.url)!r} cannot be read in parts: {error}. Fetch the whole file instead."
                    ) from error
                # Bytes near the start can be read without ranges, too.
                skipped = memoryview(bytearray(min(_STEP, offset)))
                for at in range(0, offset, _STEP):
                    _fill(response, skipped[: offset - at])
                _fill(response, into)

    transport.retry(attempt, what=repr(resource.label))


def _fill(response: Response, into: memoryview) -> None:
    """Fill ``into`` with the next bytes of a body.

    :raises Unavailable: it has fewer.
    """
    while into and (count := response.read_into(into)):
        into = into[count:]
    if into:
        raise Unavailable(f"{response.url.host} sent {len(into)} bytes less than expected")
