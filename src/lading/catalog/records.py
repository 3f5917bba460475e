"""The values that the catalog returns, all frozen and independent of the database."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from lading.formats.artifacts import Artifact
from lading.formats.manifest import Manifest, Shard
from lading.system.display import representation
from lading.system.filesystem import FileStat
from lading.system.uris import shown_name

HEADER = "header"
"""The method of a check of all bytes of a file outside of its tensors."""

ORIGINAL = "original"
"""The method of a check, by its SHA-256, of the file that a rewritten one was made of."""

UNVERIFIED = "unverified"
"""The method of a check that was not possible: a load used bytes of a file for which no digest is known."""

CopyKind = Literal["source", "cache", "hub", "adopted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """A row of the view ``models``, and its problem; or one of the view ``unregistered``."""

    name: str
    family: str | None
    """The family; ``None`` for a card without a model, and for a broken one of an unknown family."""
    arch: str | None
    base: str | None
    status: str | None
    """``ready``, ``remote``, ``gated``, ``unknown-family`` or ``broken``; ``None`` for a card without a model.

    Without a card: ``unregistered``, or ``unloadable`` for an artifact.
    """
    checkpoint: str | None
    revision: str | None
    format: str | None
    bytes: int | None
    """The size of all tensors in bytes."""
    parameters: int | None
    dtypes: str | None
    """The dtypes, separated by commas, that of the most elements first."""
    shards: int | None
    license: str | None
    local_path: str | None
    verified_at: str | None
    source: str | None
    """The URI of the file that the card comes from; ``None`` without a card."""
    problem: str | None
    kind: str | None = None
    """``checkpoint``, or the kind of an artifact; ``None`` for a card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureSummary:
    """An architecture as one document of a card file states it."""

    name: str
    family: str
    base: str | None
    overrides: Mapping[str, object]
    """Overrides of ``base``, or of the family's defaults."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySummary:
    """A model family and what the catalog holds of it."""

    name: str
    registered: bool
    """``True`` if an installed package registers it."""
    architectures: int
    cards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCopy:
    """A file of a checkpoint on this machine."""

    file: str
    """The name within the checkpoint; the path for an extra file, or one of an earlier revision."""
    path: Path
    stat: FileStat
    """The state when lading last saw it; another state now means other content."""
    verified_at: str | None = None
    """The time of the check against its digest in that state. ISO 8601, UTC."""
    kind: CopyKind = "source"
    """The owner: the card's own source, lading's cache, the hub client's cache, or an adopted folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheck:
    """A check of a file of a checkpoint against a digest, as its source sent it."""

    file: str
    """The name within the checkpoint."""
    method: str
    """``sha256`` of the whole file, ``blake3`` of its tensors, ``header`` of its other bytes, ``crc32`` of a record,
    ``original`` for the SHA-256 of the file at ``path`` that this one was made of; ``unverified`` if no digest is known
    to compare with."""
    expected: str | None
    """The digest that was published or recorded; ``None`` if unknown."""
    found: str | None

    @property
    def place(self) -> str:
        """The path of the file; empty if it was read at its source."""
        return ""

    @property
    def result(self) -> Literal["match", "mismatch", "recorded"]:
        """The outcome. A first digest is recorded, and expected from then on."""
        if self.expected is None:
            return "recorded"

        return "match" if self.expected == self.found else "mismatch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check(SourceCheck):
    """A check of a file on this machine."""

    path: Path
    stat: FileStat
    """The state of the file during the check."""

    @property
    def place(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestDocument:
    """A document that publishes the digests of a checkpoint's tensors."""

    uri: str
    """The address, without secrets."""
    sha256: str
    """The SHA-256 of the document."""

    @property
    def shown(self) -> str:
        """The path or the address, for messages."""
        return shown_name(self.uri)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """The catalog's knowledge of a checkpoint."""

    uri: str
    revision: str
    manifest: Manifest
    copies: tuple[LocalCopy, ...]
    """The copies whose path leads to them from this machine."""
    indexed_at: str
    """Empty for one that was read now, and is not in the catalog."""
    published: DigestDocument | None = None
    """The document from which the catalog has the digests of the tensors; ``None`` if it has none, or from bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointContents:
    """The contents of a checkpoint, to be recorded."""

    uri: str
    """The full URI."""
    manifest: Manifest
    copies: Sequence[LocalCopy] = ()
    """The files on this machine: shards and, if there is one, the index file."""
    checks: Sequence[SourceCheck] = ()
    revision: str = ""
    accept: bool = False
    """``True`` to take the files as they are now for the right ones, and forget the digests of other bytes, and those
    that a card published."""
    moved_from: str | None = None
    """The URI by which the catalog knows the same checkpoint from before it moved; its digests and cards stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCheckpoint:
    """A checkpoint with files on this machine, as far as the catalog knows."""

    uri: str
    revision: str
    shards: tuple[Shard, ...]
    copies: tuple[LocalCopy, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundArtifact:
    """An artifact, and where it is."""

    path: Path
    artifact: Artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """The result of an import. Overlays are named ``name@env``, architectures ``family/name (architecture)``."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    """Rows that are gone from a file imported before."""
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """The documents left out; empty unless the import keeps going."""

    def __repr__(self) -> str:
        counts = {field.name: len(getattr(self, field.name)) for field in fields(self)}

        return representation(
            self, ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CardChange:
    """A change of a field of a card in the catalog."""

    card: str
    """The name of the card, or ``name@env`` of an overlay, before the change."""
    field: str
    before: str
    after: str | None
    """The new value; ``None`` if the card was removed."""
    stated_in: str
    """The URI of what states the card; a file that was imported keeps what it states."""


def to_signed(inode: int) -> int:
    """Return an inode number as the signed 64-bit integer of databases; some file systems use all 64 bits."""
    return inode - (1 << 64) if inode >= 1 << 63 else inode


def from_signed(inode: int) -> int:
    """Return the inode number that :func:`to_signed` converted."""
    return inode + (1 << 64) if inode < 0 else inode


def now() -> str:
    """Return the time as the catalog keeps it: ISO 8601, UTC, whole seconds."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def newer(a: str, b: str) -> bool:
    """Return whether version ``a`` is newer than ``b``, by their release numbers."""
    return _release(a) > _release(b)


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
