"""What the answer of a web server says: of the file, of the range, and of what went wrong.

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
"""What a server may well answer otherwise in a while."""
_HEAD_REFUSED = {400, 401, 403, 405, 501}
"""403 among them, since a signed link is often signed for one method alone."""


class Unavailable(Exception):  # noqa: N818 — not an error yet: it may be there in a while
    """A request that failed in a way that another one may not."""

    def __init__(self, reason: str, *, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after
        """Seconds that the server asks to wait for."""


class HeadRefused(Exception):  # noqa: N818 — a GET may do better
    """A server that does not answer HEAD as it answers GET."""


class BadRanges(Exception):  # noqa: N818 — it can be done without
    """A server that does not do ranges, or not right."""


def require_success(response: httpx.Response, url: httpx.URL) -> None:
    """Whether an answer can be the file, or a part of it (or, 416, that there is no such part).

    :raises Unavailable: it may be another time.
    :raises HeadRefused: it may be with GET.
    :raises CheckpointNotFoundError: there is no such thing.
    :raises PolicyError: it is refused.
    :raises FetchError: it is something else.
    """
    status = response.status_code
    said = f"{shown(url)!r} answers {status} ({_printable(response.reason_phrase) or 'no reason given'})"

    if status in _PASSING:
        raise Unavailable(f"{url.host} answers {status}", retry_after=_retry_after(response))
    if status in _HEAD_REFUSED and response.request.method == "HEAD":
        raise HeadRefused
    if status in (404, 410):
        raise CheckpointNotFoundError(shown(url), f"{said}: nothing is there. Look whether the card's URL is right.")
    if status in (401, 403):
        raise PolicyError(
            f"{said}: it hands the file out only to those it knows. If you may have it, put your credentials into "
            f"~/.netrc: `machine {url.host} login … password …`; else ask its publisher."
        )
    if status not in (200, 206, 416):
        raise FetchError(f"{said}; expected 200 or 206.")

    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise FetchError(
            f"{shown(url)!r} comes compressed ({_printable(encoding)}), though it was asked for as it is: what arrives "
            "would not be the published file. The server has to be mended; fetch the file by other means."
        )
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") and status != 416:
        raise a_web_page(url)


def a_web_page(url: httpx.URL) -> FetchError:
    """The error for a page where a file was expected."""
    return FetchError(
        f"{shown(url)!r} is a web page, where a file of a checkpoint was expected: a login or an error page perhaps. "
        "Open it in a browser, and name the URL of the file itself in the card."
    )


def describe(response: httpx.Response, name: str) -> RemoteFile:
    """The file that an answer is, or that it is a part of."""
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
    """Whether an answer is of the content that ``validator`` stands for, as far as it says.

    :raises FetchError: it is of another one.
    """
    if validator is None or response.status_code not in (200, 206):
        return
    found = response.headers.get("etag" if validator.startswith('"') else "last-modified")
    if found is not None and found.strip().removeprefix("W/") != validator:
        raise FetchError(
            f"{shown(url)!r} has changed since it was first asked for: expected the content whose validator is "
            f"{validator[:80]}, found {_printable(found)}. Fetch it again."
        )


def require_range(response: httpx.Response, start: int, end: int, size: int | None) -> None:
    """Whether an answer is the range from ``start`` to ``end`` of a file of ``size`` bytes, to the byte.

    :raises BadRanges: it is not.
    """
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if response.status_code != 206 or match is None:
        raise BadRanges(f"a request for a range is answered with {response.status_code}")
    first, last, total = map(int, match.groups())
    if (first, last + 1) != (start, end) or size not in (None, total):
        raise BadRanges(f"a request for the bytes {start}-{end - 1}/{size} is answered with {match[0]!r}")
    if response.headers.get("content-length", str(end - start)) != str(end - start):
        raise BadRanges("a range has another length than it says")


def _strong_validator(headers: httpx.Headers) -> str | None:
    """A strong ``ETag``, or a ``Last-Modified`` that is strong since it is well in the past (section 8.8.2.2)."""
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
    """The SHA-256 of the whole file, where the server publishes it."""
    match = _REPR_DIGEST.search(headers.get("repr-digest", "")) or _DIGEST.search(headers.get("digest", ""))
    if match is None:
        return None
    try:
        digest = base64.b64decode(match[1], validate=True)
    except binascii.Error:
        return None

    return digest.hex() if len(digest) == 32 else None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds (section 10.2.3)."""
    value = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None

    return max(0.0, seconds) if math.isfinite(seconds) else None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:80])
