"""The one place that talks to the Hugging Face hub, always through the client of huggingface_hub.

That client does the protocol: endpoint, tokens, redirects, its cache. What it does not do is done here: no exception of
it gets out, names that it would make a path of are looked at, and ranges are asked for with every answer checked.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

from lading.errors import CheckpointNotFoundError, FetchError, LadingError, ModelGatedError
from lading.version import __version__

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

T = TypeVar("T")

ATTEMPTS = 5
BACK_OFF = 0.5
"""Seconds before the second attempt; twice as long before each further one, up to ``LONGEST_WAIT``."""
LONGEST_WAIT = 30.0
"""Seconds: what a server's ``Retry-After`` is believed up to."""
TIMEOUT = 30.0
"""Seconds without a byte."""
SLOWEST = 1 << 16
"""Bytes a second that a range has to come with, on top of a ``TIMEOUT`` for its beginning."""
REDIRECTS = 10

_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

_log = logging.getLogger("lading.fetch")


class _BrokenAnswerError(Exception):
    """An answer that did not come as it should have: worth another attempt."""


def describe(repo: str, revision: str | None) -> ModelInfo:
    """What the hub says of a repository at a revision (default: the main branch), in one call.

    :raises FetchError: see :func:`translated`; so are the others.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="lading", library_version=__version__)
    with translated(repo, "the list of its files"):
        return _retried(
            lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT),
            f"the list of files of {repo}",
        )


def download(repo: str, commit: str, name: str, *, force: bool, advance: Callable[[int], None]) -> str:
    """Bring a file into the cache of huggingface_hub; its path there.

    :param force: whether to do so although it is there.
    :param advance: called with the number of bytes of each step; what it raises stops the download.

    :raises FetchError: see :func:`translated`; so are the others.
    """
    from huggingface_hub import get_session, hf_hub_download

    with translated(repo, name):
        hooks = get_session().event_hooks["response"]
        if _refuse_unsafe_tag not in hooks:
            hooks.append(_refuse_unsafe_tag)

        return str(
            hf_hub_download(
                repo,
                name,
                revision=commit,
                force_download=force,
                library_name="lading",
                library_version=__version__,
                tqdm_class=_forwarding(advance),
            )
        )


def read_range(
    repo: str, commit: str, name: str, *, offset: int, size: int, total: int | None, places: dict[str, str]
) -> bytes:
    """Exactly ``size`` bytes, at least one, of a file of a commit.

    :param total: the size of the file, where it is known.
    :param places: addresses that the hub redirected to, by name of the file: they are asked first, until they fail.

    :raises FetchError: see :func:`translated`; so are the others.
    """
    from huggingface_hub import hf_hub_url

    with translated(repo, name):
        url = hf_hub_url(repo, name, revision=commit)

        def ask() -> bytes:
            start = places.get(name, url)
            try:
                place, body = _ask(start, url, offset, size, total)
            except Exception:
                if start == url:
                    raise
                places.pop(name, None)
                place, body = _ask(url, url, offset, size, total)  # a signed address has but a short life
            if place != url:
                places[name] = place
            return body

        return _retried(ask, f"{name} of {repo}")


def page(repo: str) -> str:
    """Where people read about a repository, and ask for it."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


@contextmanager
def translated(repo: str, what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes an error of lading, or is one of the operating system.

    :raises ModelGatedError: the hub hands ``repo`` out on request only.
    :raises CheckpointNotFoundError: the hub says that there is no such repository, revision or file.
    :raises FetchError: the hub cannot be reached, or answers nonsense.
    :raises OSError: the disk is full, or cannot be written.
    """
    try:
        yield
    except (LadingError, MemoryError):
        raise
    except Exception as error:
        translation = _translation(repo, what, error)
        if translation is error:
            raise
        raise translation from error


def _translation(repo: str, what: str, error: Exception) -> Exception:
    from huggingface_hub import errors

    # The client says "not in the cache" or "force failed" of what the hub refused; the reason stands behind.
    while isinstance(error, (errors.LocalEntryNotFoundError, ValueError)) and isinstance(error.__cause__, Exception):
        if isinstance(error, errors.HfHubHTTPError):
            break
        error = error.__cause__
    if isinstance(error, LadingError):
        return error

    uri = f"hg://{repo}"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    code = None if response is None else response.headers.get("X-Error-Code")

    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFoundError(
            uri, f"{uri}: the hub has this repository, but not the revision that was asked for. See {page(repo)}/refs."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return CheckpointNotFoundError(uri, f"{uri}: the hub has this repository, but no {what!r} in it.")
    if status == 404 or code == "RepoNotFound":
        return CheckpointNotFoundError(
            uri,
            f"{uri}: the hub at {page('')} knows no such repository, or not for you. Check the id; if it is a private "
            "one, log in with `hf auth login`, or set HF_TOKEN.",
        )
    if isinstance(error, errors.DisabledRepoError):
        return FetchError(f"{uri}: the hub has closed access to this repository, for everyone. See {page(repo)}.")
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return FetchError(
            f"{uri}: the hub does not accept your token ({_line(error)}). Log in again with `hf auth login`, or set a "
            "valid HF_TOKEN, or none."
        )
    if status in (401, 403):
        return ModelGatedError(
            repo,
            page(repo),
            message=f"{repo!r} is gated or private on the hub, which hands it out on request only (HTTP {status}). Ask "
            f"for access at {page(repo)}, and then log in with `hf auth login`, or set HF_TOKEN.",
        )
    if status is not None:
        return FetchError(f"{uri}: expected the hub to answer with {what}, got HTTP {status}: {_line(error)}.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FetchError(f"{uri}: HF_HUB_OFFLINE is set, so nothing can be fetched. Unset it, and try again.")
    if _is_of_the_disk(error):
        return error

    return FetchError(
        f"{uri}: could not get {what} from {page(repo)}: {type(error).__name__}: {_line(error)}. Check the network "
        "(and HF_ENDPOINT, if it is set), and try again: what was fetched is kept."
    )


def _is_of_the_disk(error: Exception) -> bool:
    return (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, (ConnectionError, TimeoutError, socket.gaierror))
        and error.errno not in {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL}
    )


def _client_errors(*names: str) -> tuple[type[Exception], ...]:
    """Errors of the HTTP client that huggingface_hub brings: httpx in its version 1, httpx2 in version 2."""
    from huggingface_hub.errors import HfHubHTTPError

    package = HfHubHTTPError.__bases__[0].__module__.partition(".")[0]

    return tuple(getattr(sys.modules[package], name) for name in names)


def _line(error: Exception) -> str:
    """What an error says, on one line that a terminal shows as it is: a server has written some of it."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else "?" for c in text)

    return (text if len(text) <= 300 else f"{text[:300]}…").rstrip(".")


# --- attempts --------------------------------------------------------------------------------------------------------


def _retried(ask: Callable[[], T], what: str) -> T:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except Exception as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == ATTEMPTS:
                if isinstance(error, _BrokenAnswerError):
                    raise FetchError(f"Tried {attempt} times to get {what}: {error}.") from error
                raise
            _log.info("%s: %s; trying again in %.1f s (%d of %d)", what, _line(error), wait, attempt + 1, ATTEMPTS)
            time.sleep(wait)

    raise AssertionError("unreachable")


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds before the next attempt; ``None`` if another one would be in vain."""
    back_off = BACK_OFF * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
    response = getattr(error, "response", None)
    if response is not None:
        if response.status_code not in _TRANSIENT:
            return None
        asked = response.headers.get("Retry-After", "")
        return float(min(max(back_off, float(asked) if asked.isdecimal() else 0.0), LONGEST_WAIT))

    passing = _client_errors("TimeoutException", "NetworkError", "RemoteProtocolError")

    return min(back_off, LONGEST_WAIT) if isinstance(error, (_BrokenAnswerError, *passing)) else None


# --- ranges ----------------------------------------------------------------------------------------------------------


def _ask(start: str, home: str, offset: int, size: int, total: int | None) -> tuple[str, bytes]:
    """The address that answered, and its answer. The token goes to the origin of ``home`` alone."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    headers = build_hf_headers(library_name="lading", library_version=__version__)
    headers |= {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
    bare = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    client = get_session()

    at = start
    for _ in range(REDIRECTS + 1):
        sent = headers if _origin(at) == _origin(home) else bare
        with client.stream("GET", at, headers=sent, follow_redirects=False, timeout=TIMEOUT) as response:
            if not response.has_redirect_location:
                hf_raise_for_status(response)
                return at, _body(response, offset, size, total)
            target = urljoin(at, response.headers["Location"])

        if urlsplit(target).scheme not in {"https", urlsplit(at).scheme}:
            raise FetchError(f"{home}: expected a redirect to https, found one to {target!r}. It was not followed.")
        at = target

    raise FetchError(f"{home}: expected at most {REDIRECTS} redirects, found more. The last one was to {at!r}.")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)

    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _body(response: Any, offset: int, size: int, total: int | None) -> bytes:
    """The bytes of a checked answer to a request for a range."""
    end = offset + size - 1
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise FetchError(f"{response.url}: expected the bytes as they are, found them in {encoding!r}.")

    if response.status_code == 206:
        text = response.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(text)
        if found is None or (int(found[1]), int(found[2])) != (offset, end):
            raise FetchError(f"{response.url}: expected the range {offset}-{end}, found {text!r}.")
        if total is not None and found[3] not in {"*", str(total)}:
            raise FetchError(f"{response.url}: expected a file of {total} bytes, found one of {found[3]}.")
    elif (response.status_code, offset, size) != (200, 0, total):
        raise FetchError(
            f"{response.url}: expected HTTP 206 with the range {offset}-{end}, got HTTP {response.status_code}: this "
            "server does not serve ranges."
        )

    deadline = time.monotonic() + TIMEOUT + size / SLOWEST
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) > size:
            raise FetchError(f"{response.url}: expected {size} bytes, found more.")
        if time.monotonic() > deadline:
            raise _BrokenAnswerError(
                f"{response.url} sent {len(body)} of {size} bytes and is slower than {SLOWEST} bytes a second"
            )
    if len(body) < size:
        raise _BrokenAnswerError(f"{response.url} sent {len(body)} of {size} bytes")

    return bytes(body)


# --- what the client takes on trust ----------------------------------------------------------------------------------


def _refuse_unsafe_tag(response: Any) -> None:
    """A hook of the HTTP client, before huggingface_hub sees an answer of a hub.

    It makes the path of a blob of the entity tag, and looks at everything but that.
    """
    headers = response.headers
    if "X-Repo-Commit" not in headers:
        return

    for name in ("X-Linked-Etag", "ETag"):
        tag = headers.get(name, "")
        if "/" in tag.removeprefix("W/") or "\\" in tag or ".." in tag or not tag.isprintable():
            raise FetchError(
                f"{response.url}: expected the entity tag of the file to be plain, found {tag!r}, which would lead out "
                "of the cache. Nothing was fetched; is HF_ENDPOINT a hub that you trust?"
            )


def _forwarding(advance: Callable[[int], None]) -> type[Any]:
    """A class of progress bars for huggingface_hub that shows nothing itself, and says what came."""
    from tqdm import tqdm

    class Forward(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: object, **kwargs: Any) -> None:
            super().__init__(disable=True, total=kwargs.get("total"))

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

        # The client reports bytes of the network by these apart from bytes on the disk; one count is enough.
        def update_transfer(self, n: float | None = 1) -> None: ...

        def set_transfer_postfix_str(self, *args: object, **kwargs: object) -> None: ...

    return Forward
