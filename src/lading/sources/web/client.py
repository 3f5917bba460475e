"""Requests over https: connections, deadlines, redirects, credentials and retries.

The HTTP client is the one that huggingface_hub brings, ``httpx2`` or, before its version 2, ``httpx``, of which
nothing but connections and parsing is used. Proxies (``HTTPS_PROXY``, ``NO_PROXY`` …) and certificates
(``SSL_CERT_FILE``, ``SSL_CERT_DIR``) are taken from the environment, as that client does.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from lading.errors import AddressError, FetchError, LadingError, PolicyError
from lading.sources.proxies import require_proxies
from lading.sources.web.netrc import authorization
from lading.sources.web.redirects import MAX_REDIRECTS, Origin, RedirectPolicy, check_url, shown
from lading.sources.web.responses import HeadRefused, Unavailable, require_success
from lading.sources.web.tls import lasting_fault
from lading.system.version import __version__

if TYPE_CHECKING:
    import httpx2 as httpx

T = TypeVar("T")

_log = logging.getLogger("lading")

_REDIRECTS = {301, 302, 303, 307, 308}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long a server is waited for; times in seconds."""

    connect: float = 15
    """Until a connection is there, TLS included."""
    answer: float = 60
    """Until all headers of an answer are there, and then between two parts of its body, whatever else comes."""
    silence: float = 30
    """Without a single byte."""
    window: float = 30
    """Over which the throughput is measured, …"""
    min_rate: float = 4096
    """… and what it must be at least, in bytes a second, over all connections for a file."""
    attempts: int = 6
    """Requests for the same bytes that may fail one after another."""
    backoff: float = 0.5
    """The first wait between two of them, doubled each time and drawn at random between nothing and that."""
    max_wait: float = 60
    """At most this long, whatever a server asks for (``Retry-After``)."""


class Stopped(Exception):  # noqa: N818 — the error is another one's
    """The work was stopped from outside; nobody waits for the result."""


@lru_cache(maxsize=1)
def http_library() -> Any:
    """``httpx2``, or ``httpx``, whose names used here are the same."""
    try:
        return import_module("httpx2")
    except ImportError:
        return import_module("httpx")


class Client:
    """Makes requests for one source: what it has learnt of redirects and addresses holds for all of its connections.

    Safe to use from several threads, of which each has a :class:`Connection` of its own while it needs one.
    """

    def __init__(self, uri: str, *, patience: Timeouts) -> None:
        """
        :raises PolicyError: ``uri`` is not of a kind that may be asked.
        :raises SettingsError: the environment names a proxy that cannot be used.
        """
        self._library = http_library()
        require_proxies(self._library)
        self.patience = patience
        self.url = self.parse(uri)
        check_url(self.url)

        self._boundary = RedirectPolicy()
        self._authorization = authorization(self.url.host)
        self._locations: dict[str, httpx.URL] = {}
        """Where the redirects for a URL led to, so that not each range goes through all of them again."""
        self._tls: Any = None
        self._lock = threading.Lock()
        self._idle: list[Connection] = []

    def parse(self, url: str) -> httpx.URL:
        """:raises AddressError: ``url`` is none."""
        try:
            parsed: httpx.URL = self._library.URL(url)
        except self._library.InvalidURL as error:
            raise AddressError(f"{shown(url)[:200]!r} is not a URL: {error}.") from error

        return parsed

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection for the calling thread, which has it alone."""
        with self._lock:
            if self._tls is None:
                self._tls = self._library.create_ssl_context()  # the certificates of the world, read once
            connection = self._idle.pop() if self._idle else Connection(self, self._tls)
        try:
            yield connection
        finally:
            with self._lock:
                self._idle.append(connection)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def retry(
        self,
        action: Callable[[], T],
        *,
        what: str,
        stop: threading.Event | None = None,
        progressed: Callable[[], bool] = lambda: False,
    ) -> T:
        """``action()``, again and again as long as it is :class:`Unavailable`, with growing waits.

        :param progressed: whether the last attempt brought something, so that failures are counted anew.

        :raises FetchError: it stayed unavailable.
        :raises Stopped: ``stop`` was set meanwhile.
        """
        stop = threading.Event() if stop is None else stop
        failed = 0
        while not stop.is_set():
            try:
                return action()
            except Unavailable as error:
                if stop.is_set():
                    break
                failed = 1 if progressed() else failed + 1
                if failed >= self.patience.attempts:
                    raise FetchError(
                        f"{what} could not be fetched: {error.reason} (tried {failed} times). Try again later."
                    ) from error.__cause__
                wait = random.uniform(0, self.patience.backoff * 2 ** (failed - 1))
                wait = min(max(wait, error.retry_after or 0), self.patience.max_wait)
                _log.info("%s: %s; trying again in %.1f s", what, error.reason, wait)
                stop.wait(wait)

        raise Stopped

    def headers(self, url: httpx.URL) -> dict[str, str]:
        headers = {
            "User-Agent": f"lading/{__version__}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",  # a range of a compressed body is of no use
        }
        if self._authorization is not None and Origin.of(url) == Origin.of(self.url):
            headers["Authorization"] = self._authorization

        return headers

    def located(self, url: httpx.URL) -> httpx.URL:
        return self._locations.get(str(url), url)

    def locate(self, url: httpx.URL, location: httpx.URL | None) -> None:
        if location is None:
            self._locations.pop(str(url), None)
        elif location != url:
            self._locations[str(url)] = location

    def watch(self, url: httpx.URL, opened: Callable[[Any], None]) -> Callable[[str, dict[str, Any]], None]:
        """What the HTTP client calls as it goes along: here each new connection is seen before a byte is sent on it."""
        direct = True

        def trace(event: str, info: dict[str, Any]) -> None:
            nonlocal direct
            if event.endswith("connect_tcp.started"):
                direct = info.get("host") == url.raw_host.decode("ascii")
            elif event.endswith("connect_tcp.complete"):
                stream = info["return_value"]
                try:
                    with self._lock:
                        if direct:
                            self._boundary.check_address(url, stream.get_extra_info("server_addr")[0])
                        else:
                            self._boundary.check_host(url)
                except PolicyError:
                    stream.close()
                    raise
                opened(stream.get_extra_info("socket"))
            elif event.endswith("start_tls.complete"):
                opened(info["return_value"].get_extra_info("socket"))

        return trace


class Connection:
    """One thread's way to the servers of a source."""

    def __init__(self, client: Client, tls: Any) -> None:
        library, patience = http_library(), client.patience
        self._client = client
        self._sockets: list[socket.socket] = []
        self._alarm: _Deadline
        self._errors: tuple[type[Exception], ...] = (library.TransportError,)
        self._http = library.Client(
            verify=tls,
            follow_redirects=False,
            timeout=library.Timeout(patience.silence, connect=patience.connect, pool=None),
            limits=library.Limits(max_connections=4, max_keepalive_connections=2),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            # Plain http is for loopback, where no proxy has a place.
            mounts={"http://": library.HTTPTransport()},
        )

    @contextmanager
    def open(self, method: str, url: httpx.URL, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """The answer to a request, of which the headers are here and the body is still to come; redirects are followed.

        :raises Unavailable: it may work another time.
        :raises CheckpointNotFoundError: there is no such thing.
        :raises PolicyError: it is refused, there or here.
        :raises FetchError: anything else but 200 and 206.
        """
        known = self._client.located(url)
        with ExitStack() as stack:
            try:
                response, location = self._ask(stack, method, known, headers)
            except (HeadRefused, Unavailable, LadingError):
                self._client.locate(url, None)
                # A place that was found by redirects may have been lent for a while only.
                if known == url:
                    raise
                response, location = self._ask(stack, method, url, headers)

            self._client.locate(url, location)
            yield response

    def _ask(
        self, stack: ExitStack, method: str, url: httpx.URL, headers: dict[str, str]
    ) -> tuple[httpx.Response, httpx.URL]:
        """An answer that is good for something, to be closed with ``stack``, and where it came from in the end."""
        with ExitStack() as own:
            response, location = own.enter_context(self._follow(method, url, headers))
            require_success(response, location)
            stack.push(own.pop_all())

        return response, location

    def body(self, response: httpx.Response, arrived: Callable[[], int] | None = None) -> Iterator[bytes]:
        """The bytes of a body as they come, as the server sent them.

        :param arrived: how many bytes have come over all connections that share the line; default: those of this body.

        :raises Unavailable: they come too slowly.
        """
        patience, own = self._client.patience, 0
        arrived = arrived or (lambda: own)
        began, before = time.monotonic(), arrived()
        for chunk in response.iter_raw():
            self._alarm.put_off()
            yield chunk
            own += len(chunk)
            now = time.monotonic()
            if now - began >= patience.window:
                count = arrived()
                rate = (count - before) / (now - began)
                if rate < patience.min_rate:
                    raise Unavailable(
                        f"{response.url.host} sent {rate:.0f} bytes a second for {now - began:.0f} s, where at least "
                        f"{patience.min_rate:.0f} are expected"
                    )
                began, before = now, count

    @contextmanager
    def _follow(
        self, method: str, url: httpx.URL, headers: dict[str, str]
    ) -> Iterator[tuple[httpx.Response, httpx.URL]]:
        start = url
        for _ in range(MAX_REDIRECTS + 1):
            with self._send(method, url, headers) as response:
                if response.status_code not in _REDIRECTS:
                    yield response, url
                    return
                location = response.headers.get("location")
            if not location:
                raise FetchError(f"{shown(url)!r} answers with a redirect ({response.status_code}) to nowhere.")
            try:
                target = url.join(location).copy_with(fragment=None)
            except http_library().InvalidURL as error:
                raise FetchError(f"{shown(url)!r} redirects to {location[:200]!r}, which is not a URL.") from error
            check_url(target, came_from=url)
            url = target

        raise FetchError(f"{shown(start)!r} redirects more than {MAX_REDIRECTS} times, at last to {shown(url)!r}.")

    @contextmanager
    def _send(self, method: str, url: httpx.URL, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """One request; failures of the network, of the body too, are :class:`Unavailable`."""
        alarm = self._alarm = _Deadline(self._client.patience.answer, self.abort)
        request = self._http.build_request(
            method,
            url,
            headers={**self._client.headers(url), **headers},
            extensions={"trace": self._client.watch(url, self._opened)},
        )
        try:
            response = self._http.send(request, stream=True, auth=None)
            alarm.put_off()
            try:
                yield response
            finally:
                response.close()
        except self._errors as error:
            if fault := lasting_fault(error, url.host):
                raise FetchError(f"{shown(url)!r} could not be fetched: {fault}") from error
            raise Unavailable(self._reason(error, url, alarm.rang)) from error
        finally:
            alarm.cancel()

    def _reason(self, error: Exception, url: httpx.URL, late: bool) -> str:
        kind = type(error).__name__
        if late:
            return f"{url.host} sent nothing of use within {self._client.patience.answer:g} s"
        if kind == "ReadTimeout":
            return f"{url.host} was silent for {self._client.patience.silence:g} s"
        if kind == "ConnectTimeout":
            return f"{url.host} could not be connected to within {self._client.patience.connect:g} s"

        return f"{url.host}: {' '.join(str(error).split())[:200] or kind}"

    def _opened(self, new: socket.socket) -> None:
        self._sockets = [s for s in self._sockets if s.fileno() >= 0]
        self._sockets.append(new)

    def abort(self) -> None:
        """End what is under way, from another thread."""
        for each in list(self._sockets):
            try:
                # Unlike `close`, it wakes who reads; and TLS sockets have a method of their own that would confuse it.
                socket.socket.shutdown(each, socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        self._http.close()


class _Deadline:
    """Ends a request when its time is over.

    The HTTP client's own deadline begins anew with each byte, also with one that is no part of the file.
    """

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        self.rang = False
        self._seconds = seconds
        self._ring = ring
        self._cancelled = threading.Event()
        self.put_off()
        threading.Thread(target=self._wait, name="lading-alarm", daemon=True).start()

    def put_off(self) -> None:
        """Let the time begin anew."""
        self._at = time.monotonic() + self._seconds

    def cancel(self) -> None:
        self._cancelled.set()

    def _wait(self) -> None:
        while (left := self._at - time.monotonic()) > 0:
            if self._cancelled.wait(left):
                return
        self.rang = True
        self._ring()
