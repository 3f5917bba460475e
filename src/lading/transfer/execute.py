"""The execution of a plan: threads read the files of a checkpoint into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from lading.formats.manifest import BITS
from lading.planning.plan import ARENA, Plan
from lading.transfer.arena import Arena
from lading.transfer.drive import busy, cores, drive, read
from lading.transfer.files import File
from lading.transfer.mappings import NOTHING_AHEAD, Ahead, Range, make_present
from lading.transfer.memory import create_arena, view
from lading.transfer.reader import STEP, Observer, Reading


def execute(
    plan: Plan,
    files: Sequence[File],
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
        shards = {i: stack.enter_context(files[i].open()) for i in sorted({*plan.shards, *plan.rows.shards, *mapped})}

        with single_threads() as begin:
            read(Reading(plan, shards, arena, observer), threads, "load" if progress else None, begin)
        # The same files: they are open in the state in which they were mapped.
        mappings = {i: ahead.mappings.get(i) or shards[i].map() for i in mapped}
        make_present(mappings, _mapped_ranges(plan, wanted), ahead)
        if observer is not None and observer.mapped_bytes:
            look = partial(observer.bytes_mapped, {i: memoryview(mapping) for i, mapping in mappings.items()})
            steps, label = observer.mapped_steps(STEP), "verify" if progress else None
            total = observer.mapped_bytes
            drive(steps, partial(map, look), busy(threads or cores(), total), total, label)

    return [
        arena.tensor(place, shape, dtype) if home == ARENA else view(mappings[home], place, shape, dtype)
        for home, place, (shape, dtype) in zip(plan.homes, plan.places, wanted, strict=True)
    ]


@contextmanager
def single_threads() -> Iterator[Callable[[], None]]:
    """Yield a function that keeps torch's operations on the thread that calls it; undo that afterwards.

    An intra-op thread pool within each reader would only compete with the other readers for the cores.
    """
    before = torch.get_num_threads()
    try:
        yield partial(torch.set_num_threads, 1)
    finally:
        torch.set_num_threads(before)


def _mapped_ranges(plan: Plan, wanted: Sequence[tuple[tuple[int, ...], str]]) -> Iterator[Range]:
    for home, place, (shape, dtype) in zip(plan.homes, plan.places, wanted, strict=True):
        if home != ARENA:
            yield home, place, place + math.prod(shape) * BITS[dtype] // 8
