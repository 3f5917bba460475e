"""The execution of a plan: threads read the files of a checkpoint into memory."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lading.formats.digests import Digests, default_dims
from lading.formats.manifest import BITS, Manifest
from lading.planning.plan import ARENA, Plan, plan_full_read
from lading.system.progress import byte_bar
from lading.system.threads import Worker
from lading.transfer.files import OpenShard, ShardFile, open_shard
from lading.transfer.hashing import Hasher
from lading.transfer.leaves import Part
from lading.transfer.mappings import NOTHING_AHEAD, Ahead, Range, cores, make_present
from lading.transfer.memory import RING_DEPTH, Arena, NoArena, create_arena, map_file, view
from lading.transfer.reader import STEP, Reader, steps_of

PINNED_BYTES = 512 << 20
"""The most host memory, in bytes, that copies to a device pin at once."""

COLD_THREADS = 4
"""The number of threads that keep a disk busy; for memory, one for each core is the fastest."""


def execute(
    plan: Plan,
    files: Sequence[ShardFile],
    wanted: Sequence[tuple[tuple[int, ...], str]],
    *,
    arena: Arena | None = None,
    threads: int | None = None,
    progress: bool = False,
    hasher: Hasher | None = None,
    ahead: Ahead = NOTHING_AHEAD,
) -> list[Tensor]:
    """Execute ``plan`` and return the wanted tensors, in their order.

    :param files: one for each shard of the manifest.
    :param wanted: the shape and the dtype of each tensor in memory.
    :param arena: memory of ``plan.arena_bytes`` for tensors that are not mapped; default: on the CPU.
    :param threads: the number of threads that read; default: the cores of this process, and some more for a disk.
    :param hasher: that of the same plan; collects digests of the bytes on the way. The caller compares them.
    :param ahead: mappings of the same files.

    :raises CorruptModelCheckpointError: a file ends early, or is not the one that the plan was made for.
    :raises OSError: a file cannot be read.
    """
    if arena is None:
        arena = create_arena(plan.arena_bytes, torch.device("cpu"))

    with ExitStack() as stack:
        mapped = sorted({home for home in plan.homes if home != ARENA})
        shards = {
            i: stack.enter_context(open_shard(files[i])) for i in sorted({*plan.shards, *plan.rows.shards, *mapped})
        }

        if plan.sizes or plan.rows.counts:
            count = threads or _threads(plan, shards, arena, hasher)
            _read(plan, shards, arena, count, hasher, "load" if progress else None)
        # The same files: they are open in the state in which they were mapped.
        mappings = {i: ahead.mappings.get(i) or map_file(shards[i].fd, files[i].stat.size) for i in mapped}
        make_present(mappings, _mapped_ranges(plan, wanted), ahead)
        if hasher is not None and hasher.mapped_bytes:
            _hash(hasher, mappings, threads or cores(), "verify" if progress else None)

    return [
        _tensor(arena, mappings, home, place, shape, dtype)
        for home, place, (shape, dtype) in zip(plan.homes, plan.places, wanted, strict=True)
    ]


def hash_checkpoint(
    manifest: Manifest,
    files: Sequence[ShardFile],
    dims: Sequence[int] | None = None,
    *,
    threads: int | None = None,
    progress: bool = False,
) -> Digests:
    """Return the digests of all tensors of a checkpoint, reading each byte once, with a few MiB of memory per thread.

    :param files: one for each shard of the manifest.
    :param dims: for each tensor the dim along which to cut it into blocks; default: 0.
    :param threads: the number of threads that read and hash; default: as :func:`execute`.

    :raises CorruptModelCheckpointError: a file ends early, or is not the one whose manifest this is.
    :raises OSError: a file cannot be read.
    :raises ValueError: a tensor has no such dim.
    """
    plan, wanted = plan_full_read(manifest)
    hasher = Hasher(manifest, default_dims(manifest) if dims is None else dims, plan, wanted)
    arena = NoArena()

    with ExitStack() as stack:
        shards = {i: stack.enter_context(open_shard(file)) for i, file in enumerate(files)}
        if plan.sizes:
            count = threads or _threads(plan, shards, arena, hasher)
            _read(plan, shards, arena, count, hasher, "verify" if progress else None)

    return hasher.digests()


def _mapped_ranges(plan: Plan, wanted: Sequence[tuple[tuple[int, ...], str]]) -> Iterator[Range]:
    for home, place, (shape, dtype) in zip(plan.homes, plan.places, wanted, strict=True):
        if home != ARENA:
            yield home, place, place + math.prod(shape) * BITS[dtype] // 8


def _tensor(
    arena: Arena, mappings: Mapping[int, mmap.mmap], home: int, place: int, shape: tuple[int, ...], dtype: str
) -> Tensor:
    return arena.tensor(place, shape, dtype) if home == ARENA else view(mappings[home], place, shape, dtype)


def _threads(plan: Plan, shards: Mapping[int, OpenShard], arena: Arena, hasher: Hasher | None) -> int:
    most = PINNED_BYTES // (RING_DEPTH * STEP) if not arena.on_host else cores() + COLD_THREADS
    reads = zip((*plan.shards, *plan.rows.shards), (*plan.offsets, *plan.rows.offsets), strict=True)
    cold = any(shards[i].is_cold(offset) for i, offset in reads)

    if not cold:
        return min(most, cores())

    # While some threads hash, which keeps a core busy each, as many others have to keep the disk busy.
    return min(most, max(cores(), COLD_THREADS + (0 if hasher is None else cores())))


_StepT = TypeVar("_StepT", contravariant=True)


class _Worker(Protocol[_StepT]):
    """The worker of one thread, which does its steps."""

    def run(self, step: _StepT) -> int:
        """Do a step and return its number of bytes."""

    def finish(self) -> None:
        """Wait until all is done."""


def _drive(
    steps: Iterator[_StepT], worker: Callable[[], _Worker[_StepT]], threads: int, total: int, label: str | None
) -> None:
    """Do the steps on ``threads`` threads; the first error, or an interrupt, stops all of them.

    :param total: the bytes of all steps.
    :param label: the label of the progress bar; ``None`` shows no bar.
    """
    lock = threading.Lock()
    stop = threading.Event()
    errors: list[BaseException] = []
    done = [0] * threads

    def work(me: int) -> None:
        # An intra-op thread pool within each reader would only compete with the other readers for the cores.
        torch.set_num_threads(1)
        try:
            mine = worker()
            while not stop.is_set():
                with lock:
                    step = next(steps, None)
                if step is None:
                    break
                done[me] += mine.run(step)
            mine.finish()
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)
            stop.set()

    torch_threads = torch.get_num_threads()
    started: list[Worker] = []
    readers = [Worker(partial(work, i), f"lading-reader-{i}") for i in range(min(threads, max(1, total // STEP)))]
    try:
        for reader in readers:
            started.append(reader)
            reader.start()
        with ExitStack() as stack:
            # Even a hidden bar would start a thread that outlives it.
            bar = None if label is None else stack.enter_context(byte_bar(total, label))
            for reader in readers:
                ended = False
                while not ended:
                    ended = reader.wait(0.1)
                    if bar is not None:
                        bar.update(sum(done) - bar.n)
    finally:
        # Also after an interrupted wait: no thread may write to the arena when this function has returned.
        stop.set()
        for reader in started:
            reader.wait_if_started()
        torch.set_num_threads(torch_threads)

    if errors:
        raise errors[0]


def _read(
    plan: Plan,
    shards: Mapping[int, OpenShard],
    arena: Arena,
    threads: int,
    hasher: Hasher | None,
    label: str | None,
) -> None:
    """Run the reads, and hash their bytes."""
    _drive(steps_of(plan, hasher), lambda: Reader(plan, shards, arena, hasher), threads, plan.read_bytes, label)


def _hash(hasher: Hasher, mappings: Mapping[int, mmap.mmap], threads: int, label: str | None) -> None:
    """Hash the mapped bytes."""
    steps = hasher.mapped_steps(STEP)
    _drive(steps, lambda: _MappingHasher(hasher, mappings), threads, hasher.mapped_bytes, label)


class _MappingHasher:
    """The worker of one thread that hashes mapped bytes."""

    def __init__(self, hasher: Hasher, mappings: Mapping[int, mmap.mmap]) -> None:
        self._leaves = hasher.thread()
        self._mappings = {home: memoryview(mapping) for home, mapping in mappings.items()}

    def run(self, step: Sequence[Part]) -> int:
        for part in step:
            self._leaves.part(part, self._mappings[part.source][part.begin : part.end])

        return sum(part.end - part.begin for part in step)

    def finish(self) -> None:
        pass
