"""Interpretation of a web server's responses: the file, the range, and errors.

Source: https://www.rfc-editor.org/rfc/rfc9110, sections 8, 14 and 15.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from lading.errors import CheckpointNotFoundError, FetchError, PolicyError
from lading.sources.source import RemoteFile
from lading.sources.web.redirects import shown

if TYPE_CHECKING:
    import httpx2 as httpx

_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{0,1000}"')
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_TOTAL = re.compile(r"bytes (?:\d{1,18}-\d{1,18}|\*)/(\d{1,18})")
_REPR_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]{44}):")  # RFC 9530, section 3
_DIGEST = re.compile(r"(?:^|,)\s*sha-256=([A-Za-z0-9+/=]{44})\s*(?:,|$)", re.IGNORECASE)  # RFC 3230, section 4.3.2

_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses of transient errors."""
_HEAD_REFUSED = {400, 401, 403, 405, 501}
"""Statuses to HEAD after which GET may succeed; 403 since a signed link is often valid for one method only."""


class Unavailable(Exception):  # noqa: N818 — not an error yet: a retry may succeed
    """A request that failed transiently."""

    def __init__(self, reason: str, *, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after
        """The seconds that the server asks to wait; ``None`` if it does not say."""


class HeadRefused(Exception):  # noqa: N818 — a GET may do better
    """A HEAD request that was refused, although GET may succeed."""


class BadRanges(Exception):  # noqa: N818 — the file can be fetched without ranges
    """A server that does not support ranges, or not correctly."""


def require_success(response: httpx.Response, url: httpx.URL) -> None:
    """Check that a response is the file, or a part of it, or says that there is no such part (416).

    :raises Unavailable: the error is transient.
    :raises HeadRefused: the server refuses HEAD.
    :raises CheckpointNotFoundError: the file does not exist.
    :raises PolicyError: the server refuses access.
    :raises FetchError: the response is anything else.
    """
    status = response.status_code
    said = f"{shown(url)!r} answers {status} ({_printable(response.reason_phrase) or 'no reason given'})"

    if status in _PASSING:
        raise Unavailable(f"{url.host} answers {status}", retry_after=_retry_after(response))
    if status in _HEAD_REFUSED and response.request.method == "HEAD":
        raise HeadRefused
    if status in (404, 410):
        raise CheckpointNotFoundError(shown(url), f"{said}: the file does not exist. Check the URL in the card.")
    if status in (401, 403):
        raise PolicyError(
            f"{said}: the server requires credentials. If you have some, add them to ~/.netrc: `machine {url.host} "
            "login … password …`; else ask the publisher for access."
        )
    if status not in (200, 206, 416):
        raise FetchError(f"{said}; expected 200 or 206.")

    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise FetchError(
            f"{shown(url)!r} comes compressed ({_printable(encoding)}), though it was requested without compression: "
            "the bytes would not be those of the published file. Report it to the publisher; fetch the file by other "
            "means."
        )
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") and status != 416:
        raise web_page_error(url)


def web_page_error(url: httpx.URL) -> FetchError:
    """Return the error for a web page in place of a file."""
    return FetchError(
        f"{shown(url)!r} is a web page, where a file of a checkpoint was expected. It may be a login or an error page: "
        "open it in a browser, and name the URL of the file itself in the card."
    )


def describe(response: httpx.Response, name: str) -> RemoteFile:
    """Return the file that a response, or a part of it, describes."""
    headers = response.headers
    if response.status_code == 200:
        match = re.fullmatch(r"(\d{1,18})", headers.get("content-length", ""))
    else:
        match = _TOTAL.fullmatch(headers.get("content-range", ""))

    return RemoteFile(
        name=name,
        size=None if match is None else int(match[1]),
        sha256=_published_digest(headers),
        etag=_strong_validator(headers),
    )


def require_same(response: httpx.Response, validator: str | None, url: httpx.URL) -> None:
    """Check that a response has the validator ``validator``, if it has any.

    :raises FetchError: it has another one, so the content has changed.
    """
    if validator is None or response.status_code not in (200, 206):
        return
    found = response.headers.get("etag" if validator.startswith('"') else "last-modified")
    if found is not None and found.strip().removeprefix("W/") != validator:
        raise FetchError(
            f"{shown(url)!r} has changed since the first request: expected the content with the validator "
            f"{validator[:80]}, found {_printable(found)}. Fetch it again."
        )


def require_range(response: httpx.Response, start: int, end: int, size: int | None) -> None:
    """Check that a response is exactly the range from ``start`` to ``end`` of a file of ``size`` bytes.

    :raises BadRanges: it is not.
    """
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if response.status_code != 206 or match is None:
        raise BadRanges(f"the server answers {response.status_code} to a request for a range")
    first, last, total = map(int, match.groups())
    if (first, last + 1) != (start, end) or size not in (None, total):
        raise BadRanges(f"the server answers {match[0]!r} to a request for the bytes {start}-{end - 1}/{size}")
    if response.headers.get("content-length", str(end - start)) != str(end - start):
        raise BadRanges("the length of a range differs from its Content-Length")


def _strong_validator(headers: httpx.Headers) -> str | None:
    """Return a strong ``ETag``, or a ``Last-Modified`` that is strong as it is old enough (section 8.8.2.2)."""
    etag: str = headers.get("etag", "").strip()
    if _STRONG_ETAG.fullmatch(etag):
        return etag
    try:
        modified: str = headers["last-modified"].strip()
        age = parsedate_to_datetime(headers["date"]) - parsedate_to_datetime(modified)
    except (KeyError, ValueError, TypeError):
        return None

    return modified if age.total_seconds() >= 60 and len(modified) < 64 and modified.isascii() else None


def _published_digest(headers: httpx.Headers) -> str | None:
    """Return the SHA-256 of the whole file, if the server publishes it."""
    match = _REPR_DIGEST.search(headers.get("repr-digest", "")) or _DIGEST.search(headers.get("digest", ""))
    if match is None:
        return None
    try:
        digest = base64.b64decode(match[1], validate=True)
    except binascii.Error:
        return None

    return digest.hex() if len(digest) == 32 else None


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds of the ``Retry-After`` header (section 10.2.3)."""
    value = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None

    return max(0.0, seconds) if math.isfinite(seconds) else None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:80])
