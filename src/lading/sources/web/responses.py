"""Interpretation of a web server's responses: the file, the range, and errors.

Source: https://www.rfc-editor.org/rfc/rfc9110, sections 8, 14 and 15.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Protocol

from lading.errors import CheckpointNotFoundError, FetchError, LadingError, PolicyError
from lading.sources.source import RemoteFile
from lading.sources.web.redirects import shown

if TYPE_CHECKING:
    from urllib3.util import Url

_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{0,1000}"')
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_TOTAL = re.compile(r"bytes (?:\d{1,18}-\d{1,18}|\*)/(\d{1,18})")
_REPR_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]{44}):")  # RFC 9530, section 3
_DIGEST = re.compile(r"(?:^|,)\s*sha-256=([A-Za-z0-9+/=]{44})\s*(?:,|$)", re.IGNORECASE)  # RFC 3230, section 4.3.2

_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses of transient errors."""
_HEAD_REFUSED = {400, 401, 403, 405, 501}
"""Statuses to HEAD after which GET may succeed; 403 since a signed link is often valid for one method only."""


class Answer(Protocol):
    """The status and the headers of a response."""

    method: str
    """The method of the request."""
    url: Url
    status: int
    reason: str
    headers: Mapping[str, str]
    """The headers; a lookup ignores case."""


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


def require_success(response: Answer, refused: Callable[[Answer], LadingError]) -> None:
    """Check that a response is the file, or a part of it, or says that the file has no such part (416).

    :param refused: returns the error for a response of any other status.

    :raises Unavailable: the error is transient.
    :raises HeadRefused: the server refuses HEAD.
    :raises LadingError: the error of ``refused``; a ``FetchError`` if it is not the file as it is.
    """
    status, url = response.status, response.url
    if status in _PASSING:
        raise Unavailable(f"{url.host} answers {status}", retry_after=_retry_after(response))
    if status in _HEAD_REFUSED and response.method == "HEAD":
        raise HeadRefused
    if status not in (200, 206, 416):
        raise refused(response)

    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise FetchError(
            f"{shown(url)!r} comes compressed ({printable(encoding)}): expected the bytes of the published file, as it "
            "was requested without compression. Report it to the publisher; fetch the file by other means."
        )
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") and status != 416:
        raise web_page_error(shown(url))


def refusal(response: Answer) -> LadingError:
    """Return the error for a web server's response with the status of a permanent failure."""
    status, url = response.status, response.url
    said = f"{shown(url)!r} answers {status} ({printable(response.reason) or 'no reason given'})"
    if status in (404, 410):
        return CheckpointNotFoundError(shown(url), f"{said}: the file does not exist. Check the URL in the card.")
    if status in (401, 403):
        return PolicyError(
            f"{said}: the server requires credentials. If you have some, add them to ~/.netrc: `machine {url.host} "
            "login … password …`; else ask the publisher for access."
        )

    return FetchError(f"{said}; expected 200 or 206.")


def web_page_error(label: str) -> FetchError:
    """Return the error for a web page in place of a file."""
    return FetchError(
        f"{label!r} is a web page, where a file of a checkpoint was expected. It may be a login or an error page: open "
        "it in a browser, and name the URL of the file itself in the card."
    )


def describe(response: Answer, name: str) -> RemoteFile:
    """Return the file that a response, or a part of it, describes."""
    headers = response.headers
    if response.status == 200:
        match = re.fullmatch(r"(\d{1,18})", headers.get("content-length", ""))
    else:
        match = _TOTAL.fullmatch(headers.get("content-range", ""))

    return RemoteFile(
        name=name,
        size=None if match is None else int(match[1]),
        sha256=_published_digest(headers),
        etag=_strong_validator(headers),
    )


def require_same(response: Answer, validator: str | None, label: str) -> None:
    """Check that a response has the validator ``validator``, if it has any.

    :raises FetchError: it has another one, so the content has changed.
    """
    if validator is None or response.status not in (200, 206):
        return
    found = response.headers.get("etag" if validator.startswith('"') else "last-modified")
    if found is not None and found.strip().removeprefix("W/") != validator:
        raise FetchError(
            f"{label!r} has changed: expected the content with the validator {validator[:80]}, as before, found "
            f"{printable(found)}. `lading pull` fetches what is published now."
        )


def require_range(response: Answer, start: int, end: int, size: int | None) -> None:
    """Check that a response is exactly the range from ``start`` to ``end`` of a file of ``size`` bytes.

    :raises BadRanges: it is not.
    """
    expected = f"expected the bytes {start}-{end - 1}"
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    # `rclone serve s3` (1.75) answers 200, with the headers and the body of a range.
    if response.status not in (200, 206) or match is None:
        raise BadRanges(f"{expected}, found HTTP {response.status}, as the server does not serve ranges")
    first, last, total = map(int, match.groups())
    if (first, last + 1) != (start, end):
        raise BadRanges(f"{expected}, found {match[0]!r}")
    if size not in (None, total):
        raise BadRanges(f"expected a file of {size} bytes, found one of {total}")
    length = response.headers.get("content-length")
    if length not in (None, str(end - start)):
        raise BadRanges(f"{expected}, found {printable(length or '')} bytes")


def _strong_validator(headers: Mapping[str, str]) -> str | None:
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


def _published_digest(headers: Mapping[str, str]) -> str | None:
    """Return the SHA-256 of the whole file, if the server publishes it."""
    match = _REPR_DIGEST.search(headers.get("repr-digest", "")) or _DIGEST.search(headers.get("digest", ""))
    if match is None:
        return None
    try:
        digest = base64.b64decode(match[1], validate=True)
    except binascii.Error:
        return None

    return digest.hex() if len(digest) == 32 else None


def _retry_after(response: Answer) -> float | None:
    """Return the seconds of the ``Retry-After`` header (section 10.2.3)."""
    value = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None

    return max(0.0, seconds) if math.isfinite(seconds) else None


def printable(text: str, most: int = 80) -> str:
    """Return at most ``most`` characters of what a server says, all of them printable."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])
