"""The threads that do the steps of a plan, or of another run over the bytes of files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Protocol, TypeVar

from lading.system.progress import byte_bar
from lading.system.threads import Worker
from lading.transfer.arena import RING_DEPTH
from lading.transfer.reader import STEP, Reading
from lading.transfer.requests import Request, RequestReader, requests_of
from lading.transfer.stream import StreamedShard

PINNED_BYTES = 512 << 20
"""The most host memory, in bytes, that copies to a device pin at once."""

COLD_THREADS = 4
"""The number of threads that keep a disk busy; for memory, one for each core is the fastest."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


def busy(threads: int, total: int) -> int:
    """Return the number of threads, at most ``threads``, that steps of ``total`` bytes keep busy."""
    return min(threads, max(1, total // STEP))


def read(reading: Reading, threads: int | None, label: str | None, begin: Callable[[], None] | None = None) -> None:
    """Do the reads of a plan on several threads.

    :param threads: their number; default: the cores of this process, and some more for a disk.
    :param label: as :func:`drive` takes it, like ``begin``.
    """
    plan = reading.plan
    if not plan.sizes and not plan.rows.counts:
        return
    remote = {i: shard for i, shard in reading.shards.items() if isinstance(shard, StreamedShard)}
    if remote:
        _request(reading, remote, label, begin)
        return

    total = plan.read_bytes
    drive(reading.steps(), reading.run, busy(threads or _threads(reading), total), total, label, begin)


def _request(
    reading: Reading, files: Mapping[int, StreamedShard], label: str | None, begin: Callable[[], None] | None
) -> None:
    """Do the reads of a plan whose files are all at one source."""
    stream = next(iter(files.values())).stream
    requests = requests_of(reading, files, [i for i, shard in files.items() if shard.file.name in stream.digests])
    total = sum(request.end - request.begin for request in requests)

    def run(steps: Iterator[Request]) -> Iterator[int]:
        reader = RequestReader(reading, stream)
        yield from map(reader.run, steps)
        reader.finish()

    label = None if label is None else "stream"
    drive(iter(requests), run, min(stream.connections, len(requests)), total, label, begin, stream)


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


class Watch(Protocol):
    """The watch over threads that may wait for long."""

    def check(self) -> None:
        """Raise if they have to stop. Called about ten times a second."""

    def stop(self) -> None:
        """End what they wait for. Called until they have ended."""


def drive(
    steps: Iterator[_Step],
    run: Callable[[Iterator[_Step]], Iterator[int]],
    threads: int,
    total: int,
    label: str | None,
    begin: Callable[[], None] | None = None,
    watch: Watch | None = None,
) -> None:
    """Do the steps on ``threads`` threads; the first error, or an interrupt, stops all of them.

    :param run: does steps on one thread, and yields the number of bytes of each.
    :param total: the bytes of all steps.
    :param label: the label of the progress bar; ``None`` shows no bar.
    :param begin: a function that each thread calls first.
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
        try:
            if begin is not None:
                begin()
            for count in run(take()):
                done[me] += count
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)
            stop.set()

    started: list[Worker] = []
    readers = [Worker(partial(work, i), f"lading-reader-{i}") for i in range(threads)]
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
                    if watch is not None and stop.is_set():
                        watch.stop()
                    elif watch is not None:
                        watch.check()
    finally:
        # Also after an interrupted wait: no thread may write to the arena when this function has returned.
        stop.set()
        while watch is not None and not all(reader.ended for reader in started):
            watch.stop()
            started[-1].wait(0.1)
        for reader in started:
            reader.wait_if_started()

    if errors:
        raise errors[0]
