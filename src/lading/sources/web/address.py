"""Addresses of files on the web: ``https://host/folder/file``.

Invalid addresses are refused here, before a request is sent.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from lading.errors import AddressError
from lading.sources.web.redirects import shown

_MAX_NAME = 255
"""The most bytes of a file name, as in common file systems."""

_HOST = re.compile(r"[^\s/\\<>\"^`{|}]+")
_SECRET = re.compile(r"//.*@")
"""A user name and a password, even with characters that should be quoted."""


class WebAddress(NamedTuple):
    """A parsed URI of a file on the web."""

    parts: SplitResult
    name: str
    """The name of the file."""

    @classmethod
    def from_uri(cls, uri: str) -> WebAddress:
        """Parse ``https://host/path/file``, or the same with ``http``.

        :raises AddressError: the URI is not valid.
        """
        try:
            parts = urlsplit(uri)
            host, _ = parts.hostname, parts.port  # parsed, and validated, on access
        except ValueError:  # its message may quote a part of a password as the port
            raise _wrong_uri(uri, "its host or its port is not valid") from None
        if not parts.netloc or not host or not _HOST.fullmatch(host):
            raise _wrong_uri(uri, f"{host or ''!r} is not a valid host")

        name = unquote(parts.path.rpartition("/")[2])
        if not is_plain(name):
            raise _wrong_uri(uri, "it does not name a file: its path must end in a plain file name")

        return cls(parts, name)


def is_plain(name: str) -> bool:
    """Return whether ``name`` is a plain file name: not a path, and without invisible characters."""
    return (
        name.isprintable()
        and name.strip() == name
        and name not in ("", ".", "..")
        and not set(name) & set("/\\")
        and len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME
    )


def _wrong_uri(uri: str, found: str) -> AddressError:
    return AddressError(f"{_SECRET.sub('//…@', shown(uri))[:200]!r}: expected `https://host/path/file`: {found}.")
