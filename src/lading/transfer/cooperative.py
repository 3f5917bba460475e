"""The schedule of shared reads: each rank of a host reads a contiguous part of the bytes that any of them wants, and
they exchange it.

Ranks that read alone bring the same bytes from the disk several times if they want the same tensors (replicas), or
parts of the same pages (columns of a matrix). All ranks know the demands of all before a byte moves, so both ends of an
exchange know its content and order: messages are nothing but bytes. Pure functions, except for the copies from one
buffer to another.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lading.formats.digests import LEAF
from lading.formats.manifest import BITS, Manifest
from lading.planning.box import Box
from lading.planning.plan import ALIGNMENT, PAGE, Plan, Wanted, plan
from lading.transfer.hashing import Hasher
from lading.transfer.reader import Step

ROUND = 8 << 20
"""The bytes that all ranks of a host read at once, together."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The bytes that one rank wants: runs of equal size at equal distances, in columns to send to the others."""

    shards: array[int]
    """The shards; type code ``I``."""
    offsets: array[int]
    """The start of the first run in the shard's file; type code ``q``, as all that follow."""
    strides: array[int]
    """The bytes from the beginning of a run to that of the next."""
    lengths: array[int]
    """The bytes of a run."""
    counts: array[int]

    @classmethod
    def of(cls, planned: Plan) -> Self:
        """Return the demand of a plan: its reads, and then its rows."""
        rows = planned.rows

        return cls(
            shards=planned.shards + rows.shards,
            offsets=planned.offsets + rows.offsets,
            strides=planned.sizes + rows.strides,
            lengths=planned.sizes + rows.lengths,
            counts=array("q", [1]) * len(planned.sizes) + rows.counts,
        )


class Piece(NamedTuple):
    """The bytes of an entry of a demand from ``first`` to ``last``, where run follows run."""

    entry: int
    first: int
    last: int


class Index:
    """An index of a demand that finds its bytes in a part of a file."""

    def __init__(self, demand: Demand) -> None:
        columns = (demand.shards, demand.offsets, demand.strides, demand.lengths, demand.counts)
        shards, offsets, strides, lengths, counts = (np.array(column, dtype=np.int64) for column in columns)
        self._order = np.lexsort((offsets, shards))
        self._starts = np.searchsorted(shards[self._order], np.arange(int(shards.max(initial=-1)) + 2))
        self._offsets, self._strides, self._lengths, self._counts = (
            column[self._order] for column in (offsets, strides, lengths, counts)
        )
        self._ends = self._offsets + (self._counts - 1) * self._strides + self._lengths
        self._reach = self._ends.copy()
        """The largest end of the entries up to here."""
        for low, high in zip(self._starts[:-1], self._starts[1:], strict=True):
            np.maximum.accumulate(self._ends[low:high], out=self._reach[low:high])

    def within(self, shard: int, begin: int, end: int) -> list[Piece]:
        """Return the pieces in the bytes from ``begin`` to ``end``, in the order of the file."""
        if shard + 1 >= len(self._starts):
            return []
        low, high = int(self._starts[shard]), int(self._starts[shard + 1])
        high = low + int(np.searchsorted(self._offsets[low:high], end, side="left"))
        low += int(np.searchsorted(self._reach[low:high], begin, side="right"))
        part = slice(low, high)
        first, last = self._before(part, begin), self._before(part, end)
        found = np.flatnonzero(last > first)
        columns = (self._order[part][found], first[found], last[found])

        return [Piece(*numbers) for numbers in zip(*(column.tolist() for column in columns), strict=True)]

    def _before(self, part: slice, at: int) -> Ints:
        """Return the number of wanted bytes of each entry before ``at``."""
        strides, lengths = self._strides[part], self._lengths[part]
        within = np.clip(at - self._offsets[part], 0, self._ends[part] - self._offsets[part])
        run = within // strides

        return run * lengths + np.minimum(within - run * strides, lengths)

    def spans(self, shard: int) -> tuple[Ints, Ints]:
        """Return the begins and ends of the entries of a file, gaps included."""
        if shard + 1 >= len(self._starts):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        part = slice(int(self._starts[shard]), int(self._starts[shard + 1]))

        return self._offsets[part], self._ends[part]


class Joint:
    """The shared reads of the ranks of a host. All ranks compute the same from the same demands.

    :param demands: the demand of each rank.
    :param dims: the dims of the blocks to digest, one for each tensor of the manifest.
    """

    def __init__(self, manifest: Manifest, demands: Sequence[Demand], dims: Sequence[int] | None = None) -> None:
        self._manifest = manifest
        self._demands = demands
        self._indexes = [Index(demand) for demand in demands]
        self.wanted = _rows_of_all(manifest, self._indexes)
        """All rows that any rank wants a part of, for each tensor."""
        self.plan = plan(manifest, self.wanted)
        """The plan of its reads, whose other bytes are dropped."""
        self.hasher = None if dims is None else Hasher(manifest, dims, self.plan, self.wanted)
        """The observer of these reads, which gets the digests of what all ranks read."""

    def schedule(self) -> Schedule:
        """Return the schedule of the reads of all ranks."""
        ranks = len(self._demands)
        reads, offsets, sizes = array("I"), array("q"), array("q")
        most = max(LEAF, ROUND // ranks)
        for read, (begin, size) in enumerate(zip(self.plan.offsets, self.plan.sizes, strict=True)):
            at, end = begin, begin + size
            while at < end:
                stop = end if end - at <= most else self._stop(read, at, at + most)
                reads.append(read)
                offsets.append(at)
                sizes.append(stop - at)
                at = stop

        # A step belongs to the rank whose part of all bytes contains its middle.
        numbers = np.array(sizes, dtype=np.int64)
        middles = np.cumsum(numbers) - numbers // 2
        bounds = np.searchsorted(middles, [int(numbers.sum()) * r // ranks for r in range(ranks)]).tolist()

        return Schedule(joint=self, reads=reads, offsets=offsets, sizes=sizes, bounds=(*bounds, len(sizes)))

    def _stop(self, read: int, at: int, limit: int) -> int:
        """Return where a step has to end: between items of a tensor, and between atoms."""
        stop = limit - limit % PAGE if self.hasher is None else self.hasher.stop(read, at, limit, 1)
        manifest = self._manifest
        tensors = manifest.tensors_of(self.plan.shards[read])
        tensor = bisect_right(manifest.offsets, stop, tensors.start, tensors.stop) - 1
        item = BITS[manifest.dtypes[tensor]] // 8
        stop -= (stop - manifest.offsets[tensor]) % item

        return stop if stop > at else stop + item

    def message(self, rank: int, step: Step | None) -> Message:
        """Return the message to a rank with its bytes among those of a step; without a step, an empty one."""
        if step is None:
            return Message(pieces=[], places=[], size=0)

        pieces = self._indexes[rank].within(self.plan.shards[step.read], step.offset, step.offset + step.size)
        # Aligned, so that items are aligned where they arrive.
        lengths = (-(-(piece.last - piece.first) // ALIGNMENT) * ALIGNMENT for piece in pieces)
        *places, size = accumulate(lengths, initial=0)

        return Message(pieces=pieces, places=places, size=size)

    def pack(self, rank: int, message: Message, read: Tensor, begin: int, out: Tensor) -> None:
        """Write a message.

        :param read: the bytes of the file from ``begin`` on that contain those of the message.
        :param out: memory as long as the message.
        """
        demand = self._demands[rank]
        for piece, place in zip(message.pieces, message.places, strict=True):
            stride, length = demand.strides[piece.entry], demand.lengths[piece.entry]
            start = demand.offsets[piece.entry] - begin
            to = place
            for at, runs, size in _parts(piece.first, piece.last, length):
                source = start + at // length * stride + at % length
                target = out[to : to + runs * size]
                target.view(runs, size).copy_(
                    read.as_strided((runs, size), (stride if runs > 1 else size, 1), read.storage_offset() + source)
                )
                to += runs * size


class Message(NamedTuple):
    """The bytes of a step for one rank: consecutive pieces, each at its place."""

    pieces: list[Piece]
    places: list[int]
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The steps of all ranks; in columns, in the order of the files."""

    joint: Joint
    """The reads that contain the steps."""
    reads: array[int]
    offsets: array[int]
    sizes: array[int]
    bounds: tuple[int, ...]
    """The begins of the steps of each rank, and the end of those of the last."""

    @property
    def longest(self) -> int:
        """The bytes of the longest step."""
        return max(self.sizes, default=0)

    @property
    def rounds(self) -> int:
        """The largest number of steps of a rank."""
        return max(high - low for low, high in zip(self.bounds, self.bounds[1:], strict=False))

    def bytes_of(self, rank: int) -> int:
        """Return the number of bytes that a rank reads."""
        return sum(self.sizes[self.bounds[rank] : self.bounds[rank + 1]])

    def step(self, rank: int, number: int) -> Step | None:
        """Return the step of a rank in a round; ``None`` when it has finished."""
        i = self.bounds[rank] + number
        if i >= self.bounds[rank + 1]:
            return None

        return Step(self.reads[i], self.offsets[i], self.sizes[i])

    def steps(self, rank: int) -> Iterator[Step]:
        """Yield all steps of a rank."""
        for i in range(self.bounds[rank], self.bounds[rank + 1]):
            yield Step(self.reads[i], self.offsets[i], self.sizes[i])


def _parts(first: int, last: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield the bytes from ``first`` to ``last`` of consecutive runs of ``length`` bytes as the end of a run, whole
    runs, and the beginning of one; each as (first byte, number of runs, bytes of each).
    """
    begin = min(last, -(-first // length) * length)
    end = max(begin, last // length * length)
    if begin > first:
        yield first, 1, begin - first
    if end > begin:
        yield begin, (end - begin) // length, length
    if last > end:
        yield end, 1, last - end


def _rows_of_all(manifest: Manifest, indexes: Sequence[Index]) -> Wanted:
    tensors: list[int] = []
    boxes: list[Box] = []
    for shard in range(len(manifest.shards)):
        spans = [index.spans(shard) for index in indexes]
        begins, ends = _union(np.concatenate([s[0] for s in spans]), np.concatenate([s[1] for s in spans]))
        for i in manifest.tensors_of(shard) if len(begins) else ():
            start, size, shape = manifest.offsets[i], manifest.nbytes(i), manifest.shapes[i]
            low = int(np.searchsorted(ends, start, side="right"))
            high = int(np.searchsorted(begins, start + size, side="left")) - 1
            if low > high or not size:
                continue

            tensors.append(i)
            row = size // shape[0] if shape else size
            first = max(0, int(begins[low]) - start) // row
            stop = -(-(min(start + size, int(ends[high])) - start) // row)
            whole = Box.whole(shape)
            boxes.append(Box((first, *whole.starts[1:]), (stop - first, *whole.sizes[1:])) if shape else whole)

    return Wanted(tensors=tensors, boxes=boxes, dtypes=[manifest.dtypes[i] for i in tensors])


def _union(begins: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Return the union as the fewest intervals, in order, that do not touch."""
    order = np.argsort(begins, kind="stable")
    begins, reach = begins[order], np.maximum.accumulate(ends[order]) if len(ends) else ends
    first = np.flatnonzero(np.concatenate(([True], begins[1:] > reach[:-1]))) if len(begins) else begins

    return begins[first], reach[np.append(first[1:] - 1, len(reach) - 1)] if len(begins) else reach
