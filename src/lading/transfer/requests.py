"""The reads of a plan from another machine: each request brings the bytes of one or more steps.

A request costs a round trip, so steps whose bytes are near each other in the file share one: the bytes arrive in a
buffer, and go on from there. The bytes of a long read without a cast arrive in their places.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from lading.formats.digests import LEAF
from lading.planning.plan import ALIGNMENT
from lading.transfer.arena import Stage
from lading.transfer.reader import CAST_CHUNK, ROWS_CHUNK, Reading, RowStep, Step, item_sizes
from lading.transfer.stream import CONNECTIONS, Stream, StreamedShard

WINDOW = (48 << 20) // CONNECTIONS
"""The bytes of the buffer of a thread, and the most that a request brings into it: 48 MiB for all threads of a rank."""

GAP = 256 << 10
"""The most bytes between two steps that are read with them: a connection brings them in less time than a round trip."""

_STEP, _LARGE_STEP = 8 << 20, 16 << 20
_LARGE_FILE = 1 << 30


class Request(NamedTuple):
    """The bytes of a file from ``begin`` to ``end``, and the steps that they are for."""

    shard: int
    begin: int
    end: int
    steps: tuple[Step | RowStep, ...]


class _Part(NamedTuple):
    """The bytes of one step."""

    shard: int
    begin: int
    end: int
    step: Step | RowStep
    aligned: bool
    """``True`` if items lie at multiples of their size in the file, and so in a buffer."""
    moves: bool = False
    """``True`` if runs are moved together in the buffer, over the bytes between them."""


def requests_of(reading: Reading, files: Mapping[int, StreamedShard], whole: Collection[int] = ()) -> list[Request]:
    """Return the requests for all steps of a plan, in the order of the files.

    :param whole: shards that are read to the last byte, also those that no step needs.
    """
    found: list[Request] = []
    ends = dict.fromkeys(files, 0)

    def add(request: Request) -> None:
        found.extend(_between(request.shard, ends[request.shard], request.begin) if request.shard in whole else ())
        found.append(request)
        ends[request.shard] = max(ends[request.shard], request.end)

    last: Request | None = None
    joins = moves = False
    for part in sorted(_parts(reading, files), key=attrgetter("shard", "begin", "end")):
        # Bytes that two steps want must not be moved before both have them.
        apart = last is not None and (part.begin >= last.end or not (moves or part.moves))
        if last is not None and joins and part.aligned and apart and _is_near(last, part):
            last = Request(last.shard, last.begin, max(last.end, part.end), (*last.steps, part.step))
            moves = moves or part.moves
            continue
        if last is not None:
            add(last)
        last, joins, moves = Request(part.shard, part.begin, part.end, (part.step,)), part.aligned, part.moves
    if last is not None:
        add(last)
    for shard in whole:
        found.extend(_between(shard, ends[shard], files[shard].file.size or 0))

    return sorted(found, key=attrgetter("shard", "begin")) if whole else found


def _parts(reading: Reading, files: Mapping[int, StreamedShard]) -> Iterator[_Part]:
    plan = reading.plan
    for read, (shard, offset, size, cast) in enumerate(
        zip(plan.shards, plan.offsets, plan.sizes, plan.casts, strict=True)
    ):
        item, _ = item_sizes(plan.conversions[cast])
        most = WINDOW
        if cast == 0 and reading.arena.on_host:
            most = _STEP if (files[shard].file.size or 0) < _LARGE_FILE else _LARGE_STEP
        for at, count in reading.pieces(read, offset, size, most, item):
            yield _Part(shard, at, at + count, Step(read, at, count), at % item == 0)

    rows = plan.rows
    for number, count in enumerate(rows.counts):
        stride, length, offset = rows.strides[number], rows.lengths[number], rows.offsets[number]
        item, _ = item_sizes(plan.conversions[rows.casts[number]])
        moves = rows.casts[number] != 0 or not reading.arena.on_host
        at_once = together = reading.together(number)
        if stride - length <= GAP:
            at_once = max(1, WINDOW // stride // together) * together
        for first in range(0, count, at_once):
            runs, at = min(count - first, at_once), offset + first * stride
            end = at + (runs - 1) * stride + length
            yield _Part(rows.shards[number], at, end, RowStep(number, first, runs), at % item == 0, moves)


def _is_near(request: Request, part: _Part) -> bool:
    """Return whether one request brings ``part``, too."""
    return (
        part.shard == request.shard
        and part.begin - request.end <= GAP
        and max(part.end, request.end) - request.begin <= WINDOW
    )


def _between(shard: int, begin: int, end: int) -> Iterator[Request]:
    """Yield requests for bytes that no step needs."""
    for at in range(begin, end, WINDOW):
        yield Request(shard, at, min(end, at + WINDOW), ())


class RequestReader:
    """The reader of one thread."""

    def __init__(self, reading: Reading, stream: Stream) -> None:
        self._reading = reading
        self._stream = stream
        self._stage: Stage | None = None

    def run(self, request: Request) -> int:
        """Bring the bytes of a request to their places, and return their number."""
        shard, size = self._reading.shards[request.shard], request.end - request.begin
        digest = self._stream.digests.get(shard.file.name) if isinstance(shard, StreamedShard) else None

        memory = self._direct(request)
        if memory is not None:
            shard.fill(request.begin, memory)
            if digest is not None:
                digest.arrived(request.begin, memory, stays=True)
            self._observe(request.steps[0], memory)
            return size

        stage = self._get_stage()
        window, skip = stage.take(), self._skip(request)
        memory = window[skip : skip + size]
        shard.fill(request.begin, memory)
        if digest is not None:
            digest.arrived(request.begin, memory, stays=False)
        for step in request.steps:
            if isinstance(step, Step):
                self._put(stage, window, skip - request.begin, step)
            else:
                self._put_rows(stage, window, skip - request.begin, step)

        return size

    def _direct(self, request: Request) -> memoryview | None:
        """Return the place in the arena for all bytes of a request; ``None`` if they have to pass through a buffer."""
        if len(request.steps) != 1 or not isinstance(step := request.steps[0], Step):
            return None
        plan = self._reading.plan
        if plan.casts[step.read] != 0:
            return None

        return self._reading.arena.direct(plan.targets[step.read] + step.offset - plan.offsets[step.read], step.size)

    def _skip(self, request: Request) -> int:
        """Return the place of the first byte in the buffer, so that items are aligned there."""
        plan = self._reading.plan
        casts = (plan.casts[s.read] if isinstance(s, Step) else plan.rows.casts[s.rows] for s in request.steps)
        aligned = all(request.begin % item_sizes(plan.conversions[cast])[0] == 0 for cast in casts)

        return request.begin % ALIGNMENT if aligned or len(request.steps) > 1 else 0

    def _put(self, stage: Stage, window: memoryview, shift: int, step: Step) -> None:
        """Move the bytes of a step to their places.

        :param shift: the place in ``window`` of a byte, less its offset in the file.
        """
        plan, observer, (read, offset, size) = self._reading.plan, self._reading.observer, step
        cast = plan.casts[read]
        source, target = plan.conversions[cast]
        source_size, target_size = item_sizes((source, target))
        for at, count in self._reading.pieces(read, offset, size, CAST_CHUNK, source_size):
            memory = window[at + shift : at + shift + count]
            if observer is not None:
                observer.bytes_read(read, at, memory)
            place = plan.targets[read] + (at - plan.offsets[read]) // source_size * target_size
            direct = self._reading.arena.direct(place, count) if cast == 0 else None
            if direct is not None:
                direct[:] = memory
            else:
                stage.put(at + shift, count, place, source, target)

    def _put_rows(self, stage: Stage, window: memoryview, shift: int, step: RowStep) -> None:
        """Move runs to their places."""
        rows, observer, (number, begin, runs) = self._reading.plan.rows, self._reading.observer, step
        cast, stride, length = rows.casts[number], rows.strides[number], rows.lengths[number]
        source, target = self._reading.plan.conversions[cast]
        source_size, target_size = item_sizes((source, target))
        start = rows.offsets[number] + begin * stride + shift
        together = self._reading.together(number)
        at_once = max(1, ROWS_CHUNK // stride // together) * together
        for first in range(0, runs, at_once):
            count = min(runs - first, at_once)
            place = rows.targets[number] + (begin + first) * length // source_size * target_size
            packed = self._reading.arena.direct(place, count * length) if cast == 0 else None
            # Without a place in the arena, runs move together in the buffer: each to bytes that have been moved.
            at = start + first * length
            memory = window[at : at + count * length] if packed is None else packed
            # NumPy copies through memory of its own where both overlap.
            np.frombuffer(memory, np.uint8).reshape(count, length)[:] = np.ndarray(
                (count, length), np.uint8, window, start + first * stride, (stride, 1)
            )
            if observer is not None:
                observer.rows_read(number, (begin + first) * length, memory)
            if packed is None:
                stage.put(at, count * length, place, source, target)

    def _observe(self, step: Step | RowStep, memory: memoryview) -> None:
        """Observe the bytes of a step that are in their places, in pieces that fit the cache."""
        observer = self._reading.observer
        if observer is None or not isinstance(step, Step):
            return
        for at, count in self._reading.pieces(step.read, step.offset, step.size, LEAF, 1):
            begin = at - step.offset
            observer.bytes_read(step.read, at, memory[begin : begin + count])

    def _get_stage(self) -> Stage:
        if self._stage is None:
            self._stage = self._reading.arena.stage(max(WINDOW, LEAF) + ALIGNMENT, depth=1)

        return self._stage

    def finish(self) -> None:
        """Wait until all bytes are in their places."""
        if self._stage is not None:
            self._stage.finish()
