"""Names on the Hugging Face hub: addresses (``hg://org/name@revision/path``), repository ids, revisions, file names.

Invalid names are refused here, before a request is sent or a path is built from them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import quote, unquote

from lading.errors import AddressError, FetchError

SCHEMES = ("hg://", "hf://")

# https://github.com/huggingface/huggingface_hub, `validate_repo_id`: the same rules, restricted to ASCII.
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_QUERY = re.compile(r"\?[^\s'\"]+")
_OTHER_KINDS = frozenset({"datasets", "spaces", "kernels", "buckets"})


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAddress:
    """A parsed URI of the hub."""

    repo: str
    """``org/name``, or ``name`` alone, as the URI spells it; the hub's spelling may differ in case."""
    revision: str | None
    """A branch, a tag or a commit; ``None`` for the main branch."""
    inner: str | None
    """A path inside the repository."""

    @classmethod
    def from_uri(cls, uri: str) -> Self:
        """Parse ``hg://[org/]name[@revision][/path/inside]``; ``hf://`` means the same.

        In a URI without a revision, the first two parts are the id. A slash in a revision is written ``%2F``, except in
        the hub's own ``refs/pr/N`` and ``refs/convert/NAME``.

        :raises AddressError: the URI is not valid, or does not name a model repository.
        """
        scheme = next((s for s in SCHEMES if uri.startswith(s)), None)
        if scheme is None:
            raise _wrong_uri(uri, "it has another scheme")

        rest = uri.removeprefix(scheme)
        parts = rest.split("/")
        if parts[0] == "models" and len(parts) > 2:
            parts = parts[1:]
        if parts[0] in _OTHER_KINDS and len(parts) > 2:
            raise _wrong_uri(uri, f"{parts[0]} are not models")

        taken = 1 if "@" in parts[0] or len(parts) == 1 else 2
        repo, at, revision = "/".join(parts[:taken]).partition("@")
        parts = parts[taken:]
        if at and revision == "refs" and len(parts) > 1 and parts[0] in {"pr", "convert"}:
            revision, parts = f"refs/{parts[0]}/{parts[1]}", parts[2:]
        inner = "/".join(parts)

        if not is_repo_id(repo):
            raise _wrong_uri(
                uri,
                f"{repo!r} is not a valid id: only ASCII letters, digits, `-`, `_` and `.`, neither `--` nor `..`, at "
                "most 96 characters in each part",
            )
        if at:
            check_revision(revision := unquote(revision), uri)
        if parts and not is_file_name(inner):
            raise _wrong_uri(uri, f"{inner!r} is not a plain path inside a repository")

        return cls(repo=repo, revision=revision if at else None, inner=inner if parts else None)

    def below(self, path: str | None) -> Self:
        """Return the address of a path inside this one; ``None`` for this one."""
        inner = "/".join(part.strip("/") for part in (self.inner, path) if part)

        return replace(self, inner=inner or None)

    @property
    def uri(self) -> str:
        """The URI that :meth:`from_uri` reads as this address."""
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"

        return f"hg://{self.repo}{revision}" + ("" if self.inner is None else f"/{self.inner}")


def is_repo_id(text: str) -> bool:
    """Return whether ``text`` is a valid repository id, from which a folder name in the cache can be built."""
    parts = text.split("/")

    return (
        len(parts) <= 2
        and all(_SEGMENT.fullmatch(part) is not None for part in parts)
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def check_revision(revision: str, uri: str) -> None:
    """Check the syntax of a revision.

    :raises AddressError: ``revision`` cannot be a branch, a tag or a commit.
    """
    if _REVISION.fullmatch(revision) is None or ".." in revision or len(revision) > 200:
        raise _error(
            f"{uri}: expected the revision to be the name of a branch or a tag, or a commit of 40 hexadecimal digits, "
            f"found {revision!r}."
        )


def is_commit(text: str) -> bool:
    """Return whether ``text`` is a full commit hash."""
    return _COMMIT.fullmatch(text) is not None


def is_sha256(text: str) -> bool:
    """Return whether ``text`` is a SHA-256 in lower-case hexadecimal."""
    return _SHA256.fullmatch(text) is not None


def is_file_name(name: str) -> bool:
    """Return whether ``name`` is a relative path of plain, printable segments."""
    return (
        name.isprintable()
        and "\\" not in name
        and len(name) <= 1024
        and all(part not in {"", ".", ".."} and len(part.encode()) <= 255 for part in name.split("/"))
    )


def check_file_name(name: str, uri: str) -> None:
    """Check the name of a file of a repository.

    :raises FetchError: ``name`` is not a relative path of plain segments.
    """
    if not is_file_name(name):
        raise FetchError(
            f"{uri}: expected the name of a file to be a relative path of plain segments, found {name!r}. lading does "
            "not fetch files with such names; report it to the publisher of the repository."
        )


def _wrong_uri(uri: str, found: str) -> AddressError:
    return _error(f"{uri!r}: expected `hg://[org/]name[@revision][/path/inside]` or the same with `hf://`: {found}.")


def _error(message: str) -> AddressError:
    """Return the error with query strings removed from the message, as they may hold a token."""
    return AddressError(_QUERY.sub("?…", message))
