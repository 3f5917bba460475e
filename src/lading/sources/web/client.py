"""The HTTP client: connections, timeouts, redirects, credentials and retries.

It uses the HTTP library that huggingface_hub depends on (``httpx2`` or, before its version 2, ``httpx``) only for
connections and parsing. Like that library, it reads proxies (``HTTPS_PROXY``, ``NO_PROXY`` …) and certificates
(``SSL_CERT_FILE``, ``SSL_CERT_DIR``) from the environment.
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
    """The least throughput in bytes per second, over all connections for a file."""
    attempts: int = 6
    """The most consecutive failures of requests for the same bytes."""
    backoff: float = 0.5
    """The longest first wait between two attempts, doubled each time; waits are random, from zero to that."""
    max_wait: float = 60
    """The longest wait, even if a server asks for more (``Retry-After``)."""


class Stopped(Exception):  # noqa: N818 — not an error: another one caused the stop
    """Work that was stopped, as its result is not needed any more."""


@lru_cache(maxsize=1)
def http_library() -> Any:
    """Import ``httpx2``, or else ``httpx``, which has the same names as far as they are used here."""
    try:
        return import_module("httpx2")
    except ImportError:
        return import_module("httpx")


class Client:
    """The client of one source, whose connections share what it learns about redirects and addresses.

    It is safe to use from several threads; each one takes a :class:`Connection` of its own.
    """

    def __init__(self, uri: str, *, timeouts: Timeouts) -> None:
        """Create the client for ``uri``, without connecting.

        :raises PolicyError: requests to ``uri`` are refused.
        :raises SettingsError: the environment names a proxy that cannot be used.
        """
        self._library = http_library()
        require_proxies(self._library)
        self.timeouts = timeouts
        self.url = self.parse(uri)
        check_url(self.url)

        self._boundary = RedirectPolicy()
        self._authorization = authorization(self.url.host)
        self.final_urls: dict[httpx.URL, httpx.URL] = {}
        """The final URL of the redirects from a URL, so that each range does not follow them again."""
        self._tls: Any = None
        self._lock = threading.Lock()
        self._idle: list[Connection] = []

    def parse(self, url: str) -> httpx.URL:
        """Parse a URL.

        :raises AddressError: ``url`` is not valid.
        """
        try:
            parsed: httpx.URL = self._library.URL(url)
        except self._library.InvalidURL as error:
            raise AddressError(f"{shown(url)[:200]!r} is not a URL: {error}.") from error

        return parsed

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Lend a connection to the calling thread for the duration of the block."""
        with self._lock:
            if self._tls is None:
                self._tls = self._library.create_ssl_context()  # slow, as it reads all certificates
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
        """Return ``action()``, retried with growing waits as long as it raises :class:`Unavailable`.

        :param what: the requested object, for messages.
        :param progressed: returns whether the last attempt made progress, which resets the count of failures.

        :raises FetchError: all attempts failed.
        :raises Stopped: ``stop`` was set.
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
                if failed >= self.timeouts.attempts:
                    raise FetchError(
                        f"{what} could not be fetched: {error.reason} (tried {failed} times). Try again later."
                    ) from error.__cause__
                wait = random.uniform(0, self.timeouts.backoff * 2 ** (failed - 1))
                wait = min(max(wait, error.retry_after or 0), self.timeouts.max_wait)
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

    def watch(self, url: httpx.URL, opened: Callable[[Any], None]) -> Callable[[str, dict[str, Any]], None]:
        """Return a trace hook of the HTTP library, which checks each new connection before data is sent on it."""
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
    """A thread's connections to the servers of a source."""

    def __init__(self, client: Client, tls: Any) -> None:
        library, timeouts = http_library(), client.timeouts
        self._client = client
        self._sockets: list[socket.socket] = []
        self._deadline: _Deadline
        self._errors: tuple[type[Exception], ...] = (library.TransportError,)
        self._http = library.Client(
            verify=tls,
            follow_redirects=False,
            timeout=library.Timeout(timeouts.silence, connect=timeouts.connect, pool=None),
            limits=library.Limits(max_connections=4, max_keepalive_connections=2),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            # Plain http is only allowed on the loopback interface, which never needs a proxy.
            mounts={"http://": library.HTTPTransport()},
        )

    @contextmanager
    def open(self, method: str, url: httpx.URL, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """Send a request and return the response before its body is read; follow redirects.

        :raises Unavailable: the error is transient.
        :raises CheckpointNotFoundError: the file does not exist.
        :raises PolicyError: the server, or lading, refuses the request.
        :raises FetchError: the status is neither 200 nor 206, or there is another error.
        """
        final_urls = self._client.final_urls
        known = final_urls.get(url, url)
        with ExitStack() as stack:
            try:
                response, location = stack.enter_context(self._follow(method, known, headers))
            except (HeadRefused, Unavailable, LadingError):
                final_urls.pop(url, None)
                # The target of a redirect may be valid for a limited time only.
                if known == url:
                    raise
                response, location = stack.enter_context(self._follow(method, url, headers))

            final_urls[url] = location
            yield response

    def body(self, response: httpx.Response, arrived: Callable[[], int] | None = None) -> Iterator[bytes]:
        """Yield the bytes of a body as they arrive, without decoding.

        :param arrived: returns the bytes received over all connections for the file; default: those of this body.

        :raises Unavailable: the throughput is too low.
        """
        timeouts, own = self._client.timeouts, 0
        arrived = arrived or (lambda: own)
        began, before = time.monotonic(), arrived()
        for chunk in response.iter_raw():
            self._deadline.restart()
            yield chunk
            own += len(chunk)
            now = time.monotonic()
            if now - began >= timeouts.window:
                count = arrived()
                rate = (count - before) / (now - began)
                if rate < timeouts.min_rate:
                    raise Unavailable(
                        f"{response.url.host} sent {rate:.0f} bytes a second for {now - began:.0f} s, expected at "
                        f"least {timeouts.min_rate:.0f}"
                    )
                began, before = now, count

    @contextmanager
    def _follow(
        self, method: str, url: httpx.URL, headers: dict[str, str]
    ) -> Iterator[tuple[httpx.Response, httpx.URL]]:
        """Send a request and follow redirects; yield the successful response and its URL."""
        start = url
        for _ in range(MAX_REDIRECTS + 1):
            with self._send(method, url, headers) as response:
                if response.status_code not in _REDIRECTS:
                    require_success(response, url)
                    yield response, url
                    return
                location = response.headers.get("location")
            if not location:
                raise FetchError(f"{shown(url)!r} answers with a redirect ({response.status_code}) without a location.")
            try:
                target = url.join(location).copy_with(fragment=None)
            except http_library().InvalidURL as error:
                raise FetchError(f"{shown(url)!r} redirects to {location[:200]!r}, which is not a URL.") from error
            check_url(target, came_from=url)
            url = target

        raise FetchError(f"{shown(start)!r} redirects more than {MAX_REDIRECTS} times, last to {shown(url)!r}.")

    @contextmanager
    def _send(self, method: str, url: httpx.URL, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """Send one request; translate network errors, including those while the body is read."""
        deadline = self._deadline = _Deadline(self._client.timeouts.answer, self.abort)
        request = self._http.build_request(
            method,
            url,
            headers={**self._client.headers(url), **headers},
            extensions={"trace": self._client.watch(url, self._add_socket)},
        )
        try:
            response = self._http.send(request, stream=True, auth=None)
            deadline.restart()
            try:
                yield response
            finally:
                response.close()
        except self._errors as error:
            if fault := lasting_fault(error, url.host):
                raise FetchError(f"{shown(url)!r} could not be fetched: {fault}") from error
            raise Unavailable(self._reason(error, url, deadline.expired)) from error
        finally:
            deadline.cancel()

    def _reason(self, error: Exception, url: httpx.URL, late: bool) -> str:
        kind = type(error).__name__
        if late:
            return f"{url.host} sent no useful data within {self._client.timeouts.answer:g} s"
        if kind == "ReadTimeout":
            return f"{url.host} was silent for {self._client.timeouts.silence:g} s"
        if kind == "ConnectTimeout":
            return f"{url.host} did not accept a connection within {self._client.timeouts.connect:g} s"

        return f"{url.host}: {' '.join(str(error).split())[:200] or kind}"

    def _add_socket(self, new: socket.socket) -> None:
        self._sockets = [s for s in self._sockets if s.fileno() >= 0]
        self._sockets.append(new)

    def abort(self) -> None:
        """End the current request, from another thread."""
        for each in list(self._sockets):
            try:
                # Unlike `close`, `shutdown` wakes a blocked reader. The method of TLS sockets would disturb the reader.
                socket.socket.shutdown(each, socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        self._http.close()


class _Deadline:
    """A deadline that aborts a request.

    The HTTP library's own timeout restarts with each byte, even with one that is not a part of the file.
    """

    def __init__(self, seconds: float, on_expiry: Callable[[], None]) -> None:
        self.expired = False
        self._seconds = seconds
        self._on_expiry = on_expiry
        self._cancelled = threading.Event()
        self.restart()
        threading.Thread(target=self._wait, name="lading-deadline", daemon=True).start()

    def restart(self) -> None:
        """Restart the time."""
        self._at = time.monotonic() + self._seconds

    def cancel(self) -> None:
        self._cancelled.set()

    def _wait(self) -> None:
        while (left := self._at - time.monotonic()) > 0:
            if self._cancelled.wait(left):
                return
        self.expired = True
        self._on_expiry()
