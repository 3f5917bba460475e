"""Which checkpoints have files on this machine: all of them, those like another one, and how their files are let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import delete, select
from sqlalchemy.orm import Session, selectinload

from lading.catalog.checkpoints.copies import all_copies, same_copy
from lading.catalog.checkpoints.manifests import read_manifest, shards_of
from lading.catalog.database.database import Database
from lading.catalog.database.statements import chunks
from lading.catalog.records import LocalCheckpoint
from lading.catalog.schema import CheckpointRow, CopyRow, ShardRow
from lading.formats.manifest import Manifest


def held_checkpoints(database: Database) -> list[LocalCheckpoint]:
    """The checkpoints of which the catalog knows files on this machine, by their URIs."""
    with database.session() as session:
        return [held for _, held in _held(session)]


def known_uris(database: Database) -> frozenset[str]:
    """Return the URIs of all checkpoints of which the catalog knows what they hold."""
    with database.session() as session:
        return frozenset(session.scalars(select(CheckpointRow.uri)))


@contextmanager
def releasing_copies(database: Database, chosen: Callable[[str], bool]) -> Iterator[list[LocalCheckpoint]]:
    """Forget where files of checkpoints are on this machine, and remove them: the latter is the body's part.

    The body sees what is held, those checkpoints included. While it runs nobody else writes to the catalog, so no file
    gets another owner while it is being removed; and where the catalog cannot be written, the body never begins. When
    the body ends, all is forgotten; when it fails, or the process dies, nothing is. Files that are gone are then in the
    catalog still, which harms nobody: a copy counts only while it looks as it did.

    What the checkpoints hold stays known, and so do digests and checks.

    :param chosen: says by their URI which checkpoints.

    :raises CatalogError: the catalog cannot be written.
    :raises OSError: the disk is full.
    """
    with database.session(write=True) as session:
        held = _held(session)
        for checkpoint_id, checkpoint in held:
            for copy in checkpoint.copies if chosen(checkpoint.uri) else ():
                session.execute(delete(CopyRow).where(same_copy(checkpoint_id, copy)))
        yield [checkpoint for _, checkpoint in held]


def _held(session: Session) -> list[tuple[int, LocalCheckpoint]]:
    """Return the checkpoints of which files are here, each with its id."""
    copies = all_copies(session)
    rows = [
        row
        for ids in chunks(copies)
        for row in session.scalars(
            select(CheckpointRow).where(CheckpointRow.id.in_(ids)).options(selectinload(CheckpointRow.shards))
        )
    ]
    found = [
        (
            row.id,
            LocalCheckpoint(
                uri=row.uri,
                revision=row.revision,
                shards=shards_of(row),
                copies=tuple(copies[row.id]),
            ),
        )
        for row in rows
    ]

    return sorted(found, key=lambda pair: pair[1].uri)


def checkpoints_like(database: Database, manifest: Manifest) -> list[tuple[str, Manifest]]:
    """The checkpoints of the same tensors in files of the same sizes, whose SHA-256 are all known."""
    sizes = [shard.size for shard in manifest.shards]
    with database.session() as session:
        rows = session.scalars(
            select(CheckpointRow)
            .where(
                CheckpointRow.format == manifest.format,
                CheckpointRow.tensors == len(manifest),
                CheckpointRow.bytes == manifest.total_bytes,
                CheckpointRow.parameters == manifest.parameters,
                ~CheckpointRow.shards.any(ShardRow.sha256.is_(None)),
            )
            .order_by(CheckpointRow.uri)
        )
        known = [(row.uri, read_manifest(session, row)) for row in rows.all()]

    return [
        (uri, other)
        for uri, other in known
        if [shard.size for shard in other.shards] == sizes and other.tensors_equal(manifest)
    ]
