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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.connections: list[Connection] = []
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
            for connection in list(self.connections):
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
        partial: Partial,
        *,
        concurrency: Concurrency,
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        """:param advance: called in the calling thread with the change in the number of bytes, maybe negative."""
        self._client = client
        self._partial = partial
        self._identity = partial.identity
        self._concurrency = concurrency
        self._advance = advance
        self._url = client.parse(partial.identity.url)
        self._what = repr(shown(self._url))
        self._pieces: list[_Piece] = []
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
        waiting = iter([piece for piece in self._pieces if piece.at < piece.end])
        most = min(self._concurrency.connections, sum(piece.at < piece.end for piece in self._pieces))
        lock, ranges_work, digest = threading.Lock(), threading.Event(), hashlib.sha256()

        def take() -> _Piece | None:
            with lock:
                return next(waiting, None)

        with WorkerGroup() as group:
            started = 0

            def tick() -> None:
                nonlocal started
                # The first connection shows whether the server supports ranges.
                wanted = most if ranges_work.is_set() else min(most, 1)
                while started < wanted:
                    started += 1
                    group.start(lambda: self._fetch_pieces(group, take, ranges_work))
                self._report(self._arrived())

            group.start(lambda: self._hash(group.stop, digest, size))
            group.watch(tick)

        return digest.hexdigest()

    def fetch_whole(self) -> str:
        """Fetch the file in one stream; return its SHA-256.

        :raises LadingError: the file cannot be fetched.
        :raises OSError: the file cannot be written.
        """
        piece = _Piece(0, 0)
        self._pieces = []
        digests: list[str] = []

        def work() -> None:
            with self._client.connection() as connection:
                group.connections.append(connection)
                action = lambda: self._stream(connection, piece, group.stop)  # noqa: E731
                digests.append(self._client.retry(action, what=self._what, stop=group.stop))

        with WorkerGroup() as group:
            group.start(work)
            group.watch(lambda: self._report(piece.at))

        return digests[0]

    def _arrived(self) -> int:
        return sum(piece.at - piece.start for piece in self._pieces)

    def _report(self, count: int) -> None:
        if count != self.reported:
            self._advance(count - self.reported)
            self.reported = count

    # --- in threads --------------------------------------------------------------------------------------------------

    def _fetch_pieces(
        self, group: WorkerGroup, take: Callable[[], _Piece | None], ranges_work: threading.Event
    ) -> None:
        with self._client.connection() as connection:
            group.connections.append(connection)
            while (piece := take()) is not None:
                self._fetch_piece(connection, piece, group.stop, ranges_work)

    def _fetch_piece(
        self, connection: Connection, piece: _Piece, stop: threading.Event, ranges_work: threading.Event
    ) -> None:
        before = piece.at

        def attempt() -> None:
            nonlocal before
            before = piece.at
            self._fetch_range(connection, piece, stop, ranges_work)

        self._client.retry(attempt, what=self._what, stop=stop, progressed=lambda: piece.at - before >= _GOOD)

    def _fetch_range(
        self, connection: Connection, piece: _Piece, stop: threading.Event, ranges_work: threading.Event
    ) -> None:
        headers = {"Range": f"bytes={piece.at}-{piece.end - 1}"}
        if self._identity.etag is not None:
            headers["If-Range"] = self._identity.etag

        with connection.open("GET", self._url, headers) as response:
            require_same(response, self._identity.etag, self._url)
            require_range(response, piece.at, piece.end, self._identity.size)
            ranges_work.set()
            for chunk in connection.body(response, self._arrived):
                if len(chunk) > piece.end - piece.at:
                    raise BadRanges("a range is longer than its Content-Range")
                self._write(chunk, piece.at, stop)
                piece.arrived(chunk)

        if piece.at < piece.end:
            raise Unavailable(f"{self._url.host} sent {piece.end - piece.at} bytes less than it declared")

    def _stream(self, connection: Connection, piece: _Piece, stop: threading.Event) -> str:
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
                self._write(chunk, piece.at, stop)
                digest.update(chunk)
                piece.at += len(chunk)

        if size is not None and piece.at < size:
            raise Unavailable(f"{self._url.host} sent {size - piece.at} bytes less than the published size")

        return digest.hexdigest()

    def _write(self, chunk: bytes, at: int, stop: threading.Event) -> None:
        memory = memoryview(chunk)
        while memory:
            if stop.is_set():
                raise Stopped
            count = os.pwrite(self._partial.fd, memory, at)
            memory, at = memory[count:], at + count

    def _hash(self, stop: threading.Event, digest: hashlib._Hash, size: int) -> None:
        """Hash the contiguous bytes from the start soon after they arrive, while they are in memory; save the notes."""
        buffer, at, noted = bytearray(_STEP), 0, time.monotonic()
        fd = self._partial.fd
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


def read_range(connection: Connection, url: httpx.URL, file: RemoteFile, offset: int, size: int) -> bytes:
    """Read exactly ``size`` bytes of a file, starting at ``offset``.

    :raises FetchError: the server does not support ranges, and the bytes are far from the start; or the content has
        changed.
    :raises Unavailable: the error is transient.
    """
    headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
    if file.etag is not None:
        headers["If-Range"] = file.etag

    with connection.open("GET", url, headers) as response:
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
