"""Where the bytes move: a plan, the files of a checkpoint, and the memory that they fill."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor
from tqdm import tqdm

from lading.manifest import BITS
from lading.transfer.files import OpenShard, ShardFile, open_shard
from lading.transfer.memory import RING_DEPTH, Arena, Stage, create_arena, map_file, populate, view
from lading.transfer.plan import ARENA, PAGE, Plan, reads_gaps

STEP = 8 << 20
"""Bytes that a thread reads before it takes the next step: large enough for the disk, small enough to stop soon."""

CAST_CHUNK = 1 << 20
"""Bytes that are read before they are cast: they have to stay in a core's cache."""

PINNED_BYTES = 512 << 20
"""Host memory that copies to a device may have pinned at once."""

ROWS_CHUNK = 1 << 20
"""Bytes that are read at once where gaps are read too: they have to stay in a core's cache until they are copied."""

COLD_THREADS = 4
"""Threads that a disk needs to be busy; of memory, one for each core gets the most."""


def execute(
    plan: Plan,
    files: Sequence[ShardFile],
    wanted: Sequence[tuple[tuple[int, ...], str]],
    *,
    device: torch.device,
    threads: int | None = None,
    progress: bool = False,
) -> list[Tensor]:
    """Read what ``plan`` says, and return the wanted tensors in the order in which the plan was asked for them.

    :param files: one for each shard of the manifest.
    :param wanted: the shape and the dtype of each tensor in memory.
    :param threads: that read at once; default: as many as this process may use cores, and some more for a disk.

    :raises CorruptModelCheckpointError: a file ends early, or is not the one that the plan was made for.
    :raises OSError: a file cannot be read.
    """
    arena = create_arena(plan.arena_bytes, device)

    with ExitStack() as stack:
        mapped = sorted({home for home in plan.homes if home != ARENA})
        shards = {
            i: stack.enter_context(open_shard(files[i])) for i in sorted({*plan.shards, *plan.rows.shards, *mapped})
        }

        if plan.sizes or plan.rows.counts:
            _read(plan, shards, arena, threads or _threads(plan, shards, arena), progress)
        mappings = {i: map_file(shards[i].fd, files[i].stat.size) for i in mapped}
        with ThreadPoolExecutor(_cores()) as pool:
            list(pool.map(populate, mappings.values()))

    return [
        _tensor(arena, mappings, home, place, shape, dtype)
        for home, place, (shape, dtype) in zip(plan.homes, plan.places, wanted, strict=True)
    ]


def _tensor(
    arena: Arena, mappings: Mapping[int, mmap.mmap], home: int, place: int, shape: tuple[int, ...], dtype: str
) -> Tensor:
    return arena.tensor(place, shape, dtype) if home == ARENA else view(mappings[home], place, shape, dtype)


def _cores() -> int:
    return max(1, len(os.sched_getaffinity(0)))


def _threads(plan: Plan, shards: Mapping[int, OpenShard], arena: Arena) -> int:
    most = PINNED_BYTES // (RING_DEPTH * STEP) if not arena.on_host else _cores() + COLD_THREADS
    reads = zip((*plan.shards, *plan.rows.shards), (*plan.offsets, *plan.rows.offsets), strict=True)
    cold = any(shards[i].is_cold(offset) for i, offset in reads)

    return min(most, max(_cores(), COLD_THREADS) if cold else _cores())


def _read(plan: Plan, shards: Mapping[int, OpenShard], arena: Arena, threads: int, progress: bool) -> None:
    """Run the reads on ``threads`` threads; the first error, or an interrupt, stops all of them."""
    steps = itertools.chain(_steps(plan), _row_steps(plan))
    lock = threading.Lock()
    stop = threading.Event()
    errors: list[BaseException] = []
    done = [0] * threads

    def work(me: int) -> None:
        # An intra-op thread pool within each reader would only fight with the other readers for the cores.
        torch.set_num_threads(1)
        reader = _Reader(plan, shards, arena)
        try:
            while not stop.is_set():
                with lock:
                    step = next(steps, None)
                if step is None:
                    break
                if len(step) == 5:
                    reader.run(*step)
                else:
                    reader.run_rows(*step)
                done[me] += step[2]
            reader.finish()
        except BaseException as error:  # it is raised again where the caller can see it
            errors.append(error)
            stop.set()

    torch_threads = torch.get_num_threads()
    workers = [
        threading.Thread(target=work, args=(i,), name=f"lading-reader-{i}", daemon=True)
        for i in range(min(threads, max(1, plan.read_bytes // STEP)))
    ]
    try:
        for worker in workers:
            worker.start()
        with tqdm(
            total=plan.read_bytes, unit="B", unit_scale=True, desc="load", disable=not progress, leave=False, delay=0.5
        ) as bar:
            for worker in workers:
                while worker.is_alive():
                    worker.join(timeout=0.1)
                    bar.update(sum(done) - bar.n)
    finally:
        # Also when the wait was interrupted: nobody may write to the arena when this function has returned.
        stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        torch.set_num_threads(torch_threads)

    if errors:
        raise errors[0]


def _steps(plan: Plan) -> Iterator[tuple[int, int, int, int, int]]:
    """The reads cut into steps: (shard, offset in the file, bytes, place in the arena, conversion)."""
    for shard, offset, size, target, cast in zip(
        plan.shards, plan.offsets, plan.sizes, plan.targets, plan.casts, strict=True
    ):
        source_size, target_size = _item_sizes(plan.conversions[cast])
        for start, count in _pieces(offset, size, STEP, source_size):
            yield shard, offset + start, count, target + start // source_size * target_size, cast


def _row_steps(plan: Plan) -> Iterator[tuple[int, int, int, int, int, int, int, int]]:
    """The rows cut into steps: (shard, offset in the file, bytes that are read, place in the arena, conversion, bytes
    from run to run, bytes of a run, runs).
    """
    rows = plan.rows
    for shard, offset, stride, length, count, target, cast in zip(
        rows.shards, rows.offsets, rows.strides, rows.lengths, rows.counts, rows.targets, rows.casts, strict=True
    ):
        source_size, target_size = _item_sizes(plan.conversions[cast])
        distance = stride if reads_gaps(stride, length) else length
        at_once = max(1, STEP // distance)
        for first in range(0, count, at_once):
            runs = min(count - first, at_once)
            place = target + first * length // source_size * target_size
            yield shard, offset + first * stride, (runs - 1) * distance + length, place, cast, stride, length, runs


def _pieces(offset: int, size: int, most: int, item: int) -> Iterator[tuple[int, int]]:
    """(start, size) of pieces of whole items, of at most ``most`` bytes, that end where a page of the file does."""
    start = 0
    while start < size:
        count = most - (offset + start) % PAGE
        count = min(size - start, count - count % item)
        yield start, count
        start += count


def _item_sizes(conversion: tuple[str, str]) -> tuple[int, int]:
    source, target = conversion

    return BITS[source] // 8 if source else 1, BITS[target] // 8 if target else 1


class _Reader:
    """What one thread needs to read."""

    def __init__(self, plan: Plan, shards: Mapping[int, OpenShard], arena: Arena) -> None:
        self._plan = plan
        self._shards = shards
        self._arena = arena
        self._chunk = CAST_CHUNK if arena.on_host else STEP
        self._stage: Stage | None = None
        self._bounce: mmap.mmap | None = None

    def run(self, shard: int, offset: int, size: int, place: int, cast: int) -> None:
        file = self._shards[shard]
        cold = file.is_cold(offset)
        memory = self._arena.direct(place, size) if cast == 0 else None
        if memory is not None:
            file.fill(offset, memory, direct=cold and (place - offset) % PAGE == 0)
            return

        source, target = self._plan.conversions[cast]
        source_size, target_size = _item_sizes((source, target))
        stage = self._get_stage()

        for start, count in _pieces(offset, size, self._chunk, source_size):
            file.fill(offset + start, stage.take()[:count], direct=cold and (offset + start) % PAGE == 0)
            stage.put(count, place + start // source_size * target_size, source, target)

    def run_rows(
        self, shard: int, offset: int, size: int, place: int, cast: int, stride: int, length: int, count: int
    ) -> None:
        """Read ``count`` runs of ``length`` bytes, ``stride`` bytes apart; in memory one follows the other."""
        file = self._shards[shard]
        cold = file.is_cold(offset)
        source, target = self._plan.conversions[cast]
        source_size, target_size = _item_sizes((source, target))
        gaps = reads_gaps(stride, length)
        at_once = ROWS_CHUNK // (stride if gaps else length)
        if cold and not gaps:
            file.advise_random()

        for first in range(0, count, at_once):
            rows = min(count - first, at_once)
            begin, to = offset + first * stride, place + first * length // source_size * target_size
            memory = self._arena.direct(to, rows * length) if cast == 0 else None
            stage = self._get_stage() if memory is None else None
            if stage is not None:
                memory = stage.take()[: rows * length]
            assert memory is not None

            if gaps:
                bounce = self._read_bounce(file, begin, (rows - 1) * stride + length, cold)
                packed = torch.frombuffer(memory, dtype=torch.uint8).view(rows, length)
                packed.copy_(bounce.as_strided((rows, length), (stride, 1), bounce.storage_offset()))
            else:
                for i in range(rows):
                    file.fill(begin + i * stride, memory[i * length : (i + 1) * length])

            if stage is not None:
                stage.put(rows * length, to, source, target)

    def _read_bounce(self, file: OpenShard, offset: int, size: int, cold: bool) -> Tensor:
        """The bytes of the file, until the next call."""
        if self._bounce is None:
            self._bounce = mmap.mmap(-1, ROWS_CHUNK + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

        # Congruent to the file, and of whole pages, so that all of it can come past the page cache.
        skew = offset % PAGE
        begin = offset - skew
        end = min(-(-(offset + size) // PAGE) * PAGE, file.file.stat.size) if cold else offset + size
        first = 0 if cold else skew
        file.fill(begin + first, memoryview(self._bounce)[first : end - begin], direct=cold)

        return torch.frombuffer(self._bounce, dtype=torch.uint8, count=size, offset=skew)

    def _get_stage(self) -> Stage:
        if self._stage is None:
            self._stage = self._arena.stage(self._chunk)

        return self._stage

    def finish(self) -> None:
        if self._stage is not None:
            self._stage.finish()
