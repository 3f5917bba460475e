"""Connections of urllib3 that check the address they reach, keep deadlines, and stop when another thread says so."""

from __future__ import annotations

import http.client
import io
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lading.errors import FetchError, LadingError, causes_of
from lading.sources.web.redirects import shown
from lading.sources.web.responses import Unavailable, printable
from lading.sources.web.tls import lasting_fault

if TYPE_CHECKING:
    from urllib3.util import Url

_SLICE = 100
"""The milliseconds between two checks of a request that waits for data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """The timeouts and retries of requests; times are in seconds."""

    connect: float = 15
    """The time to connect, TLS included."""
    answer: float = 60
    """The time until all headers of a response arrive, and then between two parts of its body."""
    silence: float = 30
    """The time without a single byte."""
    window: float = 30
    """The time over which the throughput is measured."""
    min_rate: float = 4096
    """The least throughput in bytes per second, over all connections of a source."""
    attempts: int = 6
    """The most consecutive failures of requests for the same bytes."""
    backoff: float = 0.5
    """The longest first wait between two attempts, doubled each time; waits are random, from zero to that."""
    max_wait: float = 60
    """The longest wait, even if a server asks for more (``Retry-After``)."""


class StoppedError(FetchError):
    """A request that was stopped from another thread."""

    def __init__(self) -> None:
        super().__init__("The request was stopped, as its result is not needed any more or its source was closed.")


class Request:
    """A request in progress."""

    def __init__(
        self, url: Url, timeouts: Timeouts, *, stop: threading.Event, check_peer: Callable[[str], None]
    ) -> None:
        """
        :param stop: the event that stops it, from any thread.
        :param check_peer: checks the address of a new connection, before data is sent on it.
        """
        self.url = url
        self.timeouts = timeouts
        self.check_peer = check_peer
        self.connecting = False
        self.body: Body
        self._stop = stop
        self.restart()

    def restart(self) -> None:
        """Restart the time until which something useful has to arrive."""
        self._until = time.monotonic() + self.timeouts.answer

    def check(self, silent_since: float = float("inf")) -> None:
        """Check that the request may go on.

        :raises StoppedError: it was stopped.
        :raises Unavailable: its time is over, or nothing came since ``silent_since``.
        """
        timeouts, now = self.timeouts, time.monotonic()
        if self._stop.is_set():
            raise StoppedError
        if now > self._until:
            raise Unavailable(f"{self.url.host} sent no useful data within {timeouts.answer:g} s")
        if now > silent_since + timeouts.silence:
            raise Unavailable(f"{self.url.host} was silent for {timeouts.silence:g} s")

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Make this the request of the thread's connections during the block; translate errors as :meth:`errors`."""
        _here.request = self
        try:
            with self.errors():
                yield
        finally:
            _here.request = None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Translate the errors of the network that are raised in the block.

        :raises FetchError: the error is permanent.
        :raises Unavailable: it is transient.
        """
        from urllib3.exceptions import HTTPError, NewConnectionError
        from urllib3.exceptions import TimeoutError as Timeout

        try:
            yield
        except LadingError:
            raise
        except (HTTPError, http.client.HTTPException, OSError) as error:
            host, first = str(self.url.host), list(causes_of(error))[-1]
            if self.connecting and (fault := lasting_fault(error, host)):
                raise FetchError(f"{shown(self.url)!r} could not be fetched: {fault}") from error
            if isinstance(error, Timeout) and not isinstance(error, NewConnectionError):
                reason = f"did not accept a connection within {self.timeouts.connect:g} s"
            elif isinstance(first, http.client.IncompleteRead):
                reason = "closed the connection before the end of its answer"
            else:
                reason = f"failed: {printable(' '.join(str(first).split()), 200) or type(first).__name__}"
            raise Unavailable(f"{host} {reason}") from error


class _Here(threading.local):
    request: Request | None = None


_here = _Here()


_LARGE, _AT_ONCE = 64 << 10, 512 << 10
"""The bytes of a buffer that is worth the wait for many bytes at once, and the most to wait for."""


class _Wire(io.RawIOBase):
    """The bytes that a socket receives for a request.

    The timeout of a socket restarts with each byte, even with one that is not a part of the file, and no other thread
    can end its wait.
    """

    def __init__(self, raw: io.RawIOBase, sock: Any, request: Request) -> None:
        self.ended = False
        self._raw = raw  # which keeps the socket open
        self._sock = sock
        self._timeout = sock.gettimeout()
        self._request = request
        self._least = 1
        sock.settimeout(0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        began = time.monotonic()
        while True:
            self._request.check(began)
            try:
                count: int = self._sock.recv_into(buffer)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._await(len(buffer))
                poll = select.poll()
                poll.register(self._sock, select.POLLIN)
                poll.poll(_SLICE)
            else:
                self.ended = not count
                return count

    def _await(self, size: int) -> None:
        """Let the kernel wake this thread for many bytes at once, of a buffer that is to be filled.

        Each wake-up costs as much as a copy of 64 KiB. What has arrived is read after a slice of time in any case. A
        TLS socket hides how many bytes are to come.
        """
        least = min(size, _AT_ONCE) if size >= _LARGE and not isinstance(self._sock, ssl.SSLSocket) else 1
        if least != self._least:
            with suppress(OSError):  # a system without it
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            self._least = least

    def close(self) -> None:
        if not self.closed:
            self._await(0)
            with suppress(OSError):
                self._sock.settimeout(self._timeout)
            self._raw.close()
        super().close()


class Body(http.client.HTTPResponse):
    """A body that is read without a copy, and no further than has arrived."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        request = _here.request
        assert request is not None
        self._wire = _Wire(self.fp.detach(), sock, request)
        self.fp = io.BufferedReader(self._wire)
        request.body = self

    def begin(self) -> None:
        """Read the headers; http.client is content with a part of them, or with two lengths of the body.

        :raises HTTPException: they end early.
        :raises HTTPError: they are not valid.
        """
        from urllib3.util.response import assert_header_parsing

        super().begin()
        if self._wire.ended:
            raise http.client.RemoteDisconnected("the headers end early")
        assert_header_parsing(self.msg)
        if self.chunked and "content-length" in self.headers:
            raise http.client.HTTPException("the answer has two lengths")

    def read_some(self, into: memoryview) -> int:
        """Read at most ``len(into)`` bytes by at most one read of the socket, and return their number; 0 at the end.

        :raises IncompleteRead: the connection was closed before the end.
        """
        if self.isclosed() or self.chunked or self.length == 0:
            data = self.read1(len(into))
            into[: len(data)] = data
            return len(data)

        count = self.fp.readinto1(into if self.length is None else into[: self.length])
        if self.length is not None:
            if not count:
                raise http.client.IncompleteRead(b"", self.length)
            self.length -= count
        if not (count if self.length is None else self.length):
            self.close()

        return count


class Guarded:
    """A mixin for the connections of urllib3: plain, TLS and SOCKS ones."""

    response_class = Body

    def _new_conn(self) -> Any:
        request = _here.request
        assert request is not None
        sock = super()._new_conn()  # type: ignore[misc]
        try:
            request.check()
            request.check_peer(sock.getpeername()[0])
        except BaseException:
            sock.close()
            raise

        return sock

    def connect(self) -> None:
        request = _here.request
        assert request is not None
        request.connecting = True
        super().connect()  # type: ignore[misc]
        request.connecting = False
