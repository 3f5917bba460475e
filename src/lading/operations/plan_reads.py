"""The forecast of the reads of all ranks, without a plan for each: placements once, then arithmetic on columns.

Tensors of equal shape, dtypes and placements have one *kind*: a rank owns the same part of all of them. A model has few
kinds, regardless of the number of tensors and ranks; only the joining of reads depends on the order of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from torch.distributed.tensor.placement_types import Placement

from lading.formats.manifest import BITS, Manifest
from lading.models.placements import boxes_for_all_ranks
from lading.planning.block_scales import SCALE_DTYPE, blocks_of, scale_shape, with_scales
from lading.planning.box import Box
from lading.planning.composition import Source
from lading.planning.plan import LONG_RUN, Wanted, plan, reads_gaps

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kind:
    """The common properties of tensors with equal placements."""

    shape: tuple[int, ...]
    stored: str
    """The dtype in the file."""
    dtype: str
    """The dtype in memory."""
    boxes: tuple[Box, ...]
    """The parts that ranks own."""
    owned: Ints
    """The part of each rank, a position in ``boxes``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """The parts of a checkpoint that every rank owns, in columns as in :class:`~lading.planning.plan.Wanted`."""

    ranks: int
    tensors: Sequence[int]
    """The positions in the manifest."""
    kinds: Ints
    """The kind of each of ``tensors``, a position in ``known``."""
    known: tuple[Kind, ...]
    composed: Mapping[int, Source]
    """The compositions of those that are not one tensor as it is, by the position in ``tensors``."""

    def wanted(self, manifest: Manifest, rank: int) -> Wanted:
        """Return the tensors that one rank wants, with the scales that they need."""
        boxes = [kind.boxes[kind.owned[rank]] for kind in self.known]
        wanted = Wanted(
            tensors=self.tensors,
            boxes=[boxes[k] for k in self.kinds],
            dtypes=[self.known[k].dtype for k in self.kinds],
            composed=self.composed,
        )

        return with_scales(manifest, wanted)

    def of_one_tensor_each(self, manifest: Manifest) -> Layout:
        """Return the layout with the scales of its tensors, which are as many tensors more; without compositions."""
        scales = manifest.scales
        scaled = [i for i, tensor in enumerate(self.tensors) if tensor in scales]
        if not scaled:
            return self

        known = list(self.known)
        numbers: dict[int, int] = {}
        for k in dict.fromkeys(self.kinds[scaled].tolist()):
            kind = known[k]
            numbers[k] = len(known)
            known.append(
                Kind(
                    shape=scale_shape(kind.shape),
                    stored=SCALE_DTYPE,
                    dtype=SCALE_DTYPE,
                    boxes=tuple(map(blocks_of, kind.boxes)),
                    owned=kind.owned,
                )
            )

        return replace(
            self,
            tensors=[*self.tensors, *(scales[self.tensors[i]] for i in scaled)],
            kinds=np.append(self.kinds, [numbers[k] for k in self.kinds[scaled].tolist()]),
            known=tuple(known),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecast:
    """The totals of the plans of all ranks, in arrays with an entry for each."""

    bytes_read: Ints
    reads: Ints
    memory: Mapping[str, Ints]
    """The bytes of each dtype, by the manifest's names."""
    files: Flags
    """[shards, ranks]: ``True`` if the rank reads a byte of the file."""


def lay_out(
    manifest: Manifest,
    tensors: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    placements: Sequence[tuple[Placement, ...]],
    mesh_shape: Sequence[int],
    composed: Mapping[int, Source],
    *,
    stages: Sequence[frozenset[int] | None] = (),
) -> Layout:
    """Return the parts that each rank of a mesh owns; for a pipeline, stage by stage.

    :param tensors: positions in the manifest; the following are columns of the same length.
    :param shapes: the shapes of the global tensors in memory.
    :param dtypes: the dtypes in memory.
    :param placements: those of each tensor, one for every dim of the mesh of a stage.
    :param mesh_shape: the number of stages, then the sizes of the mesh of each.
    :param stages: the stages with each tensor, the others having an empty part; ``None``: all. Default: all have all.

    :raises NotSupportedError: the part of a rank is not a box.
    """
    numbers: dict[tuple[object, ...], int] = {}
    known: list[Kind] = []
    kinds = np.empty(len(tensors), dtype=np.int64)
    held = stages or [None] * len(tensors)
    pp, *mesh = mesh_shape
    columns = zip(tensors, shapes, dtypes, placements, held, strict=True)
    for i, (tensor, shape, dtype, placed, holders) in enumerate(columns):
        stored = manifest.dtypes[tensor]
        key = (shape, stored, dtype, placed, holders)
        number = numbers.get(key)
        if number is None:
            number = numbers[key] = len(known)
            boxes, owned = _boxes(shape, placed, mesh)
            boxes, owned = _staged(boxes, owned, holders, pp)
            known.append(Kind(shape=shape, stored=stored, dtype=dtype, boxes=boxes, owned=owned))
        kinds[i] = number

    return Layout(ranks=math.prod(mesh_shape), tensors=tensors, kinds=kinds, known=tuple(known), composed=composed)


def _boxes(
    shape: tuple[int, ...], placements: Sequence[Placement], mesh_shape: Sequence[int]
) -> tuple[tuple[Box, ...], Ints]:
    starts, sizes = boxes_for_all_ranks(placements, mesh_shape, [shape])
    differing = np.broadcast_shapes((1,) * len(mesh_shape), *(a.shape[:-1] for a in (*starts, *sizes)))
    columns = [[np.broadcast_to(a[..., 0], differing).ravel().tolist() for a in each] for each in (starts, sizes)]
    count = int(np.prod(differing, dtype=np.int64))
    boxes = tuple(Box(*(tuple(column[i] for column in each) for each in columns)) for i in range(count))
    owned = np.broadcast_to(np.arange(count).reshape(differing), tuple(mesh_shape)).ravel()

    return boxes, owned


def _staged(
    boxes: tuple[Box, ...], owned: Ints, holders: frozenset[int] | None, pp: int
) -> tuple[tuple[Box, ...], Ints]:
    """Return the parts for all stages; those with the tensor have equal parts."""
    if holders is None or len(holders) == pp:
        return boxes, np.tile(owned, pp)

    nothing = np.full_like(owned, len(boxes))

    return (*boxes, boxes[0].empty()), np.concatenate([owned if s in holders else nothing for s in range(pp)])


def forecast(manifest: Manifest, layout: Layout, others: Mapping[str, Ints] = MappingProxyType({})) -> Forecast:
    """Return the exact totals of :func:`~lading.planning.plan.plan` on every rank.

    :param others: the memory of what the checkpoint does not have, as :func:`memory_of_others` returns it.
    """
    memory: dict[str, Ints] = {}
    counts = np.bincount(layout.kinds, minlength=len(layout.known))
    for kind, count in zip(layout.known, counts.tolist(), strict=True):
        _add_memory(memory, kind.dtype, count * _bytes_owned(kind.dtype, kind.boxes, kind.owned))
    for dtype, owned in others.items():
        _add_memory(memory, dtype, owned)

    joinable = layout if layout.composed else layout.of_one_tensor_each(manifest)
    columns = _Columns.of(manifest, joinable)
    bytes_read, reads, files = (
        _one_by_one(manifest, layout) if columns is None else _together(manifest, joinable, columns)
    )

    return Forecast(bytes_read=bytes_read, reads=reads, memory=memory, files=files)


def memory_of_others(
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    placements: Sequence[tuple[Placement, ...]],
    mesh_shape: Sequence[int],
    *,
    stages: Sequence[frozenset[int] | None],
) -> dict[str, Ints]:
    """Return the bytes that each rank holds, by dtype, of tensors that are not read from the checkpoint.

    The parameters are those of :func:`lay_out`.
    """
    memory: dict[str, Ints] = {}
    pp, *mesh = mesh_shape
    for shape, dtype, placed, holders in zip(shapes, dtypes, placements, stages, strict=True):
        boxes, owned = _boxes(shape, placed, mesh)
        _add_memory(memory, dtype, _bytes_owned(dtype, *_staged(boxes, owned, holders, pp)))

    return memory


def _bytes_owned(dtype: str, boxes: Sequence[Box], owned: Ints) -> Ints:
    size = BITS[dtype] // 8

    return np.array([box.numel * size for box in boxes], dtype=np.int64)[owned]


def _add_memory(memory: dict[str, Ints], dtype: str, owned: Ints) -> None:
    memory[dtype] = memory[dtype] + owned if dtype in memory else owned


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Columns:
    """The tensors with elements, in the order of the files."""

    shards: Ints
    offsets: Ints
    kinds: Ints

    @classmethod
    def of(cls, manifest: Manifest, layout: Layout) -> _Columns | None:
        """Return the columns; ``None`` if the joining of reads depends on more than their places in the file, as for
        composed, overlapping or unaligned tensors, or for tensors in pieces.
        """
        tensors = np.array(layout.tensors, dtype=np.int64)
        order = np.argsort(tensors, kind="stable")
        sizes = np.array([BITS[kind.stored] // 8 for kind in layout.known], dtype=np.int64)
        elements = np.array([Box.whole(kind.shape).numel for kind in layout.known], dtype=np.int64)
        order = order[elements[layout.kinds[order]] > 0]

        kinds = layout.kinds[order]
        shards = np.array(manifest.shard_ids, dtype=np.int64)[tensors[order]]
        offsets = np.array(manifest.offsets, dtype=np.int64)[tensors[order]]
        ends = offsets + (sizes * elements)[kinds]
        apart = (shards[1:] != shards[:-1]) | (offsets[1:] >= ends[:-1])
        if layout.composed or manifest.pieces or not apart.all() or (offsets % sizes[kinds]).any():
            return None

        return cls(shards=shards, offsets=offsets, kinds=kinds)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reading:
    """The reads of the parts of a kind, in arrays with an entry for each rank."""

    conversion: tuple[str, str] | None
    bytes_read: Ints
    reads: Ints
    joins: Flags
    """``True`` if the part is one run of bytes; rows join nothing."""
    first: Ints
    """The offset of the first byte read, from the start of the tensor."""
    end: Ints
    """The bytes from the first one read to the last."""


def _reading(kind: Kind) -> _Reading:
    """Return the reads of a kind by the same arithmetic as that of a plan, for one tensor."""
    item = BITS[kind.stored] // 8
    figures = []
    for box in kind.boxes:
        bytes_read = reads = first = end = 0
        joins = box.numel > 0
        groups = [(0, box.numel, box.numel, 1)] if box.covers(kind.shape) else list(box.rows(kind.shape))
        for start, stride, length, count in groups if joins else ():
            stride, length = stride * item, length * item
            span = (count - 1) * stride + length
            as_rows = count > 1 and length <= LONG_RUN
            joins = joins and not as_rows
            whole = as_rows and reads_gaps(stride, length)
            bytes_read += span if whole else count * length
            reads += 1 if whole else count
            end = start * item + span
        if groups:
            first = groups[0][0] * item
        figures.append((bytes_read, reads, joins, first, end))

    owned = kind.owned
    bytes_read_, reads_, joins_, first_, end_ = (np.array(c) for c in zip(*figures, strict=True))

    return _Reading(
        conversion=None if kind.stored == kind.dtype else (kind.stored, kind.dtype),
        bytes_read=bytes_read_[owned],
        reads=reads_[owned],
        joins=joins_[owned],
        first=first_[owned],
        end=end_[owned],
    )


def _together(manifest: Manifest, layout: Layout, columns: _Columns) -> tuple[Ints, Ints, Flags]:
    readings = [_reading(kind) for kind in layout.known]
    bytes_read, reads = _zeros(layout.ranks), _zeros(layout.ranks)
    for reading, count in zip(readings, np.bincount(columns.kinds, minlength=len(readings)).tolist(), strict=True):
        bytes_read += count * reading.bytes_read
        reads += count * reading.reads

    # A read of a tensor joins that of the tensor before if they meet in the file.
    same = columns.shards[1:] == columns.shards[:-1]
    pairs = np.stack([columns.kinds[:-1], columns.kinds[1:], np.diff(columns.offsets)])[:, same]
    distinct, counts = np.unique(pairs, axis=1, return_counts=True)
    for (a, b, distance), count in zip(distinct.T.tolist(), counts.tolist(), strict=True):
        one, other = readings[a], readings[b]
        if one.conversion == other.conversion:
            meet = one.joins & other.joins & (one.end == other.first + distance)
            reads -= count * meet

    files = np.zeros((len(manifest.shards), layout.ranks), dtype=np.bool_)
    held = np.unique(np.stack([columns.shards, columns.kinds]), axis=1)
    for shard, kind in held.T.tolist():
        files[shard] |= readings[kind].reads > 0

    return bytes_read, reads, files


def _one_by_one(manifest: Manifest, layout: Layout) -> tuple[Ints, Ints, Flags]:
    bytes_read, reads = _zeros(layout.ranks), _zeros(layout.ranks)
    files = np.zeros((len(manifest.shards), layout.ranks), dtype=np.bool_)
    first: dict[tuple[int, ...], int] = {}
    for rank in range(layout.ranks):
        twin = first.setdefault(tuple(int(kind.owned[rank]) for kind in layout.known), rank)
        if twin < rank:
            bytes_read[rank], reads[rank], files[:, rank] = bytes_read[twin], reads[twin], files[:, twin]
            continue
        planned = plan(manifest, layout.wanted(manifest, rank))
        bytes_read[rank], reads[rank] = planned.read_bytes, planned.num_reads
        files[sorted({*planned.shards, *planned.rows.shards}), rank] = True

    return bytes_read, reads, files


def _zeros(count: int) -> Ints:
    return np.zeros(count, dtype=np.int64)
