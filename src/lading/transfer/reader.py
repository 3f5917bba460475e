"""The reader of one thread, the steps of a plan that threads share, and the observer of the bytes."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lading.formats.digests import LEAF
from lading.formats.manifest import BITS
from lading.planning.plan import PAGE, Plan, reads_gaps
from lading.transfer.arena import Arena, Stage
from lading.transfer.files import Shard
from lading.transfer.leaf_hasher import Part

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


class Observer(Protocol):
    """An observer of the bytes of a plan, on the thread that reads them, while they are in its cache."""

    def stop(self, read: int, at: int, limit: int, item: int) -> int:
        """Return where a piece of a read has to end to contain whole items, and whole units of this observer.

        :param at: its start in the file, not inside a unit.
        :param limit: its largest end, unless the first unit reaches farther.
        """

    def rows_together(self, rows: int) -> int:
        """Return the number of runs of an entry of the plan's rows that have to be read at once."""

    def bytes_read(self, read: int, begin: int, memory: memoryview) -> None:
        """Observe a piece of a read, which begins at the offset ``begin`` of the file."""

    def rows_read(self, rows: int, begin: int, memory: memoryview) -> None:
        """Observe runs of an entry of the plan's rows. ``begin`` is the number of bytes in all runs before."""

    @property
    def mapped_bytes(self) -> int:
        """The number of bytes to observe in mappings."""

    def mapped_steps(self, most: int) -> Iterator[Sequence[Part]]:
        """Yield the parts to observe in mappings, by offsets in the file, in steps of about ``most`` bytes."""

    def bytes_mapped(self, mappings: Mapping[int, memoryview], step: Sequence[Part]) -> int:
        """Observe a step of :meth:`mapped_steps` and return its number of bytes."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One run of the reads of a plan, which several threads share."""

    plan: Plan
    shards: Mapping[int, Shard]
    arena: Arena
    observer: Observer | None

    def steps(self) -> Iterator[Step | RowStep]:
        """Yield all reads, in steps for several threads."""
        plan = self.plan
        for read, (offset, size, cast) in enumerate(zip(plan.offsets, plan.sizes, plan.casts, strict=True)):
            item, _ = item_sizes(plan.conversions[cast])
            for at, count in self.pieces(read, offset, size, STEP, item):
                yield Step(read, at, count)

        for number, count in enumerate(plan.rows.counts):
            at_once = self.runs_at_once(number, STEP)
            for first in range(0, count, at_once):
                yield RowStep(number, first, min(count - first, at_once))

    def run(self, steps: Iterator[Step | RowStep]) -> Iterator[int]:
        """Do steps on this thread, and yield the number of bytes read in each."""
        reader = Reader(self)
        yield from map(reader.run, steps)
        reader.finish()

    def pieces(self, read: int, offset: int, size: int, most: int, item: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, size) of pieces of whole items, of about ``most`` bytes, which end at pages of the file or
        where the observer says.
        """
        at, end = offset, offset + size
        while at < end:
            limit = at + most
            if limit >= end:
                stop = end
            elif self.observer is None:
                stop = limit - limit % PAGE
                stop -= (stop - at) % item
            else:
                stop = self.observer.stop(read, at, limit, item)
            yield at, stop - at
            at = stop

    def runs_at_once(self, number: int, most: int) -> int:
        """Return the number of runs of the plan's rows ``number`` to read at once: about ``most`` bytes."""
        stride, length, together = self.plan.rows.strides[number], self.plan.rows.lengths[number], self.together(number)

        return max(1, most // (stride if reads_gaps(stride, length) else length) // together) * together

    def together(self, number: int) -> int:
        """Return the number of runs of the plan's rows ``number`` that have to be read at once."""
        return 1 if self.observer is None else self.observer.rows_together(number)


class Reader:
    """The reader of one thread.

    :param chunk: bytes to read at once if they do not go directly into the arena.
    """

    def __init__(self, reading: Reading, chunk: int | None = None) -> None:
        self._reading = reading
        self._chunk = chunk or (CAST_CHUNK if reading.arena.on_host else STEP)
        self._stage: Stage | None = None
        self._bounce: mmap.mmap | None = None

    def run(self, step: Step | RowStep) -> int:
        """Do a step and return the number of bytes read."""
        return self._run(*step) if isinstance(step, Step) else self._run_rows(*step)

    def _run(self, read: int, offset: int, size: int) -> int:
        plan = self._reading.plan
        file, cast = self._reading.shards[plan.shards[read]], plan.casts[read]
        source, target = plan.conversions[cast]
        source_size, target_size = item_sizes((source, target))
        place = plan.targets[read] + (offset - plan.offsets[read]) // source_size * target_size
        cold = file.is_cold(offset)

        memory = self._reading.arena.direct(place, size) if cast == 0 else None
        if memory is not None:
            self._fill(file, read, offset, memory, direct=cold and (place - offset) % PAGE == 0)
            return size

        stage = self._get_stage()
        for at, count in self._reading.pieces(read, offset, size, self._chunk, source_size):
            # Direct reads put a byte at its offset in its page; items have to be aligned all the same.
            skip = at % PAGE if cold and at % source_size == 0 else 0
            memory = stage.take()[skip : skip + count]
            self._fill(file, read, at, memory, direct=cold and (at - skip) % PAGE == 0)
            stage.put(skip, count, place + (at - offset) // source_size * target_size, source, target)

        return size

    def _fill(self, file: Shard, read: int, offset: int, memory: memoryview, *, direct: bool) -> None:
        """Read a piece, and have it observed before it leaves the cache."""
        observer = self._reading.observer
        if observer is None:
            file.fill(offset, memory, direct=direct)
            return

        # Large reads suit a disk and a network; these bytes are not in the cache of this core anyway.
        at_once = len(memory) if direct or file.remote else LEAF
        for at, count in self._reading.pieces(read, offset, len(memory), at_once, 1):
            part = memory[at - offset : at - offset + count]
            file.fill(at, part, direct=direct)
            observer.bytes_read(read, at, part)

    def _run_rows(self, number: int, begin: int, runs: int) -> int:
        plan, rows, observer = self._reading.plan, self._reading.plan.rows, self._reading.observer
        file, cast = self._reading.shards[rows.shards[number]], rows.casts[number]
        stride, length = rows.strides[number], rows.lengths[number]
        source, target = plan.conversions[cast]
        source_size, target_size = item_sizes((source, target))
        offset = rows.offsets[number] + begin * stride
        place = rows.targets[number] + begin * length // source_size * target_size
        cold = file.is_cold(offset)
        gaps = reads_gaps(stride, length)
        at_once = self._reading.runs_at_once(number, ROWS_CHUNK)

        for first in range(0, runs, at_once):
            count = min(runs - first, at_once)
            at, to = offset + first * stride, place + first * length // source_size * target_size
            memory = self._reading.arena.direct(to, count * length) if cast == 0 else None
            stage = self._get_stage() if memory is None else None
            if stage is not None:
                memory = stage.take()[: count * length]
            assert memory is not None

            if gaps:
                packed = np.frombuffer(memory, np.uint8).reshape(count, length)
                packed[:] = self._read_bounce(file, at, count, stride=stride, length=length, cold=cold)
            else:
                for i in range(count):
                    file.fill(at + i * stride, memory[i * length : (i + 1) * length])

            if observer is not None:
                observer.rows_read(number, (begin + first) * length, memory)
            if stage is not None:
                stage.put(0, count * length, to, source, target)

        return (runs - 1) * (stride if gaps else length) + length

    def _read_bounce(
        self, file: Shard, offset: int, count: int, *, stride: int, length: int, cold: bool
    ) -> npt.NDArray[np.uint8]:
        """Return runs of the file, a row each, valid until the next call."""
        if self._bounce is None:
            most = max(ROWS_CHUNK, LEAF) + 2 * PAGE
            self._bounce = mmap.mmap(-1, most, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

        size = (count - 1) * stride + length
        skew = offset % PAGE  # direct reads put a byte at its offset in its page
        file.fill(offset, memoryview(self._bounce)[skew : skew + size], direct=cold)

        return np.ndarray((count, length), np.uint8, self._bounce, skew, (stride, 1))

    def _get_stage(self) -> Stage:
        if self._stage is None:
            self._stage = self._reading.arena.stage(max(self._chunk, ROWS_CHUNK, LEAF) + PAGE)

        return self._stage

    def finish(self) -> None:
        """Wait until all bytes are in their places."""
        if self._stage is not None:
            self._stage.finish()


def item_sizes(conversion: tuple[str, str]) -> tuple[int, int]:
    """Return the bytes of an item in the file and in memory; without a cast, bytes are the items."""
    source, target = conversion

    return BITS[source] // 8 if source else 1, BITS[target] // 8 if target else 1
