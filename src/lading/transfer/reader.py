"""How one thread reads its share of a plan: in steps, each straight to its place, or by way of a small buffer."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lading.digests import LEAF
from lading.manifest import BITS
from lading.transfer.files import OpenShard
from lading.transfer.hashing import Hasher
from lading.transfer.memory import Arena, Stage
from lading.transfer.plan import PAGE, Plan, reads_gaps

STEP = 8 << 20
"""Bytes that a thread reads before it takes the next step: large enough for the disk, small enough to stop soon."""

CAST_CHUNK = 1 << 20
"""Bytes that are read before they are cast: they have to stay in a core's cache."""

ROWS_CHUNK = 1 << 20
"""Bytes that are read at once where gaps are read too: they have to stay in a core's cache until they are copied."""


class ReadStep(NamedTuple):
    """A part of a read."""

    read: int
    offset: int
    """In the file."""
    size: int


class RowStep(NamedTuple):
    """A part of the runs of an entry of the plan's rows."""

    rows: int
    first: int
    num: int


def read_steps(plan: Plan, hasher: Hasher | None) -> Iterator[ReadStep]:
    for read, (offset, size, cast) in enumerate(zip(plan.offsets, plan.sizes, plan.casts, strict=True)):
        item, _ = _item_sizes(plan.conversions[cast])
        for at, count in _pieces(hasher, read, offset, size, STEP, item):
            yield ReadStep(read, at, count)


def row_steps(plan: Plan, hasher: Hasher | None) -> Iterator[RowStep]:
    rows = plan.rows
    for i, (stride, length, count) in enumerate(zip(rows.strides, rows.lengths, rows.counts, strict=True)):
        at_once = _rows_at_once(STEP, stride if reads_gaps(stride, length) else length, hasher, i)
        for first in range(0, count, at_once):
            yield RowStep(i, first, min(count - first, at_once))


def _rows_at_once(most: int, distance: int, hasher: Hasher | None, rows: int) -> int:
    """How many runs, of ``distance`` bytes each, are read at once."""
    together = 1 if hasher is None else hasher.rows_together(rows)

    return max(1, most // distance // together) * together


def _pieces(
    hasher: Hasher | None, read: int, offset: int, size: int, most: int, item: int
) -> Iterator[tuple[int, int]]:
    """(offset, size) of pieces of whole items, of about ``most`` bytes. They end where a page of the file does, or
    where nothing ends that is hashed in one piece.
    """
    at, end = offset, offset + size
    while at < end:
        limit = at + most
        if limit >= end:
            stop = end
        elif hasher is None:
            stop = limit - limit % PAGE
            stop -= (stop - at) % item
        else:
            stop = hasher.stop(read, at, limit, item)
        yield at, stop - at
        at = stop


def _item_sizes(conversion: tuple[str, str]) -> tuple[int, int]:
    source, target = conversion

    return BITS[source] // 8 if source else 1, BITS[target] // 8 if target else 1


class Reader:
    """What one thread needs to read."""

    def __init__(self, plan: Plan, shards: Mapping[int, OpenShard], arena: Arena, hasher: Hasher | None) -> None:
        self._plan = plan
        self._shards = shards
        self._arena = arena
        self._hasher = hasher
        self._leaves = None if hasher is None else hasher.thread()
        self._chunk = CAST_CHUNK if arena.on_host else STEP
        self._stage: Stage | None = None
        self._bounce: mmap.mmap | None = None

    def run(self, step: ReadStep | RowStep) -> int:
        return self._run_rows(*step) if isinstance(step, RowStep) else self._run(*step)

    def _run(self, read: int, offset: int, size: int) -> int:
        plan = self._plan
        file, cast = self._shards[plan.shards[read]], plan.casts[read]
        source, target = plan.conversions[cast]
        source_size, target_size = _item_sizes((source, target))
        place = plan.targets[read] + (offset - plan.offsets[read]) // source_size * target_size
        cold = file.is_cold(offset)

        memory = self._arena.direct(place, size) if cast == 0 else None
        if memory is not None:
            self._fill(file, read, offset, memory, direct=cold and (place - offset) % PAGE == 0)
            return size

        stage = self._get_stage()
        for at, count in _pieces(self._hasher, read, offset, size, self._chunk, source_size):
            # Past the page cache, a byte must land where it is in its page; items have to be aligned all the same.
            skip = at % PAGE if cold and at % source_size == 0 else 0
            self._fill(file, read, at, stage.take()[skip : skip + count], direct=cold and (at - skip) % PAGE == 0)
            stage.put(skip, count, place + (at - offset) // source_size * target_size, source, target)

        return size

    def _run_rows(self, i: int, first: int, count: int) -> int:
        """Read runs at equal distances; in memory one follows the other."""
        plan, rows = self._plan, self._plan.rows
        file, cast = self._shards[rows.shards[i]], rows.casts[i]
        stride, length = rows.strides[i], rows.lengths[i]
        source, target = plan.conversions[cast]
        source_size, target_size = _item_sizes((source, target))
        gaps = reads_gaps(stride, length)
        distance = stride if gaps else length
        cold = file.is_cold(rows.offsets[i] + first * stride)
        if cold and not gaps:
            file.advise_random()

        at_once = _rows_at_once(ROWS_CHUNK, distance, self._hasher, i)
        for begin in range(first, first + count, at_once):
            num = min(first + count - begin, at_once)
            place = rows.targets[i] + begin * length // source_size * target_size
            memory = self._arena.direct(place, num * length) if cast == 0 else None
            stage = self._get_stage() if memory is None else None
            if stage is not None:
                memory = stage.take()[: num * length]
            assert memory is not None

            offset = rows.offsets[i] + begin * stride
            if gaps:
                bounce = self._read_bounce(file, offset, (num - 1) * stride + length, cold)
                packed = torch.frombuffer(memory, dtype=torch.uint8).view(num, length)
                packed.copy_(bounce.as_strided((num, length), (stride, 1), bounce.storage_offset()))
            else:
                for row in range(num):
                    file.fill(offset + row * stride, memory[row * length : (row + 1) * length])

            if self._hasher is not None and self._leaves is not None:
                parts = self._hasher.in_rows(i, begin * length, (begin + num) * length)
                self._leaves.parts(parts, begin * length, memory)
            if stage is not None:
                stage.put(0, num * length, place, source, target)

        return (count - 1) * distance + length

    def _read_bounce(self, file: OpenShard, offset: int, size: int, cold: bool) -> Tensor:
        """The bytes of the file, until the next call."""
        if self._bounce is None:
            self._bounce = mmap.mmap(-1, max(ROWS_CHUNK, LEAF) + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

        # Congruent to the file, and of whole pages, so that all of it can come past the page cache.
        skew = offset % PAGE
        begin = offset - skew
        end = min(-(-(offset + size) // PAGE) * PAGE, file.file.stat.size) if cold else offset + size
        first = 0 if cold else skew
        file.fill(begin + first, memoryview(self._bounce)[first : end - begin], direct=cold)

        return torch.frombuffer(self._bounce, dtype=torch.uint8, count=size, offset=skew)

    def _get_stage(self) -> Stage:
        if self._stage is None:
            self._stage = self._arena.stage(max(self._chunk, LEAF) + PAGE)

        return self._stage

    def _fill(self, file: OpenShard, read: int, offset: int, memory: memoryview, *, direct: bool) -> None:
        """Read a piece, and have it hashed before it leaves the cache."""
        if self._hasher is None or self._leaves is None:
            file.fill(offset, memory, direct=direct)
            return

        # A disk wants to be asked for much at once; what it brings is not in the cache of this core anyhow.
        for at, count in _pieces(self._hasher, read, offset, len(memory), len(memory) if direct else LEAF, 1):
            part = memory[at - offset : at - offset + count]
            file.fill(at, part, direct=direct)
            self._leaves.parts(self._hasher.in_read(read, at, at + count), at, part)

    def finish(self) -> None:
        if self._stage is not None:
            self._stage.finish()
