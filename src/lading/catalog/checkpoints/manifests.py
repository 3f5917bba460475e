"""Manifests as rows: read into columns and written from them, without an object per tensor."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, exists, insert, select, update
from sqlalchemy.orm import Session

from lading.catalog.database.statements import chunks, intact, loads_object
from lading.catalog.records import DigestDocument, now
from lading.catalog.schema import (
    CHECKPOINTS,
    DIGESTS,
    DOCUMENTS,
    PIECES,
    SHARDS,
    TENSORS,
    VALIDATORS,
    CheckpointRow,
    ShardRow,
)
from lading.formats.digests import Digests, recorded
from lading.formats.manifest import BITS, Manifest, Piece, Shard

_ROWS = 10_000
"""The most rows in memory at a time."""


def find_checkpoint(session: Session, uri: str) -> CheckpointRow | None:
    """Return the row of the checkpoint at ``uri``; ``None`` if the catalog lacks it."""
    return session.scalars(select(CheckpointRow).where(CheckpointRow.uri == uri)).one_or_none()


def find_columns(session: Session, uri: str) -> Row[Any] | None:
    """Return the columns of :func:`find_checkpoint`, for a process that may need no mapped class at all."""
    in_pieces = exists().where(PIECES.c.checkpoint_id == CHECKPOINTS.c.id)
    document = (DOCUMENTS.c.uri.label("document_uri"), DOCUMENTS.c.sha256.label("document_sha256"))
    statement = (
        select(CHECKPOINTS, in_pieces.label("in_pieces"), *document)
        .outerjoin(DOCUMENTS, DOCUMENTS.c.checkpoint_id == CHECKPOINTS.c.id)
        .where(CHECKPOINTS.c.uri == uri)
    )

    return session.execute(statement).one_or_none()


def read_manifest(session: Session, row: CheckpointRow | Row[Any]) -> Manifest:
    """Return the manifest of a checkpoint.

    :param row: its row, or the columns of :func:`find_columns`.

    :raises CatalogError: the rows are damaged.
    """
    with intact("a manifest"):
        return _read_manifest(session.connection(), row)


def shards_of(row: CheckpointRow) -> tuple[Shard, ...]:
    """Return the files of a checkpoint, in their order."""
    return tuple(Shard(name=shard.name, size=shard.size, sha256=shard.sha256) for shard in row.shards)


def _read_manifest(connection: Connection, row: CheckpointRow | Row[Any]) -> Manifest:
    shards = connection.execute(
        select(SHARDS.c.name, SHARDS.c.size, SHARDS.c.sha256, VALIDATORS.c.validator)
        .outerjoin(VALIDATORS)
        .where(SHARDS.c.checkpoint_id == row.id)
        .order_by(SHARDS.c.position)
    )
    tensors = connection.execute(
        select(TENSORS.c.name, TENSORS.c.dtype, TENSORS.c.shape, TENSORS.c.shard, TENSORS.c.offset)
        .where(TENSORS.c.checkpoint_id == row.id)
        .order_by(TENSORS.c.position)
    )

    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    shard_ids, offsets = array("I"), array("q")
    # Few dtypes and shapes occur, each many times: this parses each once, and all tensors with it share one object.
    known_dtypes = {dtype: dtype for dtype in BITS}
    known_shapes: dict[str, tuple[int, ...]] = {}

    while rows := tensors.fetchmany(_ROWS):
        for name, dtype, shape, shard, offset in rows:
            names.append(name)
            dtypes.append(known_dtypes[dtype])
            parsed = known_shapes.get(shape)
            if parsed is None:
                parsed = known_shapes[shape] = tuple(json.loads(shape))
            shapes.append(parsed)
            shard_ids.append(shard)
            offsets.append(offset)

    return Manifest(
        format=row.format,
        shards=tuple(Shard(**shard) for shard in shards.mappings()),
        names=names,
        dtypes=dtypes,
        shapes=shapes,
        shard_ids=shard_ids,
        offsets=offsets,
        index_name=row.index_name,
        metadata={str(key): str(value) for key, value in loads_object(row.metadata_).items()},
        pieces=_read_pieces(connection, row.id) if row.in_pieces else {},
    )


def _read_pieces(connection: Connection, checkpoint_id: int) -> dict[int, tuple[Piece, ...]]:
    c = PIECES.c
    rows = connection.execute(
        select(c.position, c.starts, c.shape, c.shard, c.offset)
        .where(c.checkpoint_id == checkpoint_id)
        .order_by(c.position, c.number)
    )

    return {
        tensor: tuple(
            Piece(tuple(json.loads(starts)), tuple(json.loads(shape)), shard, offset)
            for _, starts, shape, shard, offset in found
        )
        for tensor, found in groupby(rows, key=itemgetter(0))
    }


def read_roots(session: Session, uri: str) -> dict[str, str]:
    """Return the known digests of the tensors of the checkpoint at ``uri``, by their names."""
    rows = session.connection().execute(
        select(TENSORS.c.name, TENSORS.c.digest)
        .join(CHECKPOINTS, CHECKPOINTS.c.id == TENSORS.c.checkpoint_id)
        .where(CHECKPOINTS.c.uri == uri, TENSORS.c.digest.is_not(None))
        .order_by(TENSORS.c.position)
    )

    return dict(map(tuple, rows))


def write_tensors(session: Session, row: CheckpointRow, manifest: Manifest) -> None:
    """Replace the shards and tensors of a checkpoint."""
    connection = session.connection()
    # The tensors first: deleting a shard searches for its tensors, and no index serves that.
    connection.execute(delete(TENSORS).where(TENSORS.c.checkpoint_id == row.id))
    row.shards = []
    session.flush()
    row.shards = [
        ShardRow(position=position, name=shard.name, size=shard.size, sha256=shard.sha256)
        for position, shard in enumerate(manifest.shards)
    ]
    session.flush()
    session.expire(row, ["in_pieces"])

    for some in chunks(_tensor_rows(row.id, manifest)):
        connection.execute(insert(TENSORS), some)
    for some in chunks(_piece_rows(row.id, manifest)):
        connection.execute(insert(PIECES), some)


def read_digests(session: Session, checkpoint_id: int, manifest: Manifest) -> Digests | None:
    """Return the recorded digests of a checkpoint's tensors; ``None`` if there are no digests.

    :raises CatalogError: the rows are damaged.
    """
    c = DIGESTS.c
    rows: list[tuple[int, bytes] | None] = [None] * len(manifest)
    with intact("a digest"):
        statement = select(c.position, c.dim, c.blocks).where(c.checkpoint_id == checkpoint_id)
        found = session.connection().execute(statement).all()
        if not found:
            return None
        for position, dim, blocks in found:
            if not 0 <= position < len(rows):
                raise ValueError(f"tensor {position} does not exist")
            rows[position] = (dim, bytes(blocks))

        return recorded(manifest, rows)


def write_digests(
    session: Session,
    checkpoint_id: int,
    manifest: Manifest,
    digests: Digests,
    document: DigestDocument | None = None,
) -> None:
    """Replace the digests of a checkpoint.

    :param document: the document that publishes them; ``None`` for digests of bytes that were read.
    """
    connection = session.connection()
    for table in (DIGESTS, DOCUMENTS):
        connection.execute(delete(table).where(table.c.checkpoint_id == checkpoint_id))
    if document is not None:
        row = {"checkpoint_id": checkpoint_id, "uri": document.uri, "sha256": document.sha256, "taken_at": now()}
        connection.execute(insert(DOCUMENTS), row)
    known = [(i, digest) for i, digest in enumerate(digests.iter(manifest)) if digest is not None]
    for piece in chunks(known):
        connection.execute(
            insert(DIGESTS),
            [
                {"checkpoint_id": checkpoint_id, "position": i, "dim": digest.dim, "blocks": digest.blocks}
                for i, digest in piece
            ],
        )
        connection.execute(
            update(TENSORS)
            .where(TENSORS.c.checkpoint_id == checkpoint_id, TENSORS.c.position == bindparam("at"))
            .values(digest=bindparam("root")),
            [{"at": i, "root": digest.root} for i, digest in piece],
        )


def forget_digests(session: Session, checkpoint_id: int) -> None:
    """Delete the digests of a checkpoint's tensors."""
    connection = session.connection()
    for table in (DIGESTS, DOCUMENTS):
        connection.execute(delete(table).where(table.c.checkpoint_id == checkpoint_id))
    connection.execute(update(TENSORS).where(TENSORS.c.checkpoint_id == checkpoint_id).values(digest=None))


def write_validators(session: Session, checkpoint_id: int, manifest: Manifest) -> None:
    """Replace the validators of a checkpoint's files by those of its manifest; keep them if that has none."""
    rows = [
        {"checkpoint_id": checkpoint_id, "position": position, "validator": shard.validator}
        for position, shard in enumerate(manifest.shards)
        if shard.validator is not None
    ]
    if rows:
        session.execute(delete(VALIDATORS).where(VALIDATORS.c.checkpoint_id == checkpoint_id))
        session.execute(insert(VALIDATORS), rows)


def forget_file_digests(session: Session, checkpoint_id: int) -> None:
    """Delete the digests of a checkpoint's files."""
    session.execute(update(ShardRow).where(ShardRow.checkpoint_id == checkpoint_id).values(sha256=None))


def _tensor_rows(checkpoint_id: int, manifest: Manifest) -> Iterator[dict[str, object]]:
    known: dict[tuple[int, ...], tuple[str, int]] = {}
    columns = zip(manifest.names, manifest.dtypes, manifest.shapes, manifest.shard_ids, manifest.offsets, strict=True)
    for position, (name, dtype, shape, shard, offset) in enumerate(columns):
        text, elements = known.get(shape) or known.setdefault(
            shape, (json.dumps(shape, separators=(",", ":")), math.prod(shape))
        )
        yield {
            "checkpoint_id": checkpoint_id,
            "position": position,
            "shard": shard,
            "name": name,
            "dtype": dtype,
            "shape": text,
            "parameters": elements,
            "bytes": elements * BITS[dtype] // 8,
            "offset": offset,
        }


def _piece_rows(checkpoint_id: int, manifest: Manifest) -> Iterator[dict[str, object]]:
    for position, pieces in manifest.pieces.items():
        for number, piece in enumerate(pieces):
            yield {
                "checkpoint_id": checkpoint_id,
                "position": position,
                "number": number,
                "shard": piece.shard,
                "offset": piece.offset,
                "starts": json.dumps(piece.starts, separators=(",", ":")),
                "shape": json.dumps(piece.shape, separators=(",", ":")),
            }
