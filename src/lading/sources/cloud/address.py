"""Addresses in object stores: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``.

Invalid addresses are refused here, before a request is sent.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from lading.errors import AddressError
from lading.sources.hub.address import is_file_name
from lading.system.uris import shown_uri

SCHEMES = ("s3", "gs", "az")

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]|\$web|\$root")
"""A bucket of S3 or GCS, or a container of Azure; the store itself has stricter rules."""

_FILES = frozenset({"safetensors", "json", "pt", "pth", "bin", "ckpt", "tar", "model", "txt", "gguf", "jinja"})
"""The suffixes of files of checkpoints and tokenizers."""


class CloudAddress(NamedTuple):
    """A parsed address of a file, or of a folder: all objects whose keys begin with it and a slash."""

    scheme: str
    bucket: str
    key: str
    """The key of the file or the folder, without a slash at its end; empty for the whole bucket."""
    is_file: bool
    """True if the address has the suffix of a file; a slash at its end makes it a folder."""

    @classmethod
    def from_uri(cls, uri: str) -> Self:
        """Parse ``scheme://bucket/key``. The key is not quoted: ``%20`` in it is not a space.

        :raises AddressError: the address is not valid.
        """
        scheme, colon, rest = uri.partition("://")
        scheme = scheme.lower()
        if not colon or scheme not in SCHEMES:
            raise _wrong_uri(uri, "it has another scheme")
        if set(rest) & set("?#"):
            raise _wrong_uri(
                uri,
                "it has a `?` or a `#`, after which other addresses hold secrets. Credentials come from the "
                "environment; rename such an object",
            )
        bucket, _, path = rest.partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise _wrong_uri(uri, "the name of its bucket is not valid")
        key = path.removesuffix("/")
        if key and not is_file_name(key):
            raise _wrong_uri(uri, "its key is not a path of plain names")

        return cls(scheme, bucket, key, _has_suffix(key) and key == path)

    @property
    def folder(self) -> str:
        """The key of the folder: its own, or the one that holds the file."""
        return self.key.rpartition("/")[0] if self.is_file else self.key

    @property
    def name(self) -> str:
        """The name of the file; of a folder, its last part."""
        return self.key.rpartition("/")[2]

    def key_of(self, name: str) -> str:
        """Return the key of a file, by its name relative to :attr:`folder`."""
        return f"{self.folder}/{name}" if self.folder else name

    def uri_of(self, name: str) -> str:
        """Return the URI of a file, by its name relative to :attr:`folder`."""
        return f"{self.scheme}://{self.bucket}/{self.key_of(name)}"


def _has_suffix(key: str) -> bool:
    stem, dot, suffix = key.rpartition("/")[2].rpartition(".")

    return bool(stem and dot) and suffix.lower() in _FILES


def _wrong_uri(uri: str, found: str) -> AddressError:
    return AddressError(
        f"{shown_uri(uri)[:200]!r}: expected `s3://bucket/prefix`, or the same with `gs://` or `az://`: {found}."
    )
