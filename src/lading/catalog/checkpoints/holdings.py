"""The checkpoints with files on this machine: all of them, those like another one, and the release of their files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import and_, select
from sqlalchemy.orm import Session, selectinload

from lading.catalog.artifacts import write_artifacts
from lading.catalog.checkpoints.copies import all_copies, reachable
from lading.catalog.checkpoints.manifests import find_checkpoint, read_manifest, shards_of
from lading.catalog.database.database import Database
from lading.catalog.database.statements import chunks
from lading.catalog.records import LocalCheckpoint
from lading.catalog.schema import CHECKPOINTS, COPIES, SHARDS, CheckpointRow, ShardRow
from lading.formats.manifest import Manifest


def held_checkpoints(database: Database) -> list[LocalCheckpoint]:
    """Return the checkpoints with known files on this machine, by their URIs."""
    with database.session() as session:
        return _held(session)


def known_uris(database: Database) -> frozenset[str]:
    """Return the URIs of all checkpoints whose contents the catalog knows."""
    with database.session() as session:
        return frozenset(session.scalars(select(CheckpointRow.uri)))


class Releases:
    """The release of the files of checkpoints, in one transaction, for which the catalog is read once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.held = _held(session)
        """All checkpoints with files on this machine that were not released."""

    @contextmanager
    def release(self, uri: str) -> Iterator[None]:
        """Forget the copies of a checkpoint on this machine while the body removes their files.

        When the body ends, the catalog forgets the copies; when it fails, it forgets none. The catalog keeps the
        contents of the checkpoint, its digests and checks.
        """
        with self._session.begin_nested():
            checkpoint = find_checkpoint(self._session, uri)
            for row, _ in [] if checkpoint is None else reachable(checkpoint.copies):
                self._session.delete(row)
            self._session.flush()
            yield
        self.held = [checkpoint for checkpoint in self.held if checkpoint.uri != uri]

    def forget_artifact(self, path: Path) -> None:
        """Forget weights that lading does not load."""
        write_artifacts(self._session, [], searched=[path])


@contextmanager
def releasing_copies(database: Database) -> Iterator[Releases]:
    """Hold the catalog while the body releases files of checkpoints, and removes them.

    No other process writes to the catalog meanwhile, so no file gets another owner during its removal; and if the
    catalog cannot be written, the body never begins. If the process dies, the catalog forgets no copies. Removed files
    then stay in the catalog, which is harmless: a copy counts only while its state is the same.

    :raises CatalogError: the catalog cannot be written.
    :raises OSError: the disk is full.
    """
    with database.session(write=True) as session:
        yield Releases(session)


def _held(session: Session) -> list[LocalCheckpoint]:
    copies = all_copies(session)
    found = [
        LocalCheckpoint(uri=row.uri, revision=row.revision, shards=shards_of(row), copies=tuple(copies[row.id]))
        for ids in chunks(copies)
        for row in session.scalars(
            select(CheckpointRow).where(CheckpointRow.id.in_(ids)).options(selectinload(CheckpointRow.shards))
        )
    ]

    return sorted(found, key=lambda checkpoint: checkpoint.uri)


def gone_checkpoints(database: Database) -> list[str]:
    """Return the URIs of the checkpoints that were at a path of this machine, and of no other, and are gone."""
    of_shards = and_(SHARDS.c.checkpoint_id == COPIES.c.checkpoint_id, SHARDS.c.name == COPIES.c.file)
    statement = (
        select(COPIES, CHECKPOINTS.c.uri)
        .join(SHARDS, of_shards)
        .join(CHECKPOINTS, CHECKPOINTS.c.id == COPIES.c.checkpoint_id)
        .where(CHECKPOINTS.c.uri.startswith("file://", autoescape=True))
        .order_by(CHECKPOINTS.c.uri)
    )
    with database.session() as session:
        rows = session.execute(statement).all()

    known = Counter(row.uri for row in rows)
    gone = Counter(row.uri for row, copy in reachable(rows) if not os.path.lexists(copy.path))

    return [uri for uri, count in known.items() if gone[uri] == count]


def checkpoints_like(database: Database, manifest: Manifest, *, hashed: bool = False) -> list[str]:
    """Return the URIs of checkpoints of the same tensors in files of the same sizes.

    :param hashed: only those whose files all have a known SHA-256.
    """
    sizes = [shard.size for shard in manifest.shards]
    with database.session() as session:
        rows = session.scalars(
            select(CheckpointRow)
            .where(
                CheckpointRow.format == manifest.format,
                CheckpointRow.tensors == len(manifest),
                CheckpointRow.bytes == manifest.total_bytes,
                CheckpointRow.parameters == manifest.parameters,
                *([~CheckpointRow.shards.any(ShardRow.sha256.is_(None))] if hashed else []),
            )
            .order_by(CheckpointRow.uri)
        )

        return [
            row.uri
            for row in rows.all()
            if [shard.size for shard in row.shards] == sizes and read_manifest(session, row).tensors_equal(manifest)
        ]
