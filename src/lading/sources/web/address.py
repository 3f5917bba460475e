"""What an address on the web may be: ``https://host/folder/file``.

Whatever is not plainly such an address is refused here, before a socket is opened.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from lading.errors import AddressError
from lading.sources.web.redirects import shown

_MAX_NAME = 255
"""Bytes; the limit of the common file systems."""

_HOST = re.compile(r"[^\s/\\<>\"^`{|}]+")
_SECRET = re.compile(r"//.*@")
"""A user name and a password, also such as would have to be quoted."""


class WebAddress(NamedTuple):
    """A URI of a file on the web, taken apart."""

    parts: SplitResult
    name: str
    """Of the file."""

    @classmethod
    def from_uri(cls, uri: str) -> WebAddress:
        """Parse ``https://host/path/file``, or the same with ``http``.

        :raises AddressError: it is none.
        """
        try:
            parts = urlsplit(uri)
            host, _ = parts.hostname, parts.port  # which are looked at when they are asked for
        except ValueError:  # which may show what it took for a port, and is a part of a password
            raise _wrong_uri(uri, "its host or its port is none") from None
        if not parts.netloc or not host or not _HOST.fullmatch(host):
            raise _wrong_uri(uri, f"{host or ''!r} is no host")

        name = unquote(parts.path.rpartition("/")[2])
        if not is_plain(name):
            raise _wrong_uri(uri, "it does not name a file: its path must end in a plain file name")

        return cls(parts, name)


def is_plain(name: str) -> bool:
    """Whether ``name`` is nothing but the name of a file: no path, nothing that hides what it says."""
    return (
        name.isprintable()
        and name.strip() == name
        and name not in ("", ".", "..")
        and not set(name) & set("/\\")
        and len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME
    )


def _wrong_uri(uri: str, found: str) -> AddressError:
    return AddressError(f"{_SECRET.sub('//…@', shown(uri))[:200]!r}: expected `https://host/path/file`: {found}.")
