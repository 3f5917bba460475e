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
from functools import partial
from typing import TYPE_CHECKING, Self

from blake3 import blake3

from lading.errors import FetchError
from lading.sources.partial import Partial, Range
from lading.sources.source import RemoteFile
from lading.sources.web.client import Client, Connection, Stopped
from lading.sources.web.redirects import shown
from lading.sources.web.responses import BadRanges, Unavailable, require_range, require_same, web_page_error
from lading.system.threads import Worker

if TYPE_CHECKING:
    import httpx2 as httpx

_HTML = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
_MAX_SKIP = 64 << 20
"""The most bytes to read and drop before a range, if a server does not support ranges."""
_STEP = 1 << 20
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
    """Threads that end together when one of them fails or the block ends."""

    def __init__(self, client: Client) -> None:
        self.stop = threading.Event()
        self._client = client
        self._connections: list[Connection] = []
        self._threads: list[Worker] = []
        self._errors: list[BaseException] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        # A thread may be about to send another request, so connections are aborted repeatedly. A thread that cannot be
        # woken (in name resolution) is left behind: it checks for the stop before it writes.
        until = time.monotonic() + 5
        while time.monotonic() < until and not all(thread.ended for thread in self._threads):
            for connection in list(self._connections):
                connection.abort()
            for thread in self._threads:
                if not thread.wait(0.05):
                    break

    def start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Stopped:
                pass
            except BaseException as error:  # raised again in the calling thread
                self._errors.append(error)
                self.stop.set()

        thread = Worker(run, f"lading-fetch-{len(self._threads)}")
        self._threads.append(thread)
        thread.start()

    def start_requests(self, work: Callable[[Connection], None]) -> None:
        """Start a thread with a connection, which is aborted when the block ends."""

        def run() -> None:
            with self._client.connection() as connection:
                self._connections.append(connection)
                work(connection)

        self.start(run)

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

    def arrived(self, chunk: bytes) -> None:
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
        client: Client,
        part: Partial,
        *,
        concurrency: Concurrency,
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        """:param advance: called in the calling thread with the change in the number of bytes, maybe negative."""
        self._client = client
        self._partial = part
        self._identity = part.identity
        self._concurrency = concurrency
        self._advance = advance
        self._url = client.parse(part.identity.url)
        self._what = repr(shown(self._url))
        self._group = WorkerGroup(client)
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
                self._group.start_requests(self._fetch_pieces)
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

        def work(connection: Connection) -> None:
            action = partial(self._stream, connection, piece)
            digests.append(self._client.retry(action, what=self._what, stop=self._group.stop))

        with self._group:
            self._group.start_requests(work)
            self._group.watch(lambda: self._report(piece.at))

        return digests[0]

    def _arrived(self) -> int:
        return sum(piece.at - piece.start for piece in self._pieces)

    def _report(self, count: int) -> None:
        if count != self.reported:
            self._advance(count - self.reported)
            self.reported = count

    # --- in threads --------------------------------------------------------------------------------------------------

    def _fetch_pieces(self, connection: Connection) -> None:
        while True:
            try:
                piece = self._waiting.popleft()
            except IndexError:
                return
            self._fetch_piece(connection, piece)

    def _fetch_piece(self, connection: Connection, piece: _Piece) -> None:
        before = piece.at

        def attempt() -> None:
            nonlocal before
            before = piece.at
            self._fetch_range(connection, piece)

        progressed = lambda: piece.at - before >= _GOOD  # noqa: E731
        self._client.retry(attempt, what=self._what, stop=self._group.stop, progressed=progressed)

    def _fetch_range(self, connection: Connection, piece: _Piece) -> None:
        headers = _range_headers(piece.at, piece.end, self._identity.etag)
        with connection.open("GET", self._url, headers) as response:
            require_same(response, self._identity.etag, self._url)
            require_range(response, piece.at, piece.end, self._identity.size)
            self._ranges_work.set()
            for chunk in connection.body(response, self._arrived):
                if len(chunk) > piece.end - piece.at:
                    raise BadRanges("a range is longer than its Content-Range")
                self._write(chunk, piece.at)
                piece.arrived(chunk)

        if piece.at < piece.end:
            raise Unavailable(f"{self._url.host} sent {piece.end - piece.at} bytes less than it declared")

    def _stream(self, connection: Connection, piece: _Piece) -> str:
        size, piece.at = self._identity.size, 0
        limit = self._concurrency.undeclared if size is None else size
        digest = hashlib.sha256()
        os.ftruncate(self._partial.fd, 0)

        with connection.open("GET", self._url, {}) as response:
            if response.status_code != 200:
                raise FetchError(f"{self._what} answers {response.status_code} to a request for the whole file.")
            require_same(response, self._identity.etag, self._url)
            length = response.headers.get("content-length")
            if size is not None and length is not None and length != str(size):
                raise FetchError(f"{self._what} has {length[:20]} bytes, expected the published {size}. Try again.")
            for chunk in connection.body(response):
                if piece.at == 0 and _HTML.match(chunk):
                    raise web_page_error(self._url)
                if piece.at + len(chunk) > limit:
                    said = "that are published" if size is not None else "allowed for a file without a declared size"
                    raise FetchError(f"{self._what} sends more than the {limit} bytes {said}.")
                self._write(chunk, piece.at)
                digest.update(chunk)
                piece.at += len(chunk)

        if size is not None and piece.at < size:
            raise Unavailable(f"{self._url.host} sent {size - piece.at} bytes less than the published size")

        return digest.hexdigest()

    def _write(self, chunk: bytes, at: int) -> None:
        memory = memoryview(chunk)
        while memory:
            if self._group.stop.is_set():
                raise Stopped
            count = os.pwrite(self._partial.fd, memory, at)
            memory, at = memory[count:], at + count

    def _hash(self, digest: hashlib._Hash, size: int) -> None:
        """Hash the contiguous bytes from the start soon after they arrive, while they are in memory; save the notes."""
        buffer, at, noted = bytearray(_STEP), 0, time.monotonic()
        fd, stop = self._partial.fd, self._group.stop
        while at < size:
            if stop.is_set():
                raise Stopped
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


def read_range(connection: Connection, url: httpx.URL, file: RemoteFile, offset: int, size: int) -> bytes:
    """Read exactly ``size`` bytes of a file, starting at ``offset``.

    :raises FetchError: the server does not support ranges, and the bytes are far from the start; or the content has
        changed.
    :raises Unavailable: the error is transient.
    """
    with connection.open("GET", url, _range_headers(offset, offset + size, file.etag)) as response:
        require_same(response, file.etag, url)
        skip = 0
        try:
            require_range(response, offset, offset + size, file.size)
        except BadRanges as error:
            # Bytes near the start can be read without ranges, too.
            skip = offset
            if response.status_code != 200 or offset + size > _MAX_SKIP:
                raise FetchError(
                    f"{shown(url)!r} cannot be read in parts: {error}. Fetch the whole file instead."
                ) from error
        data = bytearray()
        for chunk in connection.body(response):
            data += chunk
            if len(data) >= skip + size:
                break

    if len(data) < skip + size:
        raise FetchError(f"{shown(url)!r} ends early: expected {size} bytes at {offset}, found {len(data) - skip}.")

    return bytes(data[skip : skip + size])
