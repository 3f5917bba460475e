"""Manifests as rows: read into columns and written from them, without an object per tensor."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from itertools import islice

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from lading.catalog.database.statements import chunks, intact, loads_object
from lading.catalog.schema import CHECKPOINTS, DIGESTS, SHARDS, TENSORS, DigestRow, ShardRow, TensorRow
from lading.formats.digests import Digests, recorded
from lading.formats.manifest import BITS, Manifest, Shard

_ROWS = 10_000
"""Rows that are held in memory at a time."""


def read_manifest(connection: Connection, checkpoint_id: int) -> Manifest:
    """The manifest of a checkpoint.

    :raises CatalogError: the rows make none.
    """
    with intact("a manifest"):
        return _read_manifest(connection, checkpoint_id)


def _read_manifest(connection: Connection, checkpoint_id: int) -> Manifest:
    format_, index_name, metadata = connection.execute(
        select(CHECKPOINTS.c.format, CHECKPOINTS.c.index_name, CHECKPOINTS.c.metadata_).where(
            CHECKPOINTS.c.id == checkpoint_id
        )
    ).one()
    shards = connection.execute(
        select(SHARDS.c.name, SHARDS.c.size, SHARDS.c.sha256)
        .where(SHARDS.c.checkpoint_id == checkpoint_id)
        .order_by(SHARDS.c.position)
    ).all()
    tensors = connection.execute(
        select(TENSORS.c.name, TENSORS.c.dtype, TENSORS.c.shape, TENSORS.c.shard, TENSORS.c.offset)
        .where(TENSORS.c.checkpoint_id == checkpoint_id)
        .order_by(TENSORS.c.position)
    )

    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    shard_ids, offsets = array("I"), array("q")
    # Few dtypes and shapes occur, each many times: they are parsed once, and all tensors of one share one object.
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
        format=format_,
        shards=tuple(Shard(name=name, size=size, sha256=sha256) for name, size, sha256 in shards),
        names=names,
        dtypes=dtypes,
        shapes=shapes,
        shard_ids=shard_ids,
        offsets=offsets,
        index_name=index_name,
        metadata={str(key): str(value) for key, value in loads_object(metadata).items()},
    )


def read_roots(connection: Connection, uri: str) -> dict[str, str]:
    """The digests of the tensors of the checkpoint at ``uri``, by their names, where they are known."""
    rows = connection.execute(
        select(TENSORS.c.name, TENSORS.c.digest)
        .join(CHECKPOINTS, CHECKPOINTS.c.id == TENSORS.c.checkpoint_id)
        .where(CHECKPOINTS.c.uri == uri, TENSORS.c.digest.is_not(None))
        .order_by(TENSORS.c.position)
    )

    return dict(map(tuple, rows))


def same_tensors(a: Manifest, b: Manifest) -> bool:
    """Whether two manifests have the same files and tensors; the columns may be of different types."""
    return a.has_files_of(b) and a.tensors_equal(b)


def write_tensors(connection: Connection, checkpoint_id: int, manifest: Manifest) -> None:
    """Replace the shards and tensors of a checkpoint."""
    # The tensors first: a shard that is deleted looks for its tensors, which no index serves.
    connection.execute(delete(TensorRow).where(TensorRow.checkpoint_id == checkpoint_id))
    connection.execute(delete(ShardRow).where(ShardRow.checkpoint_id == checkpoint_id))
    if manifest.shards:
        connection.execute(
            insert(ShardRow),
            [
                {
                    "checkpoint_id": checkpoint_id,
                    "position": position,
                    "name": shard.name,
                    "size": shard.size,
                    "sha256": shard.sha256,
                }
                for position, shard in enumerate(manifest.shards)
            ],
        )

    rows = _tensor_rows(checkpoint_id, manifest)
    while piece := list(islice(rows, _ROWS)):
        connection.execute(insert(TensorRow), piece)


def read_digests(connection: Connection, checkpoint_id: int, manifest: Manifest) -> Digests | None:
    """What is recorded of the bytes of a checkpoint's tensors; ``None`` where nothing is.

    :raises CatalogError: the rows make no digests.
    """
    rows: list[tuple[int, bytes] | None] = [None] * len(manifest)
    with intact("a digest"):
        found = connection.execute(
            select(DIGESTS.c.position, DIGESTS.c.dim, DIGESTS.c.blocks).where(DIGESTS.c.checkpoint_id == checkpoint_id)
        ).all()
        if not found:
            return None
        for position, dim, blocks in found:
            if not 0 <= position < len(rows):
                raise ValueError(f"there is no tensor {position}")
            rows[position] = (dim, bytes(blocks))

        return recorded(manifest, rows)


def write_digests(connection: Connection, checkpoint_id: int, manifest: Manifest, digests: Digests) -> None:
    """Record digests in place of those that were recorded before."""
    connection.execute(delete(DigestRow).where(DigestRow.checkpoint_id == checkpoint_id))
    known = [(i, digest) for i, digest in enumerate(digests.iter(manifest)) if digest is not None]
    for piece in chunks(known):
        connection.execute(
            insert(DigestRow),
            [
                {"checkpoint_id": checkpoint_id, "position": i, "dim": digest.dim, "blocks": digest.blocks}
                for i, digest in piece
            ],
        )
        connection.execute(
            update(TensorRow)
            .where(TensorRow.checkpoint_id == checkpoint_id, TensorRow.position == bindparam("at"))
            .values(digest=bindparam("root")),
            [{"at": i, "root": digest.root} for i, digest in piece],
        )


def forget_digests(connection: Connection, checkpoint_id: int) -> None:
    """Forget what is known of the bytes of a checkpoint."""
    connection.execute(delete(DigestRow).where(DigestRow.checkpoint_id == checkpoint_id))
    connection.execute(update(TensorRow).where(TensorRow.checkpoint_id == checkpoint_id).values(digest=None))
    connection.execute(update(ShardRow).where(ShardRow.checkpoint_id == checkpoint_id).values(sha256=None))


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
