"""Where the bytes move: a plan, the files of a checkpoint, and the memory that they fill."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lading.errors import CorruptModelCheckpointError
from lading.filesystem import FileStat
from lading.manifest import BITS
from lading.transfer.memory import Arena, Stage, create_arena, map_file, view
from lading.transfer.plan import ARENA, Plan

STEP = 8 << 20
"""Bytes that a thread reads before it takes the next step: large enough for the disk, small enough to stop soon."""

CAST_CHUNK = 1 << 20
"""Bytes that are read before they are cast: they have to stay in a core's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A file to read from, and the state in which its manifest was read."""

    path: Path
    stat: FileStat


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
    :param threads: that read at once; default: as many as this process may use cores.

    :raises CorruptModelCheckpointError: a file ends early, or is not the one that the plan was made for.
    :raises OSError: a file cannot be read.
    """
    arena = create_arena(plan.arena_bytes, device)

    with ExitStack() as stack:
        used = sorted({*plan.shards, *(home for home in plan.homes if home != ARENA)})
        open_files = {shard: stack.enter_context(_open(files[shard])) for shard in used}

        _read(plan, files, open_files, arena, threads or _cores(), progress)
        mappings = {
            shard: map_file(open_files[shard], files[shard].stat.size)
            for shard in sorted({home for home in plan.homes if home != ARENA})
        }

        for shard, fd in open_files.items():
            _check_unchanged(files[shard], os.fstat(fd))

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


@contextmanager
def _open(file: ShardFile) -> Iterator[int]:
    # A FIFO that took the file's place must not make the load wait for a writer.
    fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_unchanged(file, os.fstat(fd))
        yield fd
    finally:
        os.close(fd)


def _check_unchanged(file: ShardFile, stat: os.stat_result) -> None:
    found = FileStat.from_stat(stat)
    if found != file.stat:
        raise CorruptModelCheckpointError(
            file.path,
            f"{file.path} changed while it was loaded: expected {file.stat.size} bytes, modified at "
            f"{file.stat.mtime_ns} ns, found {found.size} bytes, modified at {found.mtime_ns} ns. Load it again when "
            "nothing writes to it any more.",
        )


def _read(
    plan: Plan, files: Sequence[ShardFile], open_files: Mapping[int, int], arena: Arena, threads: int, progress: bool
) -> None:
    """Run the reads on ``threads`` threads; the first error, or an interrupt, stops all of them."""
    steps = _steps(plan)
    lock = threading.Lock()
    stop = threading.Event()
    errors: list[BaseException] = []
    done = [0] * threads

    def work(me: int) -> None:
        # An intra-op thread pool within each reader would only fight with the other readers for the cores.
        torch.set_num_threads(1)
        reader = _Reader(plan, files, open_files, arena)
        try:
            while not stop.is_set():
                with lock:
                    step = next(steps, None)
                if step is None:
                    break
                reader.run(*step)
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
        for start in range(0, size, STEP):
            place = target + start // source_size * target_size
            yield shard, offset + start, min(STEP, size - start), place, cast


def _item_sizes(conversion: tuple[str, str]) -> tuple[int, int]:
    source, target = conversion

    return BITS[source] // 8 if source else 1, BITS[target] // 8 if target else 1


class _Reader:
    """What one thread needs to read."""

    def __init__(self, plan: Plan, files: Sequence[ShardFile], open_files: Mapping[int, int], arena: Arena) -> None:
        self._plan = plan
        self._files = files
        self._open_files = open_files
        self._arena = arena
        self._stage: Stage | None = None

    def run(self, shard: int, offset: int, size: int, place: int, cast: int) -> None:
        memory = self._arena.direct(place, size) if cast == 0 else None
        if memory is not None:
            self._fill(shard, offset, memory)
            return

        on_device = self._arena.direct(0, 0) is None
        chunk = STEP if on_device else CAST_CHUNK
        if self._stage is None:
            self._stage = self._arena.stage(chunk)

        source, target = self._plan.conversions[cast]
        source_size, target_size = _item_sizes((source, target))
        for start in range(0, size, chunk):
            part = min(chunk, size - start)
            self._fill(shard, offset + start, self._stage.take()[:part])
            self._stage.put(part, place + start // source_size * target_size, source, target)

    def finish(self) -> None:
        if self._stage is not None:
            self._stage.finish()

    def _fill(self, shard: int, offset: int, memory: memoryview) -> None:
        at, end = 0, len(memory)
        while at < end:
            count = os.preadv(self._open_files[shard], [memory[at:]], offset + at)
            if count == 0:
                path = self._files[shard].path
                raise CorruptModelCheckpointError(
                    path,
                    f"{path} ends early: expected {end - at} more bytes at offset {offset + at}, found the end of the "
                    "file. It was cut while it was loaded; fetch it again.",
                )
            at += count
