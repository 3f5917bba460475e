"""Digests of what a load reads, taken while the bytes are in the cache of the core that read them.

Which blocks (:mod:`lading.digests`) lie in which read is settled before, so that the threads that read share nothing
but an array of slots, one for each leaf, of which each is written once. Reads are taken in pieces that end where an
*atom* does: the shortest run of bytes of a file that is hashed on its own. That is a group of rows, with a leaf for
each block, or, where one row is larger than a leaf, a leaf.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from lading.box import Box
from lading.digests import (
    EMPTY_BLOCK,
    LEAF,
    SIZE,
    Cut,
    Digests,
    block_digest,
    blocks_touched,
    blocks_within,
    cut,
    leaf_digest,
    starts_of,
)
from lading.errors import CorruptModelCheckpointError, InternalError
from lading.manifest import BITS, Manifest
from lading.transfer.plan import ARENA, Plan, Wanted


class Job(NamedTuple):
    """Consecutive blocks of a tensor that lie in memory, or in a file, as one run of bytes."""

    tensor: int
    """Position in the manifest."""
    first: int
    """The first of the blocks."""
    begin: int
    """Where the run begins."""
    rows: int
    blocks: int
    segment: int
    """The run is ``rows × blocks × segment`` bytes."""
    group: int
    """Rows of an atom; 0 where rows are larger than a leaf, so that atoms are pieces of segments."""
    leaves: int
    """Leaves of each block."""
    slot: int
    """The slot of the first leaf; those of a block follow one another."""

    @property
    def end(self) -> int:
        """Where the run ends."""
        return self.begin + self.rows * self.blocks * self.segment

    def atom(self, at: int) -> tuple[int, int]:
        """Begin and end of the atom that holds the byte at ``at``."""
        within = at - self.begin
        if self.group:
            size = self.group * self.blocks * self.segment
            begin = within - within % size
            return self.begin + begin, min(self.begin + begin + size, self.end)

        segment = within - within % self.segment
        begin = within - (within - segment) % LEAF
        return self.begin + begin, self.begin + min(begin + LEAF, segment + self.segment)


class _Jobs:
    """Jobs in columns, ordered by the read or the memory that they lie in, and by where they begin there."""

    def __init__(self) -> None:
        self.sources = array("q")
        """The read, or the home, that each lies in."""
        self.begins = array("q")
        self._tensors, self._first, self._blocks = array("q"), array("B"), array("B")
        self._rows, self._segments, self._groups = array("q"), array("q"), array("q")
        self._leaves, self._slots = array("q"), array("q")

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, j: int) -> Job:
        return Job(
            self._tensors[j], self._first[j], self.begins[j], self._rows[j], self._blocks[j], self._segments[j],
            self._groups[j], self._leaves[j], self._slots[j],
        )  # fmt: skip

    def __iter__(self) -> Iterator[Job]:
        return map(self.__getitem__, range(len(self)))

    def add(self, source: int, begin: int, tensor: int, blocks: range, whole: Cut, slot: int) -> int:
        """Add the blocks ``blocks`` of a tensor that is cut as ``whole``; returns the number of their leaves."""
        leaves = whole.leaves
        self.sources.append(source)
        self.begins.append(begin)
        self._tensors.append(tensor)
        self._first.append(blocks.start)
        self._blocks.append(len(blocks))
        self._rows.append(whole.rows)
        self._segments.append(whole.segment)
        self._groups.append(whole.group if whole.blocks * whole.segment <= LEAF else 0)
        self._leaves.append(leaves)
        self._slots.append(slot)

        return len(blocks) * leaves


class Hasher:
    """Collects the digests of the blocks that one run of ``execute`` reads or maps whole.

    Blocks of which only a part is read have none, and so do, for now, blocks of several runs of bytes each (of a shard
    along another dim than the first) that are cast or go to a device: they never lie side by side in the host's memory.

    :param dims: for each tensor of the manifest the dim along which it is cut into blocks.
    :param wanted: what ``plan`` was made for.
    :param on_host: whether what is read can be looked at afterwards.

    :raises ValueError: a tensor has no such dim.
    """

    def __init__(
        self, manifest: Manifest, dims: Sequence[int], plan: Plan, wanted: Wanted, *, on_host: bool = True
    ) -> None:
        self._manifest = manifest
        self._dims = array("b", dims)
        self._plan = plan
        self.vouched = bytearray(len(wanted.tensors))
        """For each wanted tensor 1 if all of its bytes are in blocks that are hashed, as read for it; else 0."""
        self._empty: list[int] = []
        self._reads, self._memory = _Jobs(), _Jobs()
        self._slots_used = 0
        self._threads: list[LeafHasher] = []

        self._find_jobs(wanted, on_host)
        self.slots = bytearray(self._slots_used * SIZE)
        """The digests of all leaves."""

    # --- what is to be hashed ----------------------------------------------------------------------------------------

    def _find_jobs(self, wanted: Wanted, on_host: bool) -> None:
        manifest, plan = self._manifest, self._plan
        pending: _Run | None = None

        # In the order in which a plan lays tensors out.
        for i in sorted(range(len(wanted.tensors)), key=wanted.tensors.__getitem__):
            if i in wanted.composed:
                continue  # its memory holds no tensor's bytes as they are in the file
            tensor, box = wanted.tensors[i], wanted.boxes[i]
            if box.numel == 0:
                self.vouched[i] = 1
                if box.covers(manifest.shapes[tensor]):
                    self._empty.append(tensor)
                continue

            run = self._run(i, tensor, box)
            if run is None:
                if on_host and plan.homes[i] == ARENA and manifest.dtypes[tensor] == wanted.dtypes[i]:
                    self._add_strided(i, tensor, box)
            elif pending is not None and pending.is_continued_by(run):
                pending.end = run.end
                pending.boxes += run.boxes
            else:
                self._add(pending)
                pending = run

        self._add(pending)

    def _run(self, i: int, tensor: int, box: Box) -> _Run | None:
        """Where the bytes of a wanted tensor are in a file, if they are one run of bytes of one read or mapping."""
        plan, shape, dtype = self._plan, self._manifest.shapes[tensor], self._manifest.dtypes[tensor]
        first, count = (0, box.numel) if box.covers(shape) else next(box.runs(shape))
        if count != box.numel:
            return None

        bits = BITS[dtype]
        begin = self._manifest.offsets[tensor] + first * bits // 8
        run = _Run(plan.homes[i], -1, tensor, begin, begin + count * bits // 8, [(i, box)])
        if run.home != ARENA:
            return run

        # No two reads go to the same place, so that the place tells the read, also of bytes that are read twice.
        run.read = bisect_right(plan.targets, plan.places[i]) - 1
        if run.read < 0 or not (
            plan.shards[run.read] == self._manifest.shard_ids[tensor]
            and plan.offsets[run.read] <= run.begin
            and run.end <= plan.offsets[run.read] + plan.sizes[run.read]
        ):
            raise InternalError(f"no read of the plan fills the place of tensor {self._manifest.names[tensor]!r}")

        return run

    def _add(self, run: _Run | None) -> None:
        """Hash the blocks that lie in ``run``."""
        if run is None:
            return

        tensor, dim = run.tensor, self._dims[run.tensor]
        dtype, shape = self._manifest.dtypes[tensor], self._manifest.shapes[tensor]
        base = self._manifest.offsets[tensor]
        whole = cut(dtype, shape, dim)
        begin, end = run.begin - base, run.end - base
        if whole.rows == 1:
            blocks = range(-(-begin // whole.segment), end // whole.segment)
        else:
            blocks = range(whole.blocks if end - begin == whole.nbytes else 0)

        if blocks:
            jobs, source = (self._reads, run.read) if run.home == ARENA else (self._memory, run.home)
            at = base + blocks.start * whole.segment
            self._slots_used += jobs.add(source, at, tensor, blocks, whole, self._slots_used)
        for i, box in run.boxes:
            self.vouched[i] = _within(blocks_touched(dtype, shape, dim, box), blocks)

    def _add_strided(self, i: int, tensor: int, box: Box) -> None:
        """Hash the blocks of a box of whole blocks where it lies in the arena, after it is read."""
        dim, dtype, shape = self._dims[tensor], self._manifest.dtypes[tensor], self._manifest.shapes[tensor]
        blocks = blocks_within(dtype, shape, dim, box)
        if blocks and blocks == blocks_touched(dtype, shape, dim, box):
            whole = cut(dtype, shape, dim)
            self._slots_used += self._memory.add(ARENA, self._plan.places[i], tensor, blocks, whole, self._slots_used)
            self.vouched[i] = 1

    # --- while it is read --------------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """The bytes that are hashed in memory, behind the reads."""
        return sum(job.end - job.begin for job in self._memory)

    def stop(self, read: int, at: int, limit: int, item: int) -> int:
        """Where a piece of a read has to end, so that it holds whole atoms and whole items.

        :param at: where it begins in the file; not inside an atom.
        :param limit: how far it may reach, unless the first atom reaches farther.
        """
        low, high = self._jobs_of(read)
        j = bisect_left(self._reads.begins, limit, low, high) - 1  # the last that begins before
        if j >= low:
            job = self._reads[j]
            if limit < job.end:
                begin, end = job.atom(limit)
                return begin if begin > at else end

        return limit - (limit - at) % item

    def jobs_within(self, read: int, begin: int, end: int) -> Iterator[tuple[Job, int, int]]:
        """(job, begin, end) of all that is to be hashed of a piece of a read, by offsets in the file."""
        low, high = self._jobs_of(read)
        for j in range(max(low, bisect_right(self._reads.begins, begin, low, high) - 1), high):
            job = self._reads[j]
            if job.begin >= end:
                break
            if job.end > begin:
                yield job, max(begin, job.begin), min(end, job.end)

    def memory_steps(self, most: int) -> Iterator[list[tuple[int, Job, int, int]]]:
        """What is to be hashed in memory, in steps of about ``most`` bytes: (home, job, begin, end) of each part."""
        step: list[tuple[int, Job, int, int]] = []
        size = 0
        for home, job in zip(self._memory.sources, self._memory, strict=True):
            at = job.begin
            while at < job.end:
                limit = at + most - size
                begin, end = job.atom(limit) if limit < job.end else (job.end, job.end)
                stop = begin if begin > at else end
                step.append((home, job, at, stop))
                size += stop - at
                at = stop
                if size >= most - LEAF:
                    yield step
                    step, size = [], 0

        if step:
            yield step

    def _jobs_of(self, read: int) -> tuple[int, int]:
        low = bisect_left(self._reads.sources, read)

        return low, bisect_right(self._reads.sources, read, low)

    def thread(self) -> LeafHasher:
        """What one thread hashes with."""
        self._threads.append(LeafHasher(self))

        return self._threads[-1]

    # --- afterwards --------------------------------------------------------------------------------------------------

    def digests(self) -> Digests:
        """The digests of all blocks that were hashed, when ``execute`` has returned.

        :raises CorruptModelCheckpointError: bytes that were read twice were not the same.
        """
        expected = self.memory_bytes + sum(job.end - job.begin for job in self._reads)
        hashed = sum(thread.hashed for thread in self._threads)
        if hashed != expected:
            raise InternalError(f"{expected} bytes should have been hashed, but {hashed} were")

        starts = starts_of(self._manifest, self._dims)
        blocks, known = bytearray(starts[-1] * SIZE), bytearray(len(self._dims))
        for tensor in self._empty:
            blocks[starts[tensor] * SIZE : starts[tensor + 1] * SIZE] = EMPTY_BLOCK
            known[tensor] = 1

        for job in (*self._reads, *self._memory):
            size = job.leaves * SIZE
            found: bytes | bytearray = self.slots[job.slot * SIZE : job.slot * SIZE + job.blocks * size]
            if job.leaves > 1:  # the only leaf of a block was followed by the block's own digest at once
                found = b"".join(block_digest(found[at : at + size]) for at in range(0, len(found), size))

            at = (starts[job.tensor] + job.first) * SIZE
            mask = (1 << job.blocks) - 1 << job.first
            if known[job.tensor] & mask:
                self._require_same(job, known[job.tensor] & mask, blocks[at : at + len(found)], found)
            blocks[at : at + len(found)] = found
            known[job.tensor] |= mask

        return Digests(dims=self._dims, starts=starts, blocks=bytes(blocks), known=bytes(known))

    def _require_same(self, job: Job, both: int, before: bytearray, found: bytes | bytearray) -> None:
        for b in range(job.blocks):
            one, other = (digests[b * SIZE : (b + 1) * SIZE] for digests in (before, found))
            if both >> job.first + b & 1 and one != other:
                shard = self._manifest.shards[self._manifest.shard_ids[job.tensor]].name
                raise CorruptModelCheckpointError(
                    shard,
                    f"{shard}: block {job.first + b} of tensor {self._manifest.names[job.tensor]!r} was read twice, "
                    "and is expected to be the same each time, but is not. Load it again when nothing writes to it any "
                    "more; if that does not help, check the disk.",
                )


class _Run:
    """Bytes of a tensor that lie side by side, in a read or in a mapping, and the wanted tensors that they are for."""

    def __init__(self, home: int, read: int, tensor: int, begin: int, end: int, boxes: list[tuple[int, Box]]) -> None:
        self.home, self.read, self.tensor, self.begin, self.end, self.boxes = home, read, tensor, begin, end, boxes

    def is_continued_by(self, other: _Run) -> bool:
        """Whether ``other`` holds the same tensor's next bytes, so that blocks may lie across both."""
        return (self.home, self.read, self.tensor, self.end) == (other.home, other.read, other.tensor, other.begin)


def _within(inner: range, outer: range) -> bool:
    return not inner or (outer.start <= inner.start and inner.stop <= outer.stop)


class LeafHasher:
    """What one thread needs to hash leaves."""

    def __init__(self, hasher: Hasher) -> None:
        self.hashed = 0
        """Bytes so far."""
        self._hasher = hasher
        self._slots = hasher.slots
        self._gathered = torch.empty(0, dtype=torch.uint8)
        self._view = memoryview(b"")

    def read(self, read: int, begin: int, memory: memoryview) -> None:
        """Hash a piece of a read: whole atoms, that begin at ``begin`` in the file."""
        for job, at, end in self._hasher.jobs_within(read, begin, begin + len(memory)):
            self.part(job, at, memory[at - begin : end - begin])

    def part(self, job: Job, begin: int, memory: memoryview) -> None:
        """Hash atoms of a job."""
        if job.group:
            self._groups(job, begin - job.begin, memory)
        else:
            self._pieces(job, begin - job.begin, memory)
        self.hashed += len(memory)

    def _groups(self, job: Job, begin: int, memory: memoryview) -> None:
        row = job.blocks * job.segment
        size = job.group * row
        for at in range(0, len(memory), size):
            atom = memory[at : at + size]
            each = len(atom) // row * job.segment
            if job.blocks > 1 and each > job.segment:
                atom = self._gather(atom, job)
            for b in range(job.blocks):
                self._put(job, b, (begin + at) // size, leaf_digest(atom[b * each : (b + 1) * each]))

    def _pieces(self, job: Job, begin: int, memory: memoryview) -> None:
        pieces = -(-job.segment // LEAF)
        at = 0
        while at < len(memory):
            row, within = divmod(begin + at, job.blocks * job.segment)
            b, within = divmod(within, job.segment)
            size = min(LEAF, job.segment - within)
            self._put(job, b, row * pieces + within // LEAF, leaf_digest(memory[at : at + size]))
            at += size

    def _put(self, job: Job, block: int, leaf: int, digest: bytes) -> None:
        if job.leaves == 1:
            digest = block_digest(digest)
        at = (job.slot + block * job.leaves + leaf) * SIZE
        self._slots[at : at + SIZE] = digest

    def _gather(self, atom: memoryview, job: Job) -> memoryview:
        """The same rows, but block by block."""
        source = torch.frombuffer(atom, dtype=torch.uint8)
        if not self._gathered.numel():
            buffer = bytearray(LEAF)
            self._view = memoryview(buffer)
            self._gathered = torch.frombuffer(buffer, dtype=torch.uint8)

        # The wider the items, the fewer there are to copy.
        dtype = next((d for d in _WIDE if not (job.segment | source.data_ptr()) % d.itemsize), torch.uint8)
        rows = source.view(dtype).view(-1, job.blocks, job.segment // dtype.itemsize)
        target = self._gathered[: len(atom)].view(dtype).view(job.blocks, rows.shape[0], -1)
        target.copy_(rows.transpose(0, 1))

        return self._view[: len(atom)]


_WIDE = (torch.int64, torch.int32, torch.int16)
