"""The execution of a plan: threads read the files of a checkpoint into memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lading.formats.digests import Digests, default_dims
from lading.formats.manifest import BITS, Manifest
from lading.planning.plan import ARENA, Plan, plan_full_read
from lading.system.progress import byte_bar
from lading.system.threads import Worker
from lading.transfer.files import ShardFile, open_shard
from lading.transfer.hashing import Hasher
from lading.transfer.mappings import NOTHING_AHEAD, Ahead, Range, cores, make_present
from lading.transfer.memory import RING_DEPTH, Arena, NoArena, create_arena, map_file, view
from lading.transfer.reader import STEP, Observer, Reading

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
    observer: Observer | None = None,
    ahead: Ahead = NOTHING_AHEAD,
) -> list[Tensor]:
    """Execute ``plan`` and return the wanted tensors, in their order.

    :param files: one for each shard of the manifest.
    :param wanted: the shape and the dtype of each tensor in memory.
    :param arena: memory of ``plan.arena_bytes`` for tensors that are not mapped; default: on the CPU.
    :param threads: the number of threads that read; default: the cores of this process, and some more for a disk.
    :param observer: that of the same plan; sees the bytes on the way.
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

        _read(Reading(plan, shards, arena, observer), threads, "load" if progress else None)
        # The same files: they are open in the state in which they were mapped.
        mappings = {i: ahead.mappings.get(i) or map_file(shards[i].fd, files[i].stat.size) for i in mapped}
        make_present(mappings, _mapped_ranges(plan, wanted), ahead)
        if observer is not None and observer.mapped_bytes:
            look = partial(observer.bytes_mapped, {i: memoryview(mapping) for i, mapping in mappings.items()})
            steps, label = observer.mapped_steps(STEP), "verify" if progress else None
            drive(steps, partial(map, look), threads or cores(), observer.mapped_bytes, label)

    return [
        arena.tensor(place, shape, dtype) if home == ARENA else view(mappings[home], place, shape, dtype)
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

    with ExitStack() as stack:
        shards = {i: stack.enter_context(open_shard(file)) for i, file in enumerate(files)}
        _read(Reading(plan, shards, NoArena(), hasher), threads, "verify" if progress else None)

    return hasher.digests()


def _mapped_ranges(plan: Plan, wanted: Sequence[tuple[tuple[int, ...], str]]) -> Iterator[Range]:
    for home, place, (shape, dtype) in zip(plan.homes, plan.places, wanted, strict=True):
        if home != ARENA:
            yield home, place, place + math.prod(shape) * BITS[dtype] // 8


def _read(reading: Reading, threads: int | None, label: str | None) -> None:
    plan = reading.plan
    if plan.sizes or plan.rows.counts:
        drive(reading.steps(), reading.run, threads or _threads(reading), plan.read_bytes, label)


def _threads(reading: Reading) -> int:
    plan = reading.plan
    most = PINNED_BYTES // (RING_DEPTH * STEP) if not reading.arena.on_host else cores() + COLD_THREADS
    reads = zip((*plan.shards, *plan.rows.shards), (*plan.offsets, *plan.rows.offsets), strict=True)
    cold = any(reading.shards[i].is_cold(offset) for i, offset in reads)

    if not cold:
        return min(most, cores())

    # While some threads hash, which keeps a core busy each, as many others have to keep the disk busy.
    return min(most, max(cores(), COLD_THREADS + (0 if reading.observer is None else cores())))


_Step = TypeVar("_Step")


def drive(
    steps: Iterator[_Step],
    run: Callable[[Iterator[_Step]], Iterator[int]],
    threads: int,
    total: int,
    label: str | None,
) -> None:
    """Do the steps on ``threads`` threads; the first error, or an interrupt, stops all of them.

    :param run: does steps on one thread, and yields the number of bytes of each.
    :param total: the bytes of all steps.
    :param label: the label of the progress bar; ``None`` shows no bar.
    """
    lock = threading.Lock()
    stop = threading.Event()
    errors: list[BaseException] = []
    done = [0] * threads

    def take() -> Iterator[_Step]:
        while not stop.is_set():
            with lock:
                step = next(steps, None)
            if step is None:
                return
            yield step

    def work(me: int) -> None:
        # An intra-op thread pool within each reader would only compete with the other readers for the cores.
        torch.set_num_threads(1)
        try:
            for count in run(take()):
                done[me] += count
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
