"""The values that leave the catalog. All are frozen; none knows of the database."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from lading.formats.manifest import Manifest, Shard
from lading.system.filesystem import FileStat

HEADER = "header"
"""The method of a check of all bytes of a file that are of no tensor."""

CopyKind = Literal["source", "cache", "hub", "adopted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """A row of the view ``models``, and what is wrong with it."""

    name: str
    family: str | None
    """``None`` for a card that is no model, and for a broken one whose family is not known."""
    arch: str | None
    base: str | None
    status: str | None
    """``ready``, ``remote``, ``gated``, ``unknown-family`` or ``broken``; ``None`` for a card that is no model."""
    checkpoint: str | None
    revision: str | None
    format: str | None
    bytes: int | None
    """Of all tensors."""
    parameters: int | None
    dtypes: str | None
    """Separated by commas, that of the most elements first."""
    shards: int | None
    license: str | None
    local_path: str | None
    verified_at: str | None
    source: str
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureSummary:
    """An architecture as one document of a card file states it."""

    name: str
    family: str
    base: str | None
    overrides: Mapping[str, object]
    """To ``base``, or to the family's defaults."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySummary:
    """A model family and what the catalog holds of it."""

    name: str
    registered: bool
    """Whether an installed package registers it."""
    architectures: int
    cards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCopy:
    """A file of a checkpoint on this machine."""

    file: str
    """Its name within the checkpoint; its path, if it came along with it, or is of a revision that was left."""
    path: Path
    stat: FileStat
    """The state in which it was last seen; another one now means another content."""
    verified_at: str | None = None
    """When, in that state, it was checked against its digest. ISO 8601, UTC."""
    kind: CopyKind = "source"
    """Whose file it is: the card's own source, lading's cache, the hub client's cache, or one that was adopted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A check of a file of a checkpoint against a digest."""

    file: str
    """Its name within the checkpoint."""
    path: Path
    stat: FileStat
    """The state in which it was checked."""
    method: str
    """``sha256`` of the whole file, ``blake3`` of its tensors, ``header`` of its other bytes, ``crc32`` of a record."""
    expected: str | None
    """The digest that was published or recorded; ``None`` where none was known."""
    found: str | None

    @property
    def result(self) -> Literal["match", "mismatch", "recorded"]:
        """A digest that nothing is known of is recorded, and expected from then on."""
        if self.expected is None and self.found is not None:
            return "recorded"

        return "match" if self.expected == self.found else "mismatch"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """What the catalog knows of a checkpoint."""

    uri: str
    revision: str
    manifest: Manifest
    copies: tuple[LocalCopy, ...]
    """Those that can be reached from this machine by their path."""
    indexed_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCheckpoint:
    """A checkpoint of which files are on this machine, as far as the catalog knows."""

    uri: str
    revision: str
    shards: tuple[Shard, ...]
    copies: tuple[LocalCopy, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did. Overlays are named ``name@env``, architectures ``family/name (architecture)``."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    """Gone from a file that was imported before."""
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """What was left out; empty unless the import was told to keep going."""


def to_signed(inode: int) -> int:
    """An inode number as the signed 64-bit integer that databases have; some file systems use all 64 bits."""
    return inode - (1 << 64) if inode >= 1 << 63 else inode


def from_signed(inode: int) -> int:
    """What :func:`to_signed` was given."""
    return inode + (1 << 64) if inode < 0 else inode


def now() -> str:
    """The time as the catalog keeps it: ISO 8601, UTC, whole seconds."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def newer(a: str, b: str) -> bool:
    """Whether version ``a`` is newer than ``b``, by their release numbers."""
    return _release(a) > _release(b)


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
