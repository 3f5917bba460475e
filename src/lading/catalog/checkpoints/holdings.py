"""Which checkpoints have files on this machine: all of them, those like another one, and how their files are let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, delete, exists, select

from lading.catalog.checkpoints.copies import all_copies, same_copy
from lading.catalog.checkpoints.manifests import read_manifest
from lading.catalog.database.database import Database
from lading.catalog.database.statements import chunks, intact
from lading.catalog.records import LocalCheckpoint
from lading.catalog.schema import CHECKPOINTS, SHARDS, CopyRow
from lading.formats.manifest import Manifest, Shard


def held_checkpoints(database: Database) -> list[LocalCheckpoint]:
    """The checkpoints of which the catalog knows files on this machine, by their URIs."""
    with database.read() as connection:
        return [held for _, held in _held(connection)]


def known_uris(database: Database) -> frozenset[str]:
    """Return the URIs of all checkpoints of which the catalog knows what they hold."""
    with database.read() as connection:
        return frozenset(connection.scalars(select(CHECKPOINTS.c.uri)))


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
    with database.write() as connection:
        held = _held(connection)
        for checkpoint_id, checkpoint in held:
            for copy in checkpoint.copies if chosen(checkpoint.uri) else ():
                connection.execute(delete(CopyRow).where(same_copy(checkpoint_id, copy)))
        yield [checkpoint for _, checkpoint in held]


def _held(connection: Connection) -> list[tuple[int, LocalCheckpoint]]:
    """Return the checkpoints of which files are here, each with its id."""
    copies = all_copies(connection)
    shards: dict[int, list[Shard]] = {}
    rows: list[tuple[int, str, str]] = []
    for ids in chunks(copies):
        with intact("a checkpoint"):
            for checkpoint_id, name, size, sha256 in connection.execute(
                select(SHARDS.c.checkpoint_id, SHARDS.c.name, SHARDS.c.size, SHARDS.c.sha256)
                .where(SHARDS.c.checkpoint_id.in_(ids))
                .order_by(SHARDS.c.checkpoint_id, SHARDS.c.position)
            ):
                shards.setdefault(checkpoint_id, []).append(Shard(name=name, size=size, sha256=sha256))
        statement = select(CHECKPOINTS.c.id, CHECKPOINTS.c.uri, CHECKPOINTS.c.revision)
        rows += map(tuple, connection.execute(statement.where(CHECKPOINTS.c.id.in_(ids))))

    found = [
        (
            checkpoint_id,
            LocalCheckpoint(
                uri=uri,
                revision=revision,
                shards=tuple(shards.get(checkpoint_id, ())),
                copies=tuple(copies[checkpoint_id]),
            ),
        )
        for checkpoint_id, uri, revision in rows
    ]

    return sorted(found, key=lambda pair: pair[1].uri)


def checkpoints_like(database: Database, manifest: Manifest) -> list[tuple[str, Manifest]]:
    """The checkpoints of the same tensors in files of the same sizes, whose SHA-256 are all known."""
    c = CHECKPOINTS.c
    unknown = exists().where(SHARDS.c.checkpoint_id == c.id, SHARDS.c.sha256.is_(None))
    sizes = [shard.size for shard in manifest.shards]
    with database.read() as connection:
        rows = connection.execute(
            select(c.id, c.uri)
            .where(
                c.format == manifest.format,
                c.tensors == len(manifest),
                c.bytes == manifest.total_bytes,
                c.parameters == manifest.parameters,
                ~unknown,
            )
            .order_by(c.uri)
        ).all()
        known = [(uri, read_manifest(connection, checkpoint_id)) for checkpoint_id, uri in rows]

    return [
        (uri, other)
        for uri, other in known
        if [shard.size for shard in other.shards] == sizes and other.tensors_equal(manifest)
    ]
