"""What every scheme of a source does, and the values that pass: what a source publishes, and what is fetched of it.

A source is asked for its :class:`Snapshot`, which is pinned: whatever is read or fetched by it is of one revision.
Which of its files make a checkpoint is not known here: that is a matter of formats.
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
    """Within the source, with forward slashes. It comes from the server: it is compared and shown, never a path."""
    size: int | None
    """Bytes; ``None`` where the source does not say."""
    sha256: str | None = None
    """Of the whole file, in lower-case hexadecimal, where the source publishes it."""
    etag: str | None = None
    """A strong validator of HTTP, by which a later range is known to be of the same content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a source publishes, at one revision."""

    uri: str
    revision: str
    """A commit; empty where the source has none."""
    files: tuple[RemoteFile, ...]
    partial: bool = False
    """True if it lists only what is in a cache, as the source could not be asked: further files may be published."""

    def file(self, name: str) -> RemoteFile | None:
        """The file of this name; ``None`` where there is none."""
        return next((file for file in self.files if file.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedFile:
    """A file that is on this machine now."""

    name: str
    """Within the source."""
    path: Path
    stat: FileStat
    """Of the regular file that ``path`` leads to, in the state whose bytes have the digest."""
    sha256: str
    """Of all its bytes, computed by lading itself."""
    published: bool
    """Whether the source publishes that digest; else it is only recorded."""
    own: bool = True
    """Whether lading fetched it, as far as the source can tell: not, if another program may have put it there."""


Known = Callable[[str], Path | None]
"""Where a file with a SHA-256 is on this machine already, by what the catalog knows; ``None`` where it does not."""


class Source(Protocol):
    """A place that checkpoints are fetched from."""

    uri: str
    inner: str | None
    """The checkpoint within the source, a file or a folder; ``None``: the folder of all that it publishes."""
    kind: Literal["cache", "hub"]
    """In which cache fetched files are: lading's, or that of the hub's client."""
    lists: bool
    """Whether a snapshot names all files. Else it names those that were asked for, and :meth:`beside` adds to them."""

    def beside(self, snapshot: Snapshot, names: Sequence[str]) -> Snapshot:
        """The snapshot with further files, named by another of its files.

        Raises what :meth:`snapshot` does, but leaves out files that the source says it does not have.
        """

    def snapshot(self) -> Snapshot:
        """What is published now, or at the revision that the source was opened for.

        :raises FetchError: the source cannot be reached, or answers nonsense.
        :raises CheckpointNotFoundError: it says that there is no such thing (also a ``FileNotFoundError``).
        :raises ModelGatedError: it hands it out on request only.
        """

    def read(self, snapshot: Snapshot, file: RemoteFile, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes of a file, from ``offset`` on. May be called from several threads.

        :raises FetchError: the source cannot be reached, answers nonsense, or has another content by now.
        """

    def fetch(
        self, snapshot: Snapshot, files: Sequence[RemoteFile], *, known: Known, progress: bool
    ) -> list[FetchedFile]:
        """Bring files to this machine, in the order in which they are asked for. What is here already stays.

        Idempotent, and safe beside other processes that do the same.

        :raises FetchError: the source cannot be reached, answers nonsense, or has another content by now.
        :raises DigestMismatchError: what came is not what was published.
        :raises OSError: the disk is full, or cannot be written.
        """

    def shared(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> list[Path]:
        """Where :meth:`fetch` would put files in a cache that other programs use, too, and nothing is yet.

        Raises what :meth:`snapshot` does.
        """

    def local(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> list[Path | None]:
        """Where files are on this machine already, found without opening a socket, in the order asked for.

        Their bytes need not have been checked.
        """
