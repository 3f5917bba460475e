"""The protocol of sources, and its values: published files, snapshots and fetched files.

A :class:`Snapshot` is pinned: all that is read or fetched by it belongs to one revision. Which of its files form a
checkpoint is decided by formats, not by sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lading.system.filesystem import FileStat


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file that a source publishes."""

    name: str
    """The name within the source, with forward slashes. The server chose it, so it is never used as a local path."""
    size: int | None
    """The size in bytes; ``None`` if the source does not publish it."""
    sha256: str | None = None
    """The SHA-256 of the whole file in lower-case hexadecimal, if the source publishes it."""
    etag: str | None = None
    """A strong HTTP validator, by which later ranges are known to have the same content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The files that a source publishes, at one revision."""

    uri: str
    revision: str
    """The commit; empty if the source has no revisions."""
    files: tuple[RemoteFile, ...]
    partial: bool = False
    """True if only cached files are listed because the source was not asked; it may publish others."""

    def file(self, name: str) -> RemoteFile | None:
        """Return the file named ``name``; ``None`` if it does not exist."""
        return next((file for file in self.files if file.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedFile:
    """A file that is on this machine now."""

    name: str
    """The name within the source."""
    path: Path
    stat: FileStat
    """The state in which the file at ``path`` has the digest."""
    sha256: str
    """The SHA-256 of all its bytes, computed by lading."""
    published: bool
    """True if the source publishes that digest; else it is only recorded."""


Known = Callable[[str], Path | None]
"""A lookup by SHA-256 of files on this machine that the catalog knows; returns ``None`` for unknown digests."""


class Source(Protocol):
    """A place that checkpoints are fetched from."""

    uri: str
    inner: str | None
    """The checkpoint within the source, a file or a folder; ``None`` for the folder of all published files."""
    kind: Literal["cache", "hub"]
    """The cache of fetched files: lading's own, or that of the hub's client."""
    lists: bool
    """True if a snapshot lists all files; else it lists the requested ones, and :meth:`with_siblings` adds to them."""

    def with_siblings(self, snapshot: Snapshot, names: Sequence[str]) -> Snapshot:
        """Return ``snapshot`` with more files, which another of its files names.

        Files that the source does not have are left out. Otherwise raises what :meth:`snapshot` does.
        """

    def snapshot(self) -> Snapshot:
        """Return the files published now, or at the revision that the source was opened for.

        :raises FetchError: the source cannot be reached, or its answer is invalid; or offline, it is not cached.
        :raises CheckpointNotFoundError: the source does not have it (also a ``FileNotFoundError``).
        :raises ModelGatedError: the publisher grants access on request only.
        :raises PolicyError: a web server requires credentials, or its address or a redirect is refused.
        """

    def read(self, snapshot: Snapshot, file: RemoteFile, offset: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of a file from ``offset`` on. Safe to call from several threads.

        :param into: writable, contiguous bytes; what they hold after an error is undefined.

        :raises FetchError: the content has changed, or :meth:`close` was called meanwhile; or as :meth:`snapshot`,
            which lists the other errors, too.
        """

    def fetch(
        self, snapshot: Snapshot, files: Sequence[RemoteFile], *, known: Known, progress: bool
    ) -> list[FetchedFile]:
        """Fetch files to this machine, except those already here, and return them in the order of ``files``.

        The call is idempotent, and safe while other processes fetch the same files.

        :raises FetchError: the content has changed; or as :meth:`snapshot`, which lists other errors, too.
        :raises DigestMismatchError: the bytes differ from the published ones.
        :raises OSError: the disk is full, or cannot be written.
        """

    def local(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> list[Path | None]:
        """Return the local path of each file, ``None`` if it is not here, without opening a socket.

        Their bytes may be unchecked.
        """

    def close(self) -> None:
        """End all requests, also those in progress in other threads. A later request opens connections again."""


def read_bytes(source: Source, snapshot: Snapshot, file: RemoteFile, offset: int, size: int) -> bytes:
    """Return exactly ``size`` bytes of a file from ``offset`` on; raises what :meth:`Source.read` does."""
    data = bytearray(size)
    source.read(snapshot, file, offset, memoryview(data))

    return bytes(data)
