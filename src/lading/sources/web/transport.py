"""The HTTP transport: requests, redirects, credentials and retries.

urllib3 pools the connections, and speaks TLS and to proxies. Proxies (``HTTPS_PROXY``, ``NO_PROXY`` …) and certificates
(``SSL_CERT_FILE``, ``SSL_CERT_DIR``) come from the environment. urllib3 is imported with the first request, as most
commands send none.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urljoin

from lading.errors import AddressError, FetchError, LadingError
from lading.sources.web.connection import Guarded, Request, StoppedError, Timeouts
from lading.sources.web.proxies import new_manager, proxy_of
from lading.sources.web.redirects import MAX_REDIRECTS, Origin, RedirectPolicy, check_url, shown
from lading.sources.web.responses import Answer, HeadRefused, Unavailable, refusal, require_success
from lading.system.version import __version__

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager
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


class _Here(threading.local):
    stop: threading.Event | None = None
    """The event of the task that this thread works for."""


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
        self._stops: weakref.WeakSet[threading.Event] = weakref.WeakSet()
        self._here = _Here()
        self._lock = threading.Lock()

    def new_stop(self) -> threading.Event:
        """Return an event that stops the requests of one task; :meth:`close` sets it, too."""
        stop = threading.Event()
        with self._lock:
            self._stops.add(stop)

        return stop

    def close(self) -> None:
        """Stop all requests, and close all connections. A later request opens connections again."""
        with self._lock:
            managers, self._managers = self._managers, {}
            for stop in self._stops:
                stop.set()
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
            self._here.stop = stop
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
                self._here.stop = None

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
        request = Request(
            url,
            timeouts,
            stop=self._here.stop or self.new_stop(),
            check_peer=lambda address: self._check_peer(url, address if proxy is None else None),
        )
        request.check()
        with request.sending():
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

        return Response(answer, method, request, self)

    def _check_peer(self, url: Url, address: str | None) -> None:
        with self._lock:
            if address is None:
                self._policy.check_host(url)
            else:
                self._policy.check_address(url, address)

    def _manager(self, proxy: str | None) -> PoolManager:
        with self._lock:
            if proxy not in self._managers:
                self._managers[proxy] = new_manager(proxy, Guarded)

            return self._managers[proxy]


class Response:
    """The response to a request, whose body is read as it arrives, without decoding."""

    location: Location
    """The URL that answered, behind all redirects."""

    def __init__(self, answer: BaseHTTPResponse, method: str, request: Request, transport: Transport) -> None:
        self.status = answer.status
        self.reason = answer.reason or ""
        self.headers: Mapping[str, str] = answer.headers  # ignores case
        self.method = method
        self.url = request.url
        self._answer = answer
        self._request = request
        self._transport = transport
        self._window = time.monotonic(), transport.received
        request.restart()

    def read_into(self, into: memoryview) -> int:
        """Read what has arrived of the body, at most ``len(into)`` bytes, and return their number; 0 at its end.

        :param into: not empty.

        :raises Unavailable: the connection broke off, or the throughput is too low.
        """
        with self._request.errors():
            count = self._request.body.read_some(into)
        self._request.restart()
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
        body = self._request.body
        if body.isclosed() or body.length == 0:
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
