"""The reader of one thread, and the steps of a plan that threads share."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lading.formats.digests import LEAF
from lading.formats.manifest import BITS
from lading.planning.plan import PAGE, Plan, reads_gaps
from lading.transfer.files import OpenShard
from lading.transfer.hashing import Hasher
from lading.transfer.memory import Arena, Stage

STEP = 8 << 20
"""The bytes of a step: large enough for the disk, small enough to stop soon."""

CAST_CHUNK = 1 << 20
"""The bytes to read before they are cast: they have to stay in a core's cache."""

ROWS_CHUNK = 1 << 20
"""The bytes to read at once with gaps between rows: they have to stay in a core's cache until they are copied."""


class Step(NamedTuple):
    """A part of a read of the plan."""

    read: int
    """The number of the read."""
    offset: int
    """The offset in the file."""
    size: int
    """Bytes."""


class RowStep(NamedTuple):
    """A part of rows of the plan: runs at equal distances, which follow one another in memory."""

    rows: int
    """The number of the rows."""
    first: int
    """The first run."""
    runs: int


def steps_of(plan: Plan, hasher: Hasher | None) -> Iterator[Step | RowStep]:
    """Yield all reads of a plan, in steps for several threads."""
    for read, (offset, size, cast) in enumerate(zip(plan.offsets, plan.sizes, plan.casts, strict=True)):
        item, _ = item_sizes(plan.conversions[cast])
        for at, count in _pieces(hasher, read, offset, size, STEP, item):
            yield Step(read, at, count)

    for number, (stride, length, count) in enumerate(
        zip(plan.rows.strides, plan.rows.lengths, plan.rows.counts, strict=True)
    ):
        at_once = _runs_at_once(hasher, number, STEP, stride if reads_gaps(stride, length) else length)
        for first in range(0, count, at_once):
            yield RowStep(number, first, min(count - first, at_once))


def _pieces(
    hasher: Hasher | None, read: int, offset: int, size: int, most: int, item: int
) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of pieces of whole items, of about ``most`` bytes, which end at pages of the file or between
    atoms.
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


def _runs_at_once(hasher: Hasher | None, number: int, most: int, distance: int) -> int:
    """Return the number of runs of the plan's rows ``number`` to read at once, which take ``distance`` bytes each."""
    together = 1 if hasher is None else hasher.rows_together(number)

    return max(1, most // distance // together) * together


def item_sizes(conversion: tuple[str, str]) -> tuple[int, int]:
    """Return the bytes of an item in the file and in memory; without a cast, bytes are the items."""
    source, target = conversion

    return BITS[source] // 8 if source else 1, BITS[target] // 8 if target else 1


class Reader:
    """The reader of one thread.

    :param chunk: bytes to read at once if they do not go directly into the arena.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Mapping[int, OpenShard],
        arena: Arena,
        hasher: Hasher | None,
        chunk: int | None = None,
    ) -> None:
        self._plan = plan
        self._shards = shards
        self._arena = arena
        self._chunk = chunk or (CAST_CHUNK if arena.on_host else STEP)
        self._hasher = hasher
        self._leaves = None if hasher is None else hasher.thread()
        self._stage: Stage | None = None
        self._bounce: mmap.mmap | None = None

    def run(self, step: Step | RowStep) -> int:
        """Do a step and return the number of bytes read."""
        return self._run(*step) if isinstance(step, Step) else self._run_rows(*step)

    def _run(self, read: int, offset: int, size: int) -> int:
        plan = self._plan
        file, cast = self._shards[plan.shards[read]], plan.casts[read]
        source, target = plan.conversions[cast]
        source_size, target_size = item_sizes((source, target))
        place = plan.targets[read] + (offset - plan.offsets[read]) // source_size * target_size
        cold = file.is_cold(offset)

        memory = self._arena.direct(place, size) if cast == 0 else None
        if memory is not None:
            self._fill(file, read, offset, memory, direct=cold and (place - offset) % PAGE == 0)
            return size

        stage = self._get_stage()
        for at, count in _pieces(self._hasher, read, offset, size, self._chunk, source_size):
            # Direct reads put a byte at its offset in its page; items have to be aligned all the same.
            skip = at % PAGE if cold and at % source_size == 0 else 0
            memory = stage.take()[skip : skip + count]
            self._fill(file, read, at, memory, direct=cold and (at - skip) % PAGE == 0)
            stage.put(skip, count, place + (at - offset) // source_size * target_size, source, target)

        return size

    def _fill(self, file: OpenShard, read: int, offset: int, memory: memoryview, *, direct: bool) -> None:
        """Read a piece, and hash it before it leaves the cache."""
        if self._hasher is None or self._leaves is None:
            file.fill(offset, memory, direct=direct)
            return

        # Large requests suit a disk; its bytes are not in the cache of this core anyway.
        for at, count in _pieces(self._hasher, read, offset, len(memory), len(memory) if direct else LEAF, 1):
            part = memory[at - offset : at - offset + count]
            file.fill(at, part, direct=direct)
            self._leaves.parts(self._hasher.in_read(read, at, at + count), at, part)

    def _run_rows(self, number: int, begin: int, runs: int) -> int:
        rows = self._plan.rows
        file, cast = self._shards[rows.shards[number]], rows.casts[number]
        stride, length = rows.strides[number], rows.lengths[number]
        source, target = self._plan.conversions[cast]
        source_size, target_size = item_sizes((source, target))
        offset = rows.offsets[number] + begin * stride
        place = rows.targets[number] + begin * length // source_size * target_size
        cold = file.is_cold(offset)
        gaps = reads_gaps(stride, length)
        at_once = _runs_at_once(self._hasher, number, ROWS_CHUNK, stride if gaps else length)

        for first in range(0, runs, at_once):
            count = min(runs - first, at_once)
            at, to = offset + first * stride, place + first * length // source_size * target_size
            memory = self._arena.direct(to, count * length) if cast == 0 else None
            stage = self._get_stage() if memory is None else None
            if stage is not None:
                memory = stage.take()[: count * length]
            assert memory is not None

            if gaps:
                bounce = self._read_bounce(file, at, (count - 1) * stride + length, cold)
                packed = torch.frombuffer(memory, dtype=torch.uint8).view(count, length)
                packed.copy_(bounce.as_strided((count, length), (stride, 1), bounce.storage_offset()))
            else:
                for i in range(count):
                    file.fill(at + i * stride, memory[i * length : (i + 1) * length])

            if self._hasher is not None and self._leaves is not None:
                done = (begin + first) * length
                self._leaves.parts(self._hasher.in_rows(number, done, done + count * length), done, memory)
            if stage is not None:
                stage.put(0, count * length, to, source, target)

        return (runs - 1) * (stride if gaps else length) + length

    def _read_bounce(self, file: OpenShard, offset: int, size: int, cold: bool) -> Tensor:
        """Return bytes of the file, valid until the next call."""
        if self._bounce is None:
            most = max(ROWS_CHUNK, LEAF) + 2 * PAGE
            self._bounce = mmap.mmap(-1, most, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

        skew = offset % PAGE  # direct reads put a byte at its offset in its page
        file.fill(offset, memoryview(self._bounce)[skew : skew + size], direct=cold)

        return torch.frombuffer(self._bounce, dtype=torch.uint8, count=size, offset=skew)

    def _get_stage(self) -> Stage:
        if self._stage is None:
            self._stage = self._arena.stage(max(self._chunk, ROWS_CHUNK, LEAF) + PAGE)

        return self._stage

    def finish(self) -> None:
        """Wait until all bytes are in their places."""
        if self._stage is not None:
            self._stage.finish()
