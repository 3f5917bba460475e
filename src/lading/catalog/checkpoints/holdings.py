"""The checkpoints with files on this machine: all of them, those like another one, and the release of their files."""

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
    """Return the checkpoints with known files on this machine, by their URIs."""
    with database.session() as session:
        return [held for _, held in _held(session)]


def known_uris(database: Database) -> frozenset[str]:
    """Return the URIs of all checkpoints whose contents the catalog knows."""
    with database.session() as session:
        return frozenset(session.scalars(select(CheckpointRow.uri)))


@contextmanager
def releasing_copies(database: Database, chosen: Callable[[str], bool]) -> Iterator[list[LocalCheckpoint]]:
    """Forget the copies of checkpoints on this machine while the body removes their files.

    This yields all checkpoints with files here, those chosen included. While the body runs no other process writes to
    the catalog, so no file gets another owner during its removal; and if the catalog cannot be written, the body never
    begins. When the body ends, the catalog forgets the copies; when it fails, or the process dies, it forgets none.
    Removed files then stay in the catalog, which is harmless: a copy counts only while its state is the same.

    The catalog keeps the contents of the checkpoints, their digests and checks.

    :param chosen: selects checkpoints by their URI.

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
    """Return the checkpoints with files here, each with its id."""
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
    """Return the checkpoints of the same tensors in files of the same sizes, whose SHA-256 are all known."""
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
