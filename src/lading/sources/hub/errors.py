"""Translation of the hub's errors to those of lading, and retries of transient ones."""

from __future__ import annotations

import errno
import logging
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

from lading.errors import CheckpointNotFoundError, FetchError, LadingError, ModelGatedError, causes_of
from lading.sources.web.tls import lasting_fault

T = TypeVar("T")

ATTEMPTS = 5
BACK_OFF = 0.5
"""Seconds before the second attempt, doubled before each other one, up to ``LONGEST_WAIT``."""
LONGEST_WAIT = 30.0
"""The longest wait in seconds, even if a server's ``Retry-After`` asks for more."""

_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})

_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]*")

_log = logging.getLogger("lading.sources")


def page(repo: str) -> str:
    """Return the address of a repository's web page, on which users request access."""
    from huggingface_hub import constants

    return public(f"{constants.ENDPOINT}/{repo}")


def public(text: object) -> str:
    """Return ``text`` with the secrets removed from its URLs: users, passwords and query strings."""
    return _QUERY.sub(r"\1", _USER.sub("", str(text)))


@contextmanager
def translated(repo: str, what: str) -> Iterator[None]:
    """Translate errors that are raised in the block to errors of lading, except those of the operating system.

    :param what: the requested object, for messages.

    :raises ModelGatedError: the hub grants access to ``repo`` on request only.
    :raises CheckpointNotFoundError: the hub does not have the repository, revision or file.
    :raises FetchError: the hub cannot be reached, or its answer is invalid.
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

    # The client raises "not in the cache" or "force failed" when the hub refuses a request; the reason is its cause.
    while isinstance(error, (errors.LocalEntryNotFoundError, ValueError)) and isinstance(error.__cause__, Exception):
        if isinstance(error, errors.HfHubHTTPError):
            break
        error = error.__cause__
    if isinstance(error, LadingError):
        return error

    uri = f"hg://{repo}"
    if (response := getattr(error, "response", None)) is not None:
        hidden = isinstance(error, errors.RepositoryNotFoundError)
        return refusal(repo, what, response.status_code, response.headers, said=_line(error), hidden=hidden)
    if isinstance(error, errors.EntryNotFoundError):
        return _no_entry(uri, what)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FetchError(f"{uri}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing can be fetched. Unset it.")
    if fault := _lasting_fault(error, urlsplit(page(repo)).hostname or page(repo)):
        return FetchError(f"{uri}: could not get {what} from {page(repo)}: {fault}")
    if _is_disk_error(error):
        return error

    return FetchError(
        f"{uri}: could not get {what} from {page(repo)}: {type(error).__name__}: {_line(error)}. Check the network "
        "(and HF_ENDPOINT, if it is set), and try again: fetched files are kept."
    )


def refusal(
    repo: str, what: str, status: int, headers: Mapping[str, str], *, said: str, hidden: bool = False
) -> LadingError:
    """Return the error for an answer of the hub with the status of a permanent failure.

    :param what: the requested object, for messages.
    :param headers: the headers of the answer; a lookup ignores case.
    :param said: the hub's own words.
    :param hidden: whether huggingface_hub takes a 401 for a repository that the user must not see.
    """
    uri, code = f"hg://{repo}", headers.get("X-Error-Code")
    if code == "RevisionNotFound":
        return CheckpointNotFoundError(
            uri, f"{uri}: the hub has this repository, but not the revision requested. See {page(repo)}/refs."
        )
    if code == "EntryNotFound":
        return _no_entry(uri, what)
    if status == 404 or code == "RepoNotFound":
        return CheckpointNotFoundError(
            uri,
            f"{uri}: the hub at {page('')} has no such repository, or hides it from you. Check the id; if the "
            "repository is private, log in with `hf auth login`, or set HF_TOKEN.",
        )
    if headers.get("X-Error-Message") == "Access to this resource is disabled.":
        return FetchError(f"{uri}: the hub has disabled access to this repository. See {page(repo)}.")
    if status == 401 and code != "GatedRepo" and not hidden:
        return FetchError(
            f"{uri}: the hub does not accept your token ({said}). Log in again with `hf auth login`, set a valid "
            "HF_TOKEN, or unset it."
        )
    if status in (401, 403):
        return ModelGatedError(
            repo,
            page(repo),
            message=f"{repo!r} is gated or private on the hub, and you have no access to it (HTTP {status}). Request "
            f"access at {page(repo)}, then log in with `hf auth login`, or set HF_TOKEN.",
        )

    return FetchError(f"{uri}: expected the hub to answer with {what}, found HTTP {status}: {said}.")


def _no_entry(uri: str, what: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(uri, f"{uri}: the hub has this repository, but no {what!r} in it.")


def _lasting_fault(error: Exception, host: str) -> str | None:
    """Return a description of a permanent TLS error of huggingface_hub's HTTP client; ``None`` if it may pass."""
    connecting = any(type(each).__name__ == "ConnectError" for each in causes_of(error))

    return lasting_fault(error, host) if connecting else None


def _is_disk_error(error: Exception) -> bool:
    return (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, (ConnectionError, TimeoutError, socket.gaierror))
        and error.errno not in {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL}
    )


def _client_errors(*names: str) -> tuple[type[Exception], ...]:
    """Return exception classes of huggingface_hub's HTTP client: httpx in its version 1, httpx2 in version 2."""
    from huggingface_hub.errors import HfHubHTTPError

    package = HfHubHTTPError.__bases__[0].__module__.partition(".")[0]

    return tuple(getattr(sys.modules[package], name) for name in names)


def _line(error: Exception) -> str:
    """Return the message of an error on one printable line, as a server may have written some of it."""
    text = " ".join(public(error).split())
    text = "".join(c if c.isprintable() else "?" for c in text)

    return (text if len(text) <= 300 else f"{text[:300]}…").rstrip(".")


# --- attempts --------------------------------------------------------------------------------------------------------


def retried(ask: Callable[[], T], what: str) -> T:
    """Call ``ask`` up to ``ATTEMPTS`` times, until no transient error occurs, and return its result.

    :param what: the requested object, for messages.

    :raises Exception: an error of ``ask`` that is not transient, or that of the last attempt.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except Exception as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == ATTEMPTS:
                raise
            _log.info("%s: %s; trying again in %.1f s (%d of %d)", what, _line(error), wait, attempt + 1, ATTEMPTS)
            time.sleep(wait)

    raise AssertionError("unreachable")


def _wait(error: Exception, attempt: int) -> float | None:
    """Return the seconds to wait before the next attempt; ``None`` if the error is not transient."""
    back_off = BACK_OFF * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
    response = getattr(error, "response", None)
    if response is not None:
        if response.status_code not in _TRANSIENT:
            return None
        asked = response.headers.get("Retry-After", "")
        return float(min(max(back_off, float(asked) if asked.isdecimal() else 0.0), LONGEST_WAIT))

    if _lasting_fault(error, "") is not None:
        return None
    passing = _client_errors("TimeoutException", "NetworkError", "RemoteProtocolError")

    return min(back_off, LONGEST_WAIT) if isinstance(error, passing) else None
