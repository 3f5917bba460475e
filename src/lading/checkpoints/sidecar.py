"""Sidecars: the matrices that tensor parallelism cuts along their second dim, cut beforehand. Pure: no I/O, no torch.

Of such a matrix a rank needs a part of every row, and where rows are short it reads the gaps as well. A sidecar is a
file that holds each matrix once more, as ``tp`` tensors of ``cols / tp`` columns. Those of one rank lie side by side:
first the block 0 of every matrix, then the block 1 of every matrix, and so on. So a rank reads one run of bytes.

To the catalog, a sidecar is a checkpoint like any other, under a URI of its own that names the one it is made of.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lading.formats.manifest import Manifest
from lading.planning.box import Box
from lading.planning.plan import Wanted
from lading.transfer.files import ShardFile

IDENTITY = "lading.tensors"
"""The key of the metadata under which a sidecar says what it is of; see :func:`identity_of`."""

_URI = re.compile(r"repack\+tp=(\d+):(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """A sidecar of a checkpoint."""

    uri: str
    """What the catalog knows it by."""
    tp: int
    """How many blocks there are of each matrix."""
    manifest: Manifest
    """Of its file."""
    file: ShardFile
    """In the state in which its bytes were verified."""
    tensors: array[int]
    """Positions in the checkpoint's manifest of the matrices, in the order in which their blocks come; type code
    ``I``."""


def sidecar_uri(uri: str, tp: int) -> str:
    """What the catalog knows the sidecar of a checkpoint by."""
    return f"repack+tp={tp}:{uri}"


def base_uri(uri: str) -> str | None:
    """The URI of the checkpoint that a sidecar is of; ``None`` for what is no URI of a sidecar."""
    match = _URI.fullmatch(uri)

    return None if match is None else match[2]


def tp_of(uri: str) -> int:
    """For how many ranks the sidecar of this URI was cut.

    :raises ValueError: it is no URI of a sidecar.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise ValueError(f"the URI of a sidecar is expected, but it is {uri!r}")

    return int(match[1])


def identity_of(manifest: Manifest, tensors: Sequence[int], roots: Mapping[str, str]) -> str | None:
    """What a sidecar of these tensors is of: their names and bytes, and nothing else of the checkpoint.

    :param roots: the digests of tensors (:func:`lading.formats.digests.root_digest`), by their names. They tell dtype
        and shape as well.

    :returns: ``None`` where one of them is not known.
    """
    hasher = hashlib.sha256()
    for i in tensors:
        root = roots.get(manifest.names[i])
        if root is None:
            return None
        hasher.update(f"{root} {manifest.names[i]}\0".encode())

    return hasher.hexdigest()


def metadata_of(uri: str, revision: str, tp: int, identity: str) -> dict[str, str]:
    """What the header of a sidecar says of it.

    :param uri: of the checkpoint, as ``revision`` is.
    """
    return {"lading.checkpoints.checkpoint": uri, "lading.revision": revision, "lading.tp": str(tp), IDENTITY: identity}


def blocks_of(manifest: Manifest, tensors: Sequence[int], tp: int) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Name, dtype and shape of all tensors of a sidecar, in the order of its file.

    :param tensors: positions of matrices whose columns ``tp`` divides.
    """
    for k in range(tp):
        for i in tensors:
            rows, cols = manifest.shapes[i]
            yield f"{manifest.names[i]}.{k}", manifest.dtypes[i], (rows, cols // tp)


def matrices_of(manifest: Manifest, blocks: Manifest, tp: int) -> array[int] | None:
    """The positions in a checkpoint's manifest of the matrices of which ``blocks`` holds the blocks, in their order.

    :returns: ``None`` where it does not hold just the blocks of matrices of the checkpoint.
    """
    count = len(blocks) // tp
    positions = {name: i for i, name in enumerate(manifest.names)}
    tensors = array("I")
    for name in blocks.names[:count]:
        i = positions.get(name.removesuffix(".0"))
        if i is None or len(manifest.shapes[i]) != 2:
            return None
        tensors.append(i)

    expected = blocks_of(manifest, tensors, tp)
    found = zip(blocks.names, blocks.dtypes, blocks.shapes, strict=True)

    return tensors if count and list(found) == list(expected) else None


def joined(manifest: Manifest, sidecar: Sidecar) -> Manifest:
    """The manifest of a checkpoint with the file and the tensors of its sidecar behind its own."""
    blocks = sidecar.manifest
    first = len(manifest.shards)

    return replace(
        manifest,
        shards=(*manifest.shards, *blocks.shards),
        names=[*manifest.names, *blocks.names],
        dtypes=[*manifest.dtypes, *blocks.dtypes],
        shapes=[*manifest.shapes, *blocks.shapes],
        shard_ids=array("I", manifest.shard_ids) + array("I", [first + shard for shard in blocks.shard_ids]),
        offsets=array("q", manifest.offsets) + array("q", blocks.offsets),
    )


def substituted(manifest: Manifest, wanted: Wanted, sidecar: Sidecar | None) -> tuple[Manifest, Wanted]:
    """What is wanted of a checkpoint, taken from its sidecar wherever that has just the columns.

    Rows may be cut further, as fully sharded data parallelism does.

    :param sidecar: ``None``: all stays as it is.

    :returns: the :func:`joined` manifest, and what is wanted of it.
    """
    if sidecar is None:
        return manifest, wanted

    places = {tensor: n for n, tensor in enumerate(sidecar.tensors)}
    tensors, boxes = list(wanted.tensors), list(wanted.boxes)
    for i, (tensor, box) in enumerate(zip(wanted.tensors, wanted.boxes, strict=True)):
        place = None if i in wanted.composed else places.get(tensor)
        if place is None:
            continue
        k, within = divmod(box.starts[1] * sidecar.tp, manifest.shapes[tensor][1])
        if box.numel and not within and box.sizes[1] * sidecar.tp == manifest.shapes[tensor][1]:
            tensors[i] = position_of(len(manifest), sidecar, place, k)
            boxes[i] = Box((box.starts[0], 0), box.sizes)

    return joined(manifest, sidecar), replace(wanted, tensors=tensors, boxes=boxes)


def position_of(tensors: int, sidecar: Sidecar, place: int, k: int) -> int:
    """The position in the :func:`joined` manifest of the block ``k`` of a matrix.

    :param tensors: of the checkpoint.
    :param place: of the matrix in ``sidecar.tensors``.
    """
    return tensors + k * len(sidecar.tensors) + place
