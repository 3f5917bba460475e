"""All requests to the Hugging Face hub, always through the client of huggingface_hub.

That client handles the protocol: endpoint, tokens, redirects, its cache. This module adds what it lacks: a check of
the tags that it makes paths of, and requests for ranges with every answer checked.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from lading.errors import FetchError, SettingsError
from lading.sources.hub.errors import BrokenAnswerError, public, retried, translated
from lading.sources.partial import Waiting, file_states
from lading.sources.proxies import require_proxies
from lading.sources.web.client import http_library
from lading.sources.web.redirects import MAX_REDIRECTS, Origin
from lading.system.version import __version__

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

TIMEOUT = 30.0
"""The longest wait for a byte, in seconds."""
SLOWEST = 1 << 16
"""The least speed of a range, in bytes a second, on top of a ``TIMEOUT`` for its beginning."""

_log = logging.getLogger("lading.sources")

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def describe(repo: str, revision: str | None) -> ModelInfo:
    """Return the hub's description of a repository at a revision (default: the main branch), in one call.

    :raises FetchError: see :func:`~lading.sources.hub.errors.translated`; so are the others.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="lading", library_version=__version__)
    with translated(repo, "the list of its files"):
        guard_client()
        return retried(
            lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT),
            f"the list of files of {repo}",
        )


def download(repo: str, commit: str, name: str, *, force: bool, advance: Callable[[int], None]) -> str:
    """Bring a file into the cache of huggingface_hub and return its path there.

    :param force: whether to fetch a file that is there, too.
    :param advance: called with the number of bytes of each step; an exception of it stops the download.

    :raises FetchError: see :func:`~lading.sources.hub.errors.translated`; so are the others.
    """
    from huggingface_hub import hf_hub_download

    with translated(repo, name):
        guard_client()
        with bounded_locks():
            path = hf_hub_download(
                repo,
                name,
                revision=commit,
                force_download=force,
                library_name="lading",
                library_version=__version__,
                tqdm_class=_forwarding(advance),
            )
        return str(path)


def read_range(
    repo: str, commit: str, name: str, *, offset: int, size: int, total: int | None, places: dict[str, str]
) -> bytes:
    """Read exactly ``size`` bytes, at least one, of a file of a commit.

    :param total: the size of the file, where it is known.
    :param places: addresses that the hub redirected to, by name of the file: tried first, until they fail.

    :raises FetchError: see :func:`~lading.sources.hub.errors.translated`; so are the others.
    """
    from huggingface_hub import hf_hub_url

    with translated(repo, name):
        guard_client()
        url = hf_hub_url(repo, name, revision=commit)

        def ask() -> bytes:
            start = places.get(name, url)
            try:
                place, body = _ask(start, url, offset, size, total)
            except Exception:
                if start == url:
                    raise
                places.pop(name, None)
                place, body = _ask(url, url, offset, size, total)  # a signed address expires soon
            if place != url:
                places[name] = place
            return body

        return retried(ask, f"{name} of {repo}")


# --- ranges -----------------------------------------------------------------------------------------------------------


def _ask(start: str, home: str, offset: int, size: int, total: int | None) -> tuple[str, bytes]:
    """Return the address that answered, and its answer. Only the origin of ``home`` gets the token."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    headers = build_hf_headers(library_name="lading", library_version=__version__)
    headers |= {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
    bare = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    client, url = get_session(), http_library().URL

    at = start
    for _ in range(MAX_REDIRECTS + 1):
        sent = headers if Origin.of(url(at)) == Origin.of(url(home)) else bare
        with client.stream("GET", at, headers=sent, follow_redirects=False, timeout=TIMEOUT) as response:
            if not response.has_redirect_location:
                hf_raise_for_status(response)
                return at, _body(response, offset, size, total)
            target = urljoin(at, response.headers["Location"])

        if urlsplit(target).scheme not in {"https", urlsplit(at).scheme}:
            raise FetchError(
                f"{public(home)}: expected a redirect to https, found one to {public(target)!r}. It was not followed."
            )
        at = target

    raise FetchError(
        f"{public(home)}: expected at most {MAX_REDIRECTS} redirects, found more. The last one was to {public(at)!r}."
    )


def _body(response: Any, offset: int, size: int, total: int | None) -> bytes:
    """Return the bytes of a checked answer to a request for a range."""
    end, url = offset + size - 1, public(response.url)
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise FetchError(f"{url}: expected the bytes as they are, found them in {encoding!r}.")

    if response.status_code == 206:
        text = response.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(text)
        if found is None or (int(found[1]), int(found[2])) != (offset, end):
            raise FetchError(f"{url}: expected the range {offset}-{end}, found {text!r}.")
        if total is not None and found[3] not in {"*", str(total)}:
            raise FetchError(f"{url}: expected a file of {total} bytes, found one of {found[3]}.")
    elif (response.status_code, offset, size) != (200, 0, total):
        raise FetchError(
            f"{url}: expected HTTP 206 with the range {offset}-{end}, got HTTP {response.status_code}: this "
            "server does not serve ranges."
        )

    deadline = time.monotonic() + TIMEOUT + size / SLOWEST
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) > size:
            raise FetchError(f"{url}: expected {size} bytes, found more.")
        if time.monotonic() > deadline:
            raise BrokenAnswerError(
                f"{url} sent {len(body)} of {size} bytes and is slower than {SLOWEST} bytes a second"
            )
    if len(body) < size:
        raise BrokenAnswerError(f"{url} sent {len(body)} of {size} bytes")

    return bytes(body)


# --- what the client does not check -----------------------------------------------------------------------------------


_guarding = threading.Lock()


def guard_client() -> None:
    """Make huggingface_hub's HTTP client accept plain entity tags only, and let lading keep it from sending.

    huggingface_hub makes the path of a blob from the tag, and checks everything but that. When a connection fails, even
    in the middle of a download, it closes its client and makes another one: so lading guards what makes clients. It
    does so once, before its first request, because that closes a client in use. A factory that the user gave to
    ``huggingface_hub.set_client_factory`` stays; each call of this function guards the client that it has made.

    :raises SettingsError: the environment names a proxy that the client cannot use.
    """
    from huggingface_hub import get_session, set_client_factory

    require_proxies(http_library())
    with _guarding:
        client = get_session()
        hooks = client.event_hooks
        if _refuse_unsafe_tag in hooks["response"]:
            return
        guarded: dict[str, list[Callable[..., Any]]] = {
            "request": [*hooks["request"], _refuse_to_send],
            "response": [*hooks["response"], _refuse_unsafe_tag],
        }
        # Clients of huggingface_hub's own factory have its hook.
        if any(hook.__module__.startswith("huggingface_hub.") for hook in hooks["request"]):
            kind, redirects, timeout = type(client), client.follow_redirects, client.timeout
            set_client_factory(lambda: kind(event_hooks=guarded, follow_redirects=redirects, timeout=timeout))
        else:
            client.event_hooks = guarded


_silent = 0
"""The uses of :func:`no_requests` at the moment."""


@contextmanager
def no_requests() -> Iterator[None]:
    """Make huggingface_hub refuse to send anything while the body runs, as ``HF_HUB_OFFLINE`` does.

    All threads of a process share the client, so this holds for all of them.
    """
    global _silent
    # If a proxy setting prevents the client from being made, it cannot send anything either.
    with suppress(ImportError, ValueError, SettingsError):
        guard_client()
    with _guarding:
        _silent += 1
    try:
        yield
    finally:
        with _guarding:
            _silent -= 1


def _refuse_to_send(request: Any) -> None:
    """Refuse a request, as a hook of the HTTP client."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if _silent:
        raise OfflineModeIsEnabled(f"{public(request.url)} was not asked, as LADING_OFFLINE is set.")


def _refuse_unsafe_tag(response: Any) -> None:
    """Refuse an answer of a hub, as a hook of the HTTP client, before huggingface_hub sees it."""
    headers = response.headers
    if "X-Repo-Commit" not in headers:
        return

    for name in ("X-Linked-Etag", "ETag"):
        tag = headers.get(name, "")
        if "/" in tag.removeprefix("W/") or "\\" in tag or ".." in tag or not tag.isprintable():
            raise FetchError(
                f"{public(response.url)}: expected the entity tag of the file to be plain, found {tag!r}, which would "
                "lead out of the cache. Nothing was fetched; is HF_ENDPOINT a hub that you trust?"
            )


_own = threading.local()


@contextmanager
def bounded_locks() -> Iterator[None]:
    """Make huggingface_hub wait in this thread only as long as the holder of a lock makes progress.

    It would wait forever for a process that is stopped, and fail where the file system has no locks. It needs no lock:
    each download goes to its own file, which gets its final name when it is complete.
    """
    from huggingface_hub import file_download

    # A private part of huggingface_hub, which has no other way to bound its wait.
    if not isinstance(lock := vars(file_download)["WeakFileLock"], _BoundedLock):
        vars(file_download)["WeakFileLock"] = _BoundedLock(lock)
    _own.bounded = True
    try:
        yield
    finally:
        _own.bounded = False


@dataclass(frozen=True, slots=True)
class _BoundedLock:
    lock: Callable[..., AbstractContextManager[Any]]

    @contextmanager
    def __call__(self, lock_file: str | Path, *, timeout: float | None = None) -> Iterator[Any]:
        with ExitStack() as stack:
            if getattr(_own, "bounded", False):
                yield self._enter(stack, Path(lock_file))
            else:
                yield stack.enter_context(self.lock(lock_file, timeout=timeout))

    def _enter(self, stack: ExitStack, path: Path) -> Any:
        """Return the lock, held until ``stack`` closes; ``None`` if this cannot get it."""
        blobs = path.parents[2] / path.parent.name / "blobs"
        waiting = Waiting(lambda: file_states(blobs, f"{path.stem}*"))
        while True:
            try:
                return stack.enter_context(self.lock(path, timeout=1))
            except TimeoutError:  # filelock's own error derives from it
                if waiting.is_over():
                    return None
            except OSError as error:
                _log.info("%s cannot be locked: %s", path, error)
                return None


def _forwarding(advance: Callable[[int], None]) -> type[Any]:
    """Return a class of progress bars for huggingface_hub that shows nothing itself, and reports the bytes."""
    from tqdm import tqdm

    class Forward(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: object, **kwargs: Any) -> None:
            super().__init__(disable=True, total=kwargs.get("total"))

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

        # By these the client reports bytes of the network apart from bytes on the disk; one count is enough.
        def update_transfer(self, n: float | None = 1) -> None: ...

        def set_transfer_postfix_str(self, *args: object, **kwargs: object) -> None: ...

    return Forward
