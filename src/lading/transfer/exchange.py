"""Reads that the ranks of a host share: in each round, every rank reads a step and they exchange its bytes."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from typing import Self, TypeVar

import torch
from torch import Tensor

from lading.gangs import Gang
from lading.planning.plan import Plan
from lading.system.progress import byte_bar
from lading.transfer.arena import RING_DEPTH, Arena, NoArena, PassingStage, Stage
from lading.transfer.cooperative import Piece, Schedule
from lading.transfer.files import File, Shard
from lading.transfer.reader import Reader, Reading, item_sizes
from lading.transfer.stream import Stream, StreamedShard

T = TypeVar("T")


def execute_cooperatively(
    plan: Plan,
    schedule: Schedule,
    files: Sequence[File],
    wanted: Sequence[tuple[tuple[int, ...], str]],
    *,
    host: Gang,
    arena: Arena,
    progress: bool = False,
) -> list[Tensor]:
    """Execute a plan as :func:`~lading.transfer.execute.execute` does, but read only this rank's part of the schedule.

    All ranks of the host call it with their own plans, and otherwise equal arguments.

    :param plan: the plan of this rank, which maps nothing.
    :param schedule: the schedule of the plans of all ranks.
    :param host: the ranks that read together, with a process group on the CPU.
    :param arena: memory of ``plan.arena_bytes``.

    :raises CorruptModelCheckpointError: a file ends early, or is not the one that the plan was made for.
    :raises OSError: a file cannot be read.
    :raises GangError: another rank failed.
    """
    joint = schedule.joint
    with ExitStack() as stack:
        numbers = sorted({joint.plan.shards[step.read] for step in schedule.steps(host.rank)})
        shards = {i: stack.enter_context(files[i].open()) for i in numbers}
        stream = next((shard.stream for shard in shards.values() if isinstance(shard, StreamedShard)), None)
        sender = _Sender(schedule, host, shards, 1 if stream is None else stream.connections)
        receiver = _Receiver(plan, schedule, host, arena)

        total, label = schedule.bytes_of(host.rank), "load" if stream is None else "stream"
        bar = stack.enter_context(byte_bar(total, label) if progress else nullcontext())
        # This packs the next step while the current one is on its way.
        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="lading-sender"))
        stack.enter_context(sender)
        if stream is not None:
            stack.enter_context(stream.stopped_on_error())
        ahead = pool.submit(sender.prepare, 0)
        for number in range(schedule.rounds):
            buffer, sizes = ahead.result() if stream is None else _result(ahead, stream)
            if number + 1 < schedule.rounds:
                ahead = pool.submit(sender.prepare, number + 1)
            receiver.receive(number, buffer, sizes)
            step = schedule.step(host.rank, number)
            if bar is not None and step is not None:
                bar.update(step.size)
        receiver.finish()

    if joint.hasher is not None:
        joint.hasher.pool(lambda numbers: _add_up(host, numbers))

    return [arena.tensor(place, shape, dtype) for place, (shape, dtype) in zip(plan.places, wanted, strict=True)]


def _result(future: Future[T], stream: Stream) -> T:
    """Return the result of a thread, as soon as it has one.

    :raises GangError: another rank failed before.
    """
    while not future.done():
        stream.check()
        wait((future,), timeout=0.1)

    return future.result()


def _add_up(host: Gang, numbers: bytearray | array[int]) -> None:
    if len(numbers):
        dtype = torch.uint8 if isinstance(numbers, bytearray) else torch.int64
        host.all_reduce(torch.frombuffer(numbers, dtype=dtype), "sum")


class _Window(NoArena):
    """Memory through which bytes pass, whose only stage keeps those read last."""

    def stage(self, chunk: int, depth: int = RING_DEPTH) -> Stage:
        self.last = PassingStage(chunk)

        return self.last


class _Sender:
    """The reader of this rank's steps, which packs the bytes that each rank wants.

    :param ahead: the number of steps to read at once, on a thread each.
    """

    def __init__(self, schedule: Schedule, host: Gang, shards: Mapping[int, Shard], ahead: int) -> None:
        self._schedule = schedule
        self._host = host
        self._windows = [_Window() for _ in range(ahead)]
        joint = schedule.joint
        self._readers = [
            Reader(Reading(joint.plan, shards, window, joint.hasher), schedule.longest) for window in self._windows
        ]
        self._pool = ThreadPoolExecutor(ahead, thread_name_prefix="lading-reader")
        self._reads: deque[Future[object]] = deque()
        """The reads of the next steps, each into the window of its number."""
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        """Two buffers: one is filled while the other is on its way."""

    def __enter__(self) -> Self:
        for number in range(len(self._readers)):
            self._read(number)

        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read(self, number: int) -> None:
        """Begin to read a step, unless it is past the last one."""
        step = self._schedule.step(self._host.rank, number)
        if step is not None:
            self._reads.append(self._pool.submit(self._readers[number % len(self._readers)].run, step))

    def prepare(self, number: int) -> tuple[Tensor, list[int]]:
        """Return the bytes that this rank sends in a round, rank by rank, and the number of bytes for each."""
        joint, step = self._schedule.joint, self._schedule.step(self._host.rank, number)
        if step is None:
            return torch.empty(0, dtype=torch.uint8), [0] * self._host.size

        self._reads.popleft().result()
        messages = [joint.message(rank, step) for rank in range(self._host.size)]
        sizes = [message.size for message in messages]
        buffer = self._buffers[number % 2]
        if buffer.numel() < sum(sizes):
            buffer = self._buffers[number % 2] = torch.empty(sum(sizes), dtype=torch.uint8)

        window = self._windows[number % len(self._windows)]
        read, at = torch.frombuffer(window.last.read, dtype=torch.uint8), 0
        for rank, message in enumerate(messages):
            joint.pack(rank, message, read, step.offset, buffer[at : at + message.size])
            at += message.size
        self._read(number + len(self._readers))

        return buffer[:at], sizes


class _Receiver:
    """The sender and receiver of messages, which puts received bytes in their places."""

    def __init__(self, plan: Plan, schedule: Schedule, host: Gang, arena: Arena) -> None:
        self._plan = plan
        self._schedule = schedule
        self._host = host
        self._arena = arena
        self._stage: Stage | None = None
        self._stage_size = 0

    def receive(self, number: int, sent: Tensor, sizes: list[int]) -> None:
        """Send the bytes that this rank read in a round, and receive those that it wants from the others."""
        steps = (self._schedule.step(rank, number) for rank in range(self._host.size))
        messages = [self._schedule.joint.message(self._host.rank, step) for step in steps]
        expected = [message.size for message in messages]
        stage = self._stage_of(sum(expected))
        memory = stage.take()[: sum(expected)]
        received = torch.frombuffer(memory, dtype=torch.uint8) if len(memory) else sent[:0]
        self._host.all_to_all(received, expected, sent, sizes)

        at = 0
        for message in messages:
            for piece, place in zip(message.pieces, message.places, strict=True):
                self._put(stage, memory, at + place, piece)
            at += message.size

    def finish(self) -> None:
        """Wait until all bytes are in their places."""
        if self._stage is not None:
            self._stage.finish()

    def _stage_of(self, size: int) -> Stage:
        """Return the buffer in which messages arrive."""
        if self._stage is None or self._stage_size < size:
            self.finish()
            self._stage_size = max(size, 2 * self._stage_size, 1)
            self._stage = self._arena.stage(self._stage_size)

        return self._stage

    def _put(self, stage: Stage, memory: memoryview, at: int, piece: Piece) -> None:
        plan, rows = self._plan, self._plan.rows
        row = piece.entry - len(plan.sizes)
        target, cast = (
            (plan.targets[piece.entry], plan.casts[piece.entry]) if row < 0 else (rows.targets[row], rows.casts[row])
        )
        source_size, target_size = item_sizes(plan.conversions[cast])
        place, size = target + piece.first // source_size * target_size, piece.last - piece.first

        direct = self._arena.direct(place, size) if cast == 0 else None
        if direct is not None:
            direct[:] = memory[at : at + size]
        else:
            stage.put(at, size, place, *plan.conversions[cast])
