"""Calls of huggingface_hub: lists of files, downloads of whole files to its cache, addresses and tokens.

Ranges of files are read by lading's own transport. This module adds a check that huggingface_hub lacks: of the tags
that it makes paths of.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from lading.errors import FetchError, SettingsError
from lading.sources.hub.errors import public, retried, translated
from lading.sources.partial import Waiting, file_states
from lading.sources.web.netrc import basic
from lading.sources.web.proxies import require_proxies
from lading.sources.web.transport import Location
from lading.system.version import __version__

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

TIMEOUT = 30.0
"""The longest wait for a byte, in seconds."""

_log = logging.getLogger("lading.sources")


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


def location(repo: str, commit: str, name: str) -> Location:
    """Return the address of a file of a commit on the hub, with the user's token for its origin."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with translated(repo, name):
        url = urlsplit(hf_hub_url(repo, name, revision=commit))
        headers = {
            name.title(): value
            for name, value in build_hf_headers(library_name="lading", library_version=__version__).items()
        }
    if url.username:  # of HF_ENDPOINT, as huggingface_hub uses it
        headers["Authorization"] = basic(unquote(url.username), unquote(url.password or ""))

    return Location(url=urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2])), headers=headers)


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

    require_proxies()
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
