"""The HTTP transport: connections, deadlines, redirects, credentials and retries.

urllib3 pools the connections, and speaks TLS and to proxies. Proxies (``HTTPS_PROXY``, ``NO_PROXY`` …) and certificates
(``SSL_CERT_FILE``, ``SSL_CERT_DIR``) come from the environment. urllib3 is imported with the first request, as most
commands send none.
"""

from __future__ import annotations

import http.client
import io
import logging
import os
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin

from lading.errors import AddressError, FetchError, LadingError, causes_of
from lading.sources.web.proxies import new_manager, proxy_of
from lading.sources.web.redirects import MAX_REDIRECTS, Origin, RedirectPolicy, check_url, shown
from lading.sources.web.responses import Answer, HeadRefused, Unavailable, printable, refusal, require_success
from lading.sources.web.tls import lasting_fault
from lading.system.version import __version__

if TYPE_CHECKING:
    from urllib3 import PoolManager
    from urllib3.util import Url

T = TypeVar("T")

_log = logging.getLogger("lading")

_REDIRECTS = {301, 302, 303, 307, 308}
_HEADERS = {
    "User-Agent": f"lading/{__version__}",
    "Accept": "*/*",
    "Accept-Encoding": "identity",  # a range of a compressed body is of no use
}


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
    """A request that was ended from another thread."""

    def __init__(self) -> None:
        super().__init__("The request was ended, as its result is not needed any more or its source was closed.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A URL that a file has now, and the headers for the origin of that URL."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    expires: float | None = None
    """The time until which it is valid, in seconds since 1970; ``None`` if the server does not say."""


class Resource:
    """A file at a source, whose location is found when it is needed, and again when it fails or has expired."""

    def __init__(
        self, label: str, locate: Callable[[], Location], *, refused: Callable[[Answer], LadingError] = refusal
    ) -> None:
        """
        :param label: the address of the file without secrets, for messages.
        :param locate: returns a location that is valid now.
        :param refused: returns the error for a response whose status is that of a permanent failure.
        """
        self.label = label
        self.locate = locate
        self.refused = refused
        self.kept: Location | None = None
        """The location that answered last, behind all redirects, so that no other range follows them again."""


class Transport:
    """The connections of one source, and what is learned about redirects and addresses on them.

    It is safe to use from several threads.
    """

    def __init__(self, *, timeouts: Timeouts | None = None, plain: bool = False) -> None:
        """Create the transport, without connecting.

        :param plain: whether to allow plain http to other machines, as the user's own address has it.
        """
        self.timeouts = timeouts or Timeouts()
        self.received = 0
        """The bytes of all bodies so far."""
        self._plain = plain
        self._policy = RedirectPolicy(plain=plain)
        self._managers: dict[str | None, PoolManager] = {}
        self._lock = threading.Lock()
        self._watch = _Watch()

    # --- ends of requests --------------------------------------------------------------------------------------------

    def new_stop(self) -> threading.Event:
        """Return an event for the requests of one task, which :meth:`close` sets, too."""
        return self._watch.new_stop()

    def end(self, stop: threading.Event) -> None:
        """End a task: set its event, and end its requests in progress."""
        self._watch.end(stop)

    def close(self) -> None:
        """End all requests, and close all connections. A later request opens connections again."""
        self._watch.end_all()
        with self._lock:
            managers, self._managers = self._managers, {}
        for manager in managers.values():
            manager.clear()

    def retry(
        self,
        action: Callable[[], T],
        *,
        what: str,
        stop: threading.Event | None = None,
        progressed: Callable[[], bool] = lambda: False,
    ) -> T:
        """Return ``action()``, retried with growing waits as long as it raises :class:`Unavailable`.

        :param what: the requested object, for messages.
        :param stop: the event of the task that the requests of ``action`` belong to.
        :param progressed: returns whether the last attempt made progress, which resets the count of failures.

        :raises FetchError: all attempts failed.
        :raises StoppedError: ``stop`` was set.
        """
        stop = self.new_stop() if stop is None else stop
        failed = 0
        while not stop.is_set():
            _here.stop = stop
            try:
                return action()
            except Unavailable as error:
                if stop.is_set():
                    break
                failed = 1 if progressed() else failed + 1
                if failed >= self.timeouts.attempts:
                    raise FetchError(
                        f"{what} could not be fetched: {error.reason} (tried {failed} times). Try again later."
                    ) from error.__cause__
                wait = random.uniform(0, self.timeouts.backoff * 2 ** (failed - 1))
                wait = min(max(wait, error.retry_after or 0), self.timeouts.max_wait)
                _log.info("%s: %s; trying again in %.1f s", what, error.reason, wait)
                stop.wait(wait)
            finally:
                _here.stop = None

        raise StoppedError

    # --- requests ----------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self, method: str, resource: Resource, headers: Mapping[str, str] | None = None) -> Iterator[Response]:
        """Send a request and return the response before its body is read; follow redirects.

        :raises Unavailable: the error is transient.
        :raises CheckpointNotFoundError: the file does not exist.
        :raises PolicyError: the server, or lading, refuses the request.
        :raises FetchError: the status is neither 200 nor 206, or there is another error.
        """
        kept = resource.kept
        if kept is None or (kept.expires is not None and kept.expires <= time.time()):
            response = self._follow(method, resource.locate(), resource, headers)
        else:
            try:
                response = self._follow(method, kept, resource, headers)
            except (HeadRefused, Unavailable, LadingError):
                resource.kept = None
                location = resource.locate()
                if parse_url(location.url).url == kept.url:  # neither behind a redirect nor signed
                    raise
                response = self._follow(method, location, resource, headers)
        resource.kept = response.location
        try:
            yield response
        finally:
            response.close()

    def _follow(
        self, method: str, location: Location, resource: Resource, headers: Mapping[str, str] | None
    ) -> Response:
        """Send a request, follow redirects, and return the successful response."""
        start = url = parse_url(location.url)
        check_url(url, plain=self._plain)
        for _ in range(MAX_REDIRECTS + 1):
            own = location.headers if Origin.of(url) == Origin.of(start) else {}
            response = self._send(method, url, {**_HEADERS, **own, **(headers or {})})
            try:
                target = response.headers.get("location")
                if response.status not in _REDIRECTS:
                    require_success(response, resource.refused)
                    response.location = replace(location, url=url.url, headers=own)
                    return response
                if not target:
                    raise FetchError(f"{shown(url)!r} answers with a redirect ({response.status}) without a location.")
            except BaseException:
                response.close()
                raise
            response.close()
            url, came_from = _target(url, target), url
            check_url(url, came_from=came_from, plain=self._plain)

        raise FetchError(f"{shown(start)!r} redirects more than {MAX_REDIRECTS} times, last to {shown(url)!r}.")

    def _send(self, method: str, url: Url, headers: Mapping[str, str]) -> Response:
        from urllib3 import Timeout

        timeouts = self.timeouts
        proxy = proxy_of(url)
        exchange = _Exchange(
            url,
            timeouts,
            stop=_here.stop or self.new_stop(),
            check_peer=lambda address: self._check_peer(url, address if proxy is None else None),
        )
        _here.exchange = exchange
        self._watch.add(exchange)
        try:
            with exchange.errors():
                answer = self._manager(proxy).urlopen(
                    method,
                    url.url,
                    headers=headers,
                    redirect=False,
                    retries=False,
                    preload_content=False,
                    decode_content=False,
                    timeout=Timeout(connect=timeouts.connect, read=timeouts.silence),
                )
        except BaseException:
            exchange.close()
            raise
        finally:
            _here.exchange = None

        return Response(answer, method, url, exchange, self)

    def _check_peer(self, url: Url, address: str | None) -> None:
        with self._lock:
            if address is None:
                self._policy.check_host(url)
            else:
                self._policy.check_address(url, address)

    def _manager(self, proxy: str | None) -> PoolManager:
        with self._lock:
            if proxy not in self._managers:
                self._managers[proxy] = new_manager(proxy, _Guarded)

            return self._managers[proxy]


class Response:
    """The response to a request, whose body is read as it arrives, without decoding."""

    location: Location
    """The URL that answered, behind all redirects."""

    def __init__(self, answer: Any, method: str, url: Url, exchange: _Exchange, transport: Transport) -> None:
        self.status: int = answer.status
        self.reason: str = answer.reason or ""
        self.headers: Mapping[str, str] = answer.headers  # ignores case
        self.method = method
        self.url = url
        self._answer = answer
        self._exchange = exchange
        self._transport = transport
        self._window = time.monotonic(), transport.received
        exchange.restart()

    def read_into(self, into: memoryview) -> int:
        """Read what has arrived of the body, at most ``len(into)`` bytes, and return their number; 0 at its end.

        :param into: not empty.

        :raises Unavailable: the connection broke off, or the throughput is too low.
        """
        body = self._exchange.body
        assert body is not None
        with self._exchange.errors():
            count = body.read_some(into)
        self._exchange.restart()
        self._transport.received += count
        self._check_rate()

        return count

    def _check_rate(self) -> None:
        timeouts, now = self._transport.timeouts, time.monotonic()
        began, before = self._window
        if now - began < timeouts.window:
            return
        count = self._transport.received
        rate = (count - before) / (now - began)
        if rate < timeouts.min_rate:
            raise Unavailable(
                f"{self.url.host} sent {rate:.0f} bytes a second for {now - began:.0f} s, expected at least "
                f"{timeouts.min_rate:.0f}"
            )
        self._window = now, count

    def close(self) -> None:
        """Give the connection back, or close it if a part of the body was not read."""
        self._exchange.close()
        body = self._exchange.body
        if body is not None and (body.isclosed() or body.length == 0):
            body.close()
            self._answer.release_conn()
        else:
            self._answer.close()


def parse_url(url: str) -> Url:
    """Parse a URL as the transport requests it.

    :raises AddressError: ``url`` is not valid.
    """
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url as parse

    try:
        return parse(url)
    except LocationParseError:
        raise AddressError(f"{shown(url)[:200]!r} is not a URL.") from None


def _target(url: Url, location: str) -> Url:
    """Return the URL that ``url`` redirects to."""
    with suppress(UnicodeError):  # http.client decodes headers as Latin-1
        location = location.encode("latin-1").decode()
    try:
        return parse_url(urljoin(url.url, location))._replace(fragment=None)
    except (AddressError, ValueError):
        raise FetchError(f"{shown(url)!r} redirects to {shown(location)[:200]!r}, which is not a URL.") from None


# --- requests in progress --------------------------------------------------------------------------------------------


class _Here(threading.local):
    exchange: _Exchange | None = None
    """The request that this thread sends."""
    stop: threading.Event | None = None
    """The event of the task that this thread works for."""


_here = _Here()


class _Exchange:
    """A request in progress, which other threads can end."""

    def __init__(
        self, url: Url, timeouts: Timeouts, *, stop: threading.Event, check_peer: Callable[[str], None]
    ) -> None:
        """:param check_peer: checks the address of a new connection, before data is sent on it."""
        self.url = url
        self.timeouts = timeouts
        self.stop = stop
        self.check_peer = check_peer
        self.body: _Body | None = None
        self.connecting = False
        self.late = False
        self._twin: socket.socket | None = None
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Restart the time until which something has to arrive.

        The timeout of a socket restarts with each byte, even with one that is not a part of the file.
        """
        self.until = time.monotonic() + self.timeouts.answer

    def use(self, sock: Any) -> None:
        """Let the request be ended by its socket.

        :raises StoppedError: it was ended meanwhile.
        """
        with self._lock:
            if self._twin is None:
                # A descriptor of its own: the object of the socket changes with TLS, and may be closed early.
                self._twin = socket.socket(fileno=os.dup(sock.fileno()))
        if self.stop.is_set():
            raise StoppedError

    def end(self) -> None:
        """End the request, from another thread."""
        with self._lock, suppress(OSError):
            if self._twin is not None:
                self._twin.shutdown(socket.SHUT_RDWR)  # wakes a blocked reader, unlike `close`

    def close(self) -> None:
        self.until = float("inf")
        with self._lock:
            if self._twin is not None:
                self._twin.close()
                self._twin = None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Translate the errors of the network that are raised in the block.

        :raises StoppedError: the request was ended.
        :raises FetchError: the error is permanent.
        :raises Unavailable: it is transient.
        """
        from urllib3.exceptions import HTTPError

        try:
            yield
        except (HTTPError, http.client.HTTPException, OSError) as error:
            if isinstance(error, LadingError):
                raise
            if self.stop.is_set():
                raise StoppedError from error
            host = str(self.url.host)
            if self.connecting and (fault := lasting_fault(error, host)):
                raise FetchError(f"{shown(self.url)!r} could not be fetched: {fault}") from error
            raise Unavailable(f"{host} {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        from urllib3.exceptions import NewConnectionError
        from urllib3.exceptions import TimeoutError as Timeout

        if self.late:
            return f"sent no useful data within {self.timeouts.answer:g} s"
        if isinstance(error, (Timeout, TimeoutError)) and not isinstance(error, NewConnectionError):
            if self.connecting:
                return f"did not accept a connection within {self.timeouts.connect:g} s"
            return f"was silent for {self.timeouts.silence:g} s"
        first = list(causes_of(error))[-1]
        if isinstance(first, http.client.IncompleteRead):
            return "closed the connection before the end of its answer"

        return f"failed: {printable(' '.join(str(first).split()), 200) or type(first).__name__}"


class _Watch:
    """The requests in progress, and the thread that ends those whose time is over."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._exchanges: weakref.WeakSet[_Exchange] = weakref.WeakSet()
        self._stops: weakref.WeakSet[threading.Event] = weakref.WeakSet()
        self._thread: threading.Thread | None = None

    def new_stop(self) -> threading.Event:
        stop = threading.Event()
        with self._changed:
            self._stops.add(stop)

        return stop

    def add(self, exchange: _Exchange) -> None:
        """Add a request.

        :raises StoppedError: its task was ended.
        """
        with self._changed:
            if exchange.stop.is_set():
                raise StoppedError
            self._exchanges.add(exchange)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="lading-deadline", daemon=True)
                self._thread.start()
            self._changed.notify()

    def end(self, stop: threading.Event) -> None:
        with self._changed:
            stop.set()
            for exchange in self._exchanges:
                if exchange.stop is stop:
                    exchange.end()

    def end_all(self) -> None:
        with self._changed:
            for stop in list(self._stops):
                self.end(stop)

    def _run(self) -> None:
        with self._changed:
            while self._changed.wait_for(self._open, timeout=1):  # requests often follow each other
                now = time.monotonic()
                for exchange in self._open():
                    if exchange.until <= now:
                        exchange.late = True
                        exchange.end()
                self._changed.wait(max(0.01, min((each.until for each in self._open()), default=now) - now))
            self._thread = None

    def _open(self) -> list[_Exchange]:
        return [exchange for exchange in self._exchanges if exchange.until < float("inf")]


class _Lines:
    """The lines of headers, of which the last one is kept."""

    def __init__(self, fp: io.BufferedReader) -> None:
        self.last = b""
        self.close = fp.close
        self._fp = fp

    def readline(self, limit: int = -1, /) -> bytes:
        self.last = self._fp.readline(limit)

        return self.last


class _Body(http.client.HTTPResponse):
    """A body that is read without a copy, and no further than has arrived."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if _here.exchange is not None:
            _here.exchange.body = self

    def begin(self) -> None:
        """Read the headers; http.client is content with a part of them, or with two lengths of the body.

        :raises HTTPException: they end early, or are not valid.
        """
        from urllib3.util.response import assert_header_parsing

        fp, lines = self.fp, _Lines(self.fp)
        self.fp = lines  # type: ignore[assignment]
        try:
            super().begin()
        finally:
            if not self.isclosed():
                self.fp = fp
        if not lines.last:
            raise http.client.RemoteDisconnected("the headers of the answer end early")
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


class _Guarded:
    """What a connection does for the request in progress: it checks the address, and can be ended.

    It is mixed into the classes of urllib3: of plain, TLS and SOCKS connections.
    """

    response_class = _Body
    sock: Any

    def _new_conn(self) -> Any:
        exchange = _here.exchange
        assert exchange is not None
        sock = super()._new_conn()  # type: ignore[misc]
        try:
            exchange.use(sock)
            exchange.check_peer(sock.getpeername()[0])
        except BaseException:
            sock.close()
            raise

        return sock

    def connect(self) -> None:
        exchange = _here.exchange
        assert exchange is not None
        exchange.connecting = True
        super().connect()  # type: ignore[misc]
        exchange.connecting = False

    def request(self, *args: Any, **options: Any) -> None:
        if self.sock is not None and _here.exchange is not None:
            _here.exchange.use(self.sock)
        super().request(*args, **options)  # type: ignore[misc]
