"""The bytes of one file: in ranges over several connections, or in one stream, hashed as they come.

Ranges are asked for only where it can be known that all of them are of the same content: by a strong validator
(``If-Range``), or since the digest of the whole is published. Where a server does not do ranges right, it is asked for
the whole.

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
from lading.sources.web.responses import BadRanges, Unavailable, a_web_page, require_range, require_same
from lading.system.threads import Worker

if TYPE_CHECKING:
    import httpx2 as httpx

_HTML = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
_MAX_SKIP = 64 << 20
"""Bytes that are read past where a server does not do ranges."""
_STEP = 1 << 20
_GOOD = 1 << 20
"""Bytes after which an attempt that failed in the end is not counted as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Concurrency:
    """How much is done at once."""

    connections: int = 32
    """At most; fewer where there are fewer pieces."""
    piece: int | None = None
    """Bytes of a range; default: 8 MiB, and 16 MiB for files of a GiB and more."""
    notes_every: float = 2
    """Seconds between two notes of what is on the disk."""
    undeclared: int = 64 << 30
    """Bytes of a file whose size the server does not say, at most."""

    def piece_of(self, size: int) -> int:
        return self.piece or (8 << 20 if size < 1 << 30 else 16 << 20)


class WorkerGroup:
    """Threads that work together: when one fails, or the block is left, all of them end."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.connections: list[Connection] = []
        self._threads: list[Worker] = []
        self._errors: list[BaseException] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        # A thread may just be on its way to the next request. One that is stuck where nothing wakes it (the resolver of
        # names) is not waited for: it finds that it was stopped before it writes anything.
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
            except BaseException as error:  # it is raised again where the caller can see it
                self._errors.append(error)
                self.stop.set()

        thread = Worker(run, f"lading-fetch-{len(self._threads)}")
        self._threads.append(thread)
        thread.start()

    def watch(self, tick: Callable[[], None]) -> None:
        """Wait until all threads are done; ``tick`` is called meanwhile, in this thread, and may start more of them.

        :raises BaseException: what one of them raised first.
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
    """A range of the file: ``at`` is how far it has come."""

    __slots__ = ("_hasher", "_known", "_lock", "at", "end", "start")

    def __init__(self, start: int, end: int, known: Range | None = None) -> None:
        """:param known: what is there of it already: all."""
        self.start = start
        self.end = end
        self.at = start if known is None else end
        self._known = known
        self._hasher = blake3()
        self._lock = threading.Lock()

    def arrived(self, chunk: bytes) -> None:
        """Count bytes that are in the file now."""
        with self._lock:
            self._hasher.update(chunk)
            self.at += len(chunk)

    @property
    def done(self) -> Range | None:
        """The range of it that is in the file; ``None`` where that is empty."""
        if self._known is not None:
            return self._known
        with self._lock:
            return Range(self.start, self.at, self._hasher.hexdigest()) if self.at > self.start else None


class Download:
    """One file on its way into a :class:`Partial`."""

    def __init__(
        self,
        client: Client,
        partial: Partial,
        *,
        effort: Concurrency,
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        """:param advance: called in the calling thread with the number of bytes that have come since, also negative."""
        self._client = client
        self._partial = partial
        self._identity = partial.identity
        self._effort = effort
        self._advance = advance
        self._url = client.parse(partial.identity.url)
        self._what = repr(shown(self._url))
        self._pieces: list[_Piece] = []
        self._first = 0
        """Of the pieces, the first one that may not be done."""
        self.reported = 0
        """Bytes that `advance` was told of."""

    @property
    def done(self) -> list[Range]:
        """The ranges that are in the file."""
        return [done for piece in self._pieces if (done := piece.done) is not None]

    def in_ranges(self) -> str:
        """Fetch the missing ranges; returns the SHA-256 of the whole.

        :raises BadRanges: the server does not do them right.
        :raises LadingError: it cannot be fetched.
        :raises OSError: it cannot be written.
        """
        size = self._identity.size
        assert size is not None
        self._pieces = list(_cut(size, self._effort.piece_of(size), self._partial.done))
        waiting = iter([piece for piece in self._pieces if piece.at < piece.end])
        most = min(self._effort.connections, sum(piece.at < piece.end for piece in self._pieces))
        lock, begun, digest = threading.Lock(), threading.Event(), hashlib.sha256()

        def take() -> _Piece | None:
            with lock:
                return next(waiting, None)

        with WorkerGroup() as crew:
            started = 0

            def tick() -> None:
                nonlocal started
                # One goes ahead, and shows whether the server does ranges.
                wanted = most if begun.is_set() else min(most, 1)
                while started < wanted:
                    started += 1
                    crew.start(lambda: self._work(crew, take, begun))
                self._report(self._arrived())

            crew.start(lambda: self._hash(crew.stop, digest, size))
            crew.watch(tick)

        return digest.hexdigest()

    def as_a_whole(self) -> str:
        """Fetch the file in one stream; returns its SHA-256.

        :raises LadingError: it cannot be fetched.
        :raises OSError: it cannot be written.
        """
        piece = _Piece(0, 0)
        self._pieces = []
        digests: list[str] = []

        def work() -> None:
            with self._client.connection() as connection:
                crew.connections.append(connection)
                action = lambda: self._stream(connection, piece, crew.stop)  # noqa: E731
                digests.append(self._client.retry(action, what=self._what, stop=crew.stop))

        with WorkerGroup() as crew:
            crew.start(work)
            crew.watch(lambda: self._report(piece.at))

        return digests[0]

    def _arrived(self) -> int:
        return sum(piece.at - piece.start for piece in self._pieces)

    def _report(self, count: int) -> None:
        if count != self.reported:
            self._advance(count - self.reported)
            self.reported = count

    # --- in threads --------------------------------------------------------------------------------------------------

    def _work(self, crew: WorkerGroup, take: Callable[[], _Piece | None], begun: threading.Event) -> None:
        with self._client.connection() as connection:
            crew.connections.append(connection)
            while (piece := take()) is not None:
                self._fetch(connection, piece, crew.stop, begun)

    def _fetch(self, connection: Connection, piece: _Piece, stop: threading.Event, begun: threading.Event) -> None:
        before = piece.at

        def attempt() -> None:
            nonlocal before
            before = piece.at
            self._range(connection, piece, stop, begun)

        self._client.retry(attempt, what=self._what, stop=stop, progressed=lambda: piece.at - before >= _GOOD)

    def _range(self, connection: Connection, piece: _Piece, stop: threading.Event, begun: threading.Event) -> None:
        headers = {"Range": f"bytes={piece.at}-{piece.end - 1}"}
        if self._identity.etag is not None:
            headers["If-Range"] = self._identity.etag

        with connection.open("GET", self._url, headers) as response:
            require_same(response, self._identity.etag, self._url)
            require_range(response, piece.at, piece.end, self._identity.size)
            begun.set()
            for chunk in connection.body(response, self._arrived):
                if len(chunk) > piece.end - piece.at:
                    raise BadRanges("a range is longer than it says")
                self._write(chunk, piece.at, stop)
                piece.arrived(chunk)

        if piece.at < piece.end:
            raise Unavailable(f"{self._url.host} sent {piece.end - piece.at} bytes less than it said")

    def _stream(self, connection: Connection, piece: _Piece, stop: threading.Event) -> str:
        size, piece.at = self._identity.size, 0
        limit = self._effort.undeclared if size is None else size
        digest = hashlib.sha256()
        os.ftruncate(self._partial.fd, 0)

        with connection.open("GET", self._url, {}) as response:
            if response.status_code != 200:
                raise FetchError(f"{self._what} answers {response.status_code} to a request for the whole file.")
            require_same(response, self._identity.etag, self._url)
            length = response.headers.get("content-length")
            if size is not None and length is not None and length != str(size):
                raise FetchError(f"{self._what} has {length[:20]} bytes, where {size} were published. Try again.")
            for chunk in connection.body(response):
                if piece.at == 0 and _HTML.match(chunk):
                    raise a_web_page(self._url)
                if piece.at + len(chunk) > limit:
                    said = "that were published" if size is not None else "that a file without a declared size may have"
                    raise FetchError(f"{self._what} sends more than the {limit} bytes {said}.")
                self._write(chunk, piece.at, stop)
                digest.update(chunk)
                piece.at += len(chunk)

        if size is not None and piece.at < size:
            raise Unavailable(f"{self._url.host} sent {size - piece.at} bytes less than were published")

        return digest.hexdigest()

    def _write(self, chunk: bytes, at: int, stop: threading.Event) -> None:
        memory = memoryview(chunk)
        while memory:
            if stop.is_set():
                raise Stopped
            count = os.pwrite(self._partial.fd, memory, at)
            memory, at = memory[count:], at + count

    def _hash(self, stop: threading.Event, digest: hashlib._Hash, size: int) -> None:
        """Follow the front of what has come, while it is in memory still; and keep the notes."""
        buffer, at, noted = bytearray(_STEP), 0, time.monotonic()
        fd = self._partial.fd
        while at < size:
            if stop.is_set():
                raise Stopped
            front = self._front()
            if at < front:
                count = os.preadv(fd, [memoryview(buffer)[: min(_STEP, front - at)]], at)
                if count == 0:
                    raise OSError(errno.EIO, "a part of the file is gone", str(self._partial.path))
                digest.update(memoryview(buffer)[:count])
                at += count
            else:
                stop.wait(0.01)
            if time.monotonic() - noted >= self._effort.notes_every:
                self._partial.note(self.done)
                noted = time.monotonic()

    def _front(self) -> int:
        while self._first + 1 < len(self._pieces) and self._pieces[self._first].at == self._pieces[self._first].end:
            self._first += 1

        return self._pieces[self._first].at


def _cut(size: int, most: int, done: Sequence[Range]) -> Iterator[_Piece]:
    """Pieces that cover a file: those that are done, and between them what is missing, at most ``most`` bytes each."""
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
    """Exactly ``size`` bytes of a file, from ``offset`` on.

    :raises FetchError: the server does not do ranges, and they are not near the start; or they have changed.
    :raises Unavailable: another attempt may succeed.
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
            # The start of a file can be had without ranges, too.
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
