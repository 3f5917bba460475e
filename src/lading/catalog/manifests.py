"""Manifests as rows: read into columns and written from them, without an object per tensor."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from itertools import islice

from sqlalchemy import Connection, delete, insert, select, update

from lading.catalog.entries import intact, loads_object
from lading.catalog.schema import CheckpointRow, ShardRow, TensorRow
from lading.manifest import BITS, Manifest, Shard

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
        select(CheckpointRow.format, CheckpointRow.index_name, CheckpointRow.metadata_).where(
            CheckpointRow.id == checkpoint_id
        )
    ).one()
    shards = connection.execute(
        select(ShardRow.name, ShardRow.size, ShardRow.sha256)
        .where(ShardRow.checkpoint_id == checkpoint_id)
        .order_by(ShardRow.position)
    ).all()
    tensors = connection.execute(
        select(TensorRow.name, TensorRow.dtype, TensorRow.shape, TensorRow.shard, TensorRow.offset)
        .where(TensorRow.checkpoint_id == checkpoint_id)
        .order_by(TensorRow.position)
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


def read_digests(connection: Connection, uri: str) -> dict[str, str]:
    """The digests of the tensors of the checkpoint at ``uri``, by their names, where they are known."""
    rows = connection.execute(
        select(TensorRow.name, TensorRow.digest)
        .join(CheckpointRow, CheckpointRow.id == TensorRow.checkpoint_id)
        .where(CheckpointRow.uri == uri, TensorRow.digest.is_not(None))
        .order_by(TensorRow.position)
    )

    return {name: digest for name, digest in rows if digest is not None}


def forget_digests(connection: Connection, checkpoint_id: int) -> None:
    """Forget the digests of the tensors of a checkpoint, whose bytes may be others by now."""
    known = TensorRow.checkpoint_id == checkpoint_id, TensorRow.digest.is_not(None)
    connection.execute(update(TensorRow).where(*known).values(digest=None))


def same_tensors(a: Manifest, b: Manifest) -> bool:
    """Whether two manifests have the same shards and tensors; the columns may be of different types."""
    return a.shards == b.shards and all(
        len(x) == len(y) and all(p == q for p, q in zip(x, y, strict=True))
        for x, y in (
            (a.names, b.names),
            (a.dtypes, b.dtypes),
            (a.shapes, b.shapes),
            (a.shard_ids, b.shard_ids),
            (a.offsets, b.offsets),
        )
    )


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
