"""Digests of the bytes that a load reads, taken while they are in the cache of the core that read them.

The blocks (:mod:`lading.formats.digests`) in each read are known before it starts, so that the reading threads share
only an array of slots, one for each leaf, each written once. Pieces of reads end where atoms
(:mod:`lading.transfer.leaf_hasher`) do, so that each piece is hashed independently.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from threading import get_ident

from lading.errors import CorruptModelCheckpointError, InternalError
from lading.formats.digests import (
    EMPTY_BLOCK,
    LEAF,
    SIZE,
    Cut,
    Digests,
    block_digest,
    cut,
    default_dims,
    recorded,
    starts_of,
)
from lading.formats.manifest import BITS, Manifest
from lading.planning.box import Box
from lading.planning.plan import ARENA, Plan, Wanted, plan, plan_full_read
from lading.system.progress import byte_bar
from lading.transfer.arena import Buffer, NoArena
from lading.transfer.drive import read
from lading.transfer.files import File
from lading.transfer.leaf_hasher import Job, LeafHasher, Part
from lading.transfer.reader import Reading


class _Jobs:
    """Jobs in columns, sorted by their source and their begin so that a search finds them."""

    def __init__(self) -> None:
        self._sources = array("q")
        self._columns = tuple(array("q") for _ in Job._fields)
        self._begins = self._columns[0]
        self.nbytes = 0
        """The number of bytes of all jobs."""

    def add(self, source: int, job: Job) -> None:
        self._sources.append(source)
        for column, value in zip(self._columns, job, strict=True):
            column.append(value)
        self.nbytes += job.end - job.begin

    def require_order(self) -> None:
        """Check that the jobs are in order.

        :raises InternalError: they are not, because the plan is not.
        """
        if any(a > b for a, b in pairwise(zip(self._sources, self._begins, strict=True))):
            raise InternalError("the tensors of a plan are expected in the order of its reads")

    def __iter__(self) -> Iterator[Part]:
        for j, source in enumerate(self._sources):
            job = self._job(j)
            yield Part(job, source, job.begin, job.end)

    def within(self, source: int, begin: int, end: int) -> Iterator[Part]:
        """Yield the parts to hash among the bytes from ``begin`` to ``end``."""
        low, high = self._range(source)
        for j in range(max(low, bisect_right(self._begins, begin, low, high) - 1), high):
            if self._begins[j] >= end:
                break
            job = self._job(j)
            if job.end > begin:
                yield Part(job, source, max(begin, job.begin), min(end, job.end))

    def before(self, source: int, at: int) -> Job | None:
        """Return the last job that begins before ``at``."""
        low, high = self._range(source)
        j = bisect_left(self._begins, at, low, high) - 1

        return self._job(j) if j >= low else None

    def _range(self, source: int) -> tuple[int, int]:
        low = bisect_left(self._sources, source)

        return low, bisect_right(self._sources, source, low)

    def _job(self, j: int) -> Job:
        return Job(*(column[j] for column in self._columns))


@dataclass(slots=True)
class _Run:
    """Adjacent bytes of a tensor, in a read or in a mapping, and the wanted tensors that they fill."""

    tensor: int
    home: int
    read: int
    begin: int
    """The first byte, as an offset in the file."""
    end: int
    boxes: list[tuple[int, Box]]

    def is_continued_by(self, other: _Run) -> bool:
        """Return whether ``other`` has the same tensor's next bytes, so that blocks may lie across both."""
        mine, its = (self.tensor, self.home, self.read, self.end), (other.tensor, other.home, other.read, other.begin)

        return mine == its


class Hasher:
    """The observer that collects the digests of the blocks that one run of ``execute`` reads or maps whole.

    Blocks that are read in part have no digest, nor has a tensor in pieces. Nor have blocks of long runs of bytes, each
    read separately, that share a leaf; no shard of a gang of 2, 4 or 8 has such blocks.

    :param dims: for each tensor of the manifest the dim along which to cut it into blocks.
    :param wanted: the tensors that ``plan`` reads.

    :raises ValueError: a tensor has no such dim.
    """

    def __init__(self, manifest: Manifest, dims: Sequence[int], plan: Plan, wanted: Wanted) -> None:
        self._manifest = manifest
        self._dims = array("b", dims)
        self._plan = plan
        self.vouched = bytearray(len(wanted.tensors))
        """1 for each wanted tensor all of whose bytes are in hashed blocks, as read for it; else 0."""

        # The blocks to hash: tensor, first block, number of blocks, leaves of each, first slot.
        self._results = tuple(array("q") for _ in range(5))
        self._slots_used = 0
        self._empty: list[int] = []
        # Their bytes: by read, by entry of the plan's rows, by mapping.
        self._reads, self._rows, self._mapped = _Jobs(), _Jobs(), _Jobs()
        self._hashed_by_all: int | None = None

        self._find_jobs(wanted)
        self.slots = bytearray(self._slots_used * SIZE)
        """The digests of all leaves; for a block of one leaf, that of the block."""
        # By thread. A later thread may have the number, and so the hasher, of one that has ended.
        self._leaves: dict[int, LeafHasher] = defaultdict(lambda: LeafHasher(self.slots))

    # --- the jobs -----------------------------------------------------------------------------------------------------

    def _find_jobs(self, wanted: Wanted) -> None:
        pending: _Run | None = None

        # In the order in which a plan lays tensors out.
        for i in sorted(range(len(wanted.tensors)), key=wanted.tensors.__getitem__):
            if i in wanted.composed:
                continue  # its memory does not have a tensor's bytes as they are in the file
            tensor, box = wanted.tensors[i], wanted.boxes[i]
            shape = self._manifest.shapes[tensor]
            if box.numel == 0:
                self.vouched[i] = 1
                if box.covers(shape):
                    self._empty.append(tensor)
                continue
            if tensor in self._manifest.pieces:
                continue  # a block may lie across several of them

            first, count = (0, box.numel) if box.covers(shape) else next(box.runs(shape))
            run = self._run(i, tensor, box, first) if count == box.numel else None
            if run is not None and pending is not None and pending.is_continued_by(run):
                pending.end = run.end
                pending.boxes += run.boxes
                continue

            self._add_run(pending)
            pending = run
            if run is None:
                self._add_rows(i, tensor, box, wanted.dtypes[i])

        self._add_run(pending)
        self._reads.require_order()
        self._rows.require_order()

    def _run(self, i: int, tensor: int, box: Box, first: int) -> _Run:
        """Return the place of the bytes of a wanted tensor, which begin with its element ``first``."""
        home, bits = self._plan.homes[i], BITS[self._manifest.dtypes[tensor]]
        begin = self._manifest.offsets[tensor] + first * bits // 8
        end = begin + box.numel * bits // 8
        read = self._read_of(tensor, self._plan.places[i], begin, end) if home == ARENA else -1

        return _Run(tensor, home, read, begin, end, [(i, box)])

    def _read_of(self, tensor: int, place: int, begin: int, end: int) -> int:
        """Return the read that fills ``place`` with the bytes of the file from ``begin`` to ``end``."""
        # No two reads go to the same place, so the place identifies the read, even for bytes that are read twice.
        plan = self._plan
        read = bisect_right(plan.targets, place) - 1
        if read < 0 or not (
            plan.shards[read] == self._manifest.shard_ids[tensor]
            and plan.offsets[read] <= begin
            and end <= plan.offsets[read] + plan.sizes[read]
        ):
            raise InternalError(f"no read of the plan fills the place of tensor {self._manifest.names[tensor]!r}")

        return read

    def _add_run(self, run: _Run | None) -> None:
        """Hash the blocks that lie in ``run``."""
        if run is None:
            return

        dtype, shape, dim = self._manifest.dtypes[run.tensor], self._manifest.shapes[run.tensor], self._dims[run.tensor]
        base, whole = self._manifest.offsets[run.tensor], cut(dtype, shape, dim)
        if whole.rows == 1:
            blocks = range(-(-(run.begin - base) // whole.segment), (run.end - base) // whole.segment)
        else:
            blocks = range(whole.blocks if run.end - run.begin == whole.nbytes else 0)

        if blocks:
            jobs, source = (self._reads, run.read) if run.home == ARENA else (self._mapped, run.home)
            slot = self._add_result(run.tensor, blocks, whole)
            jobs.add(source, _job(base + blocks.start * whole.segment, blocks, whole, slot))
        for i, box in run.boxes:
            self.vouched[i] = _within(blocks_touched(dtype, shape, dim, box), blocks)

    def _add_rows(self, i: int, tensor: int, box: Box, dtype: str) -> None:
        """Hash the blocks of a box of whole blocks that consists of several runs of bytes, one in each row."""
        rows, place = self._plan.rows, self._plan.places[i]
        stored, shape, dim = self._manifest.dtypes[tensor], self._manifest.shapes[tensor], self._dims[tensor]
        blocks = blocks_within(stored, shape, dim, box)
        if not blocks or blocks != blocks_touched(stored, shape, dim, box):
            return

        whole = cut(stored, shape, dim)
        row, length = whole.blocks * whole.segment, len(blocks) * whole.segment
        entry = bisect_left(rows.targets, place)
        if entry < len(rows.targets) and (
            (rows.targets[entry], rows.strides[entry], rows.lengths[entry], rows.counts[entry])
            == (place, row, length, whole.rows)
        ):
            self._rows.add(entry, _job(0, blocks, whole, self._add_result(tensor, blocks, whole)))
        elif whole.group == 1:
            slot, leaves = self._add_result(tensor, blocks, whole), whole.leaves // whole.rows
            begin = self._manifest.offsets[tensor] + blocks.start * whole.segment
            for n in range(whole.rows):
                read = self._read_of(tensor, place, begin, begin + length)
                self._reads.add(read, _job(begin, blocks, whole, slot)._replace(rows=1, leaf=n * leaves))
                begin += row
                place += length // (BITS[stored] // 8) * (BITS[dtype] // 8)
        else:
            return

        self.vouched[i] = 1

    def _add_result(self, tensor: int, blocks: range, whole: Cut) -> int:
        """Expect the digests of ``blocks`` and return their first slot."""
        slot = self._slots_used
        for column, value in zip(self._results, (tensor, blocks.start, len(blocks), whole.leaves, slot), strict=True):
            column.append(value)
        self._slots_used += len(blocks) * whole.leaves

        return slot

    # --- during the reads ---------------------------------------------------------------------------------------------

    def stop(self, read: int, at: int, limit: int, item: int) -> int:
        job = self._reads.before(read, limit)
        if job is not None and limit < job.end:
            begin, end = job.atom(limit)
            return begin if begin > at else end

        return limit - (limit - at) % item

    def rows_together(self, rows: int) -> int:
        job = self._rows.before(rows, 1)

        return 1 if job is None else max(1, job.group)

    def bytes_read(self, read: int, begin: int, memory: memoryview) -> None:
        self._leaves[get_ident()].hash(self._reads.within(read, begin, begin + len(memory)), begin, memory)

    def rows_read(self, rows: int, begin: int, memory: memoryview) -> None:
        self._leaves[get_ident()].hash(self._rows.within(rows, begin, begin + len(memory)), begin, memory)

    @property
    def mapped_bytes(self) -> int:
        return self._mapped.nbytes

    def mapped_steps(self, most: int) -> Iterator[Sequence[Part]]:
        step: list[Part] = []
        size = 0
        for job, source, at, end in self._mapped:
            while at < end:
                limit = at + most - size
                first, last = job.atom(limit) if limit < end else (end, end)
                stop = first if first > at else last
                step.append(Part(job, source, at, stop))
                size += stop - at
                at = stop
                if size >= most - LEAF:
                    yield step
                    step, size = [], 0

        if step:
            yield step

    def bytes_mapped(self, mappings: Mapping[int, memoryview], step: Sequence[Part]) -> int:
        leaves = self._leaves[get_ident()]
        for part in step:
            leaves.hash([part], 0, mappings[part.source])

        return sum(part.end - part.begin for part in step)

    # --- after the reads ----------------------------------------------------------------------------------------------

    def pool(self, add_up: Callable[[bytearray | array[int]], None]) -> None:
        """Add the digests of other ranks, each of another part of the same plan's reads.

        :param add_up: replaces numbers by their sums over all ranks. One rank writes a slot; those of the others are
            zero.
        """
        hashed = array("q", [self._hashed])
        add_up(hashed)
        add_up(self.slots)
        self._hashed_by_all = hashed[0]

    @property
    def _hashed(self) -> int:
        """The number of bytes hashed by all threads."""
        return sum(leaves.hashed for leaves in self._leaves.values())

    def digests(self) -> Digests:
        """Return the digests of all hashed blocks, after ``execute`` has returned.

        :raises CorruptModelCheckpointError: bytes that were read twice differ.
        """
        expected = self._reads.nbytes + self._rows.nbytes + self._mapped.nbytes
        hashed = self._hashed if self._hashed_by_all is None else self._hashed_by_all
        if hashed != expected:
            raise InternalError(f"{expected} bytes should have been hashed, but {hashed} were")

        starts = starts_of(self._manifest, self._dims)
        blocks, known = bytearray(starts[-1] * SIZE), bytearray(len(self._dims))
        for tensor in self._empty:
            blocks[starts[tensor] * SIZE : starts[tensor + 1] * SIZE] = EMPTY_BLOCK
            known[tensor] = 1

        for tensor, first, count, leaves, slot in zip(*self._results, strict=True):
            found = _digests_of_blocks(self.slots[slot * SIZE : (slot + count * leaves) * SIZE], leaves)
            at = (starts[tensor] + first) * SIZE
            mask = (1 << count) - 1 << first
            if known[tensor] & mask:
                self._require_same(tensor, first, known[tensor] & mask, blocks[at : at + len(found)], found)
            blocks[at : at + len(found)] = found
            known[tensor] |= mask

        return Digests(dims=self._dims, starts=starts, blocks=bytes(blocks), known=bytes(known))

    def _require_same(self, tensor: int, first: int, both: int, before: bytearray, found: bytes | bytearray) -> None:
        for at in range(0, len(found), SIZE):
            block = first + at // SIZE
            if both >> block & 1 and before[at : at + SIZE] != found[at : at + SIZE]:
                shard = self._manifest.shards[self._manifest.shard_ids[tensor]].name
                raise CorruptModelCheckpointError(
                    shard,
                    f"{shard}: block {block} of tensor {self._manifest.names[tensor]!r} was read twice, and is "
                    "expected to be the same each time, but is not. Load it again when nothing writes to it any more; "
                    "if that does not help, check the disk.",
                )


def hash_memory(memory: memoryview, dtype: str, shape: Sequence[int], dim: int) -> bytes:
    """Return the digests of the blocks of a tensor whose bytes, contiguous and row-major, are in memory.

    :raises ValueError: the tensor has no such dim.
    """
    whole = cut(dtype, shape, dim)
    if not whole.nbytes:
        return EMPTY_BLOCK
    slots = bytearray(whole.blocks * whole.leaves * SIZE)
    job = _job(0, range(whole.blocks), whole, 0)
    LeafHasher(slots).hash([Part(job, 0, 0, whole.nbytes)], 0, memory)

    return bytes(_digests_of_blocks(slots, whole.leaves))


def _digests_of_blocks(slots: bytes | bytearray, leaves: int) -> bytes | bytearray:
    """Return the digests of blocks from their slots, one for each of the ``leaves`` of a block."""
    size = leaves * SIZE

    return slots if leaves == 1 else b"".join(block_digest(slots[at : at + size]) for at in range(0, len(slots), size))


def _job(begin: int, blocks: range, whole: Cut, slot: int) -> Job:
    """Return the job of some of the blocks of a tensor that is cut as ``whole``."""
    group = whole.group if whole.blocks * whole.segment <= LEAF else 0

    return Job(begin, whole.rows, len(blocks), whole.segment, group, whole.leaves, 0, slot)


def _within(inner: range, outer: range) -> bool:
    return not inner or (outer.start <= inner.start and inner.stop <= outer.stop)


def blocks_within(dtype: str, shape: Sequence[int], dim: int, box: Box) -> range:
    """Return the blocks that ``box`` covers completely."""
    count = cut(dtype, shape, dim).blocks
    if count == 1:
        return range(1 if box.covers(shape) else 0)

    for other, (size, n) in enumerate(zip(box.sizes, shape, strict=True)):
        if other != dim and size != n:
            return range(0)

    size = shape[dim] // count

    return range(-(-box.starts[dim] // size), box.ends[dim] // size)


def blocks_touched(dtype: str, shape: Sequence[int], dim: int, box: Box) -> range:
    """Return the blocks that share an element with ``box``. Only all of them together verify it."""
    count = cut(dtype, shape, dim).blocks
    if box.numel == 0:
        return range(0)
    if count == 1:
        return range(1)

    size = shape[dim] // count

    return range(box.starts[dim] // size, -(-box.ends[dim] // size))


def hash_checkpoint(
    manifest: Manifest,
    files: Sequence[File],
    dims: Sequence[int] | None = None,
    *,
    threads: int | None = None,
    progress: bool = False,
) -> Digests:
    """Return the digests of all tensors of a checkpoint, reading each byte once.

    This takes a few MiB of memory per thread, and that of a tensor which lies in several pieces.

    :param files: one for each shard of the manifest.
    :param dims: for each tensor the dim along which to cut it into blocks; default: 0.
    :param threads: the number of threads that read and hash; default: as :func:`~lading.transfer.drive.read`.

    :raises CorruptModelCheckpointError: a file ends early, or is not the one whose manifest this is.
    :raises OSError: a file cannot be read.
    :raises ValueError: a tensor has no such dim.
    """
    dims = default_dims(manifest) if dims is None else dims
    if manifest.pieces:
        return _hash_pieces(manifest, files, dims, threads=threads, progress=progress)
    planned, wanted = plan_full_read(manifest)
    hasher = Hasher(manifest, dims, planned, wanted)

    with ExitStack() as stack:
        shards = {i: stack.enter_context(file.open()) for i, file in enumerate(files)}
        read(Reading(planned, shards, NoArena(), hasher), threads, "verify" if progress else None)

    return hasher.digests()


def _hash_pieces(
    manifest: Manifest, files: Sequence[File], dims: Sequence[int], *, threads: int | None, progress: bool
) -> Digests:
    """Return the digests of a checkpoint in which some tensors lie in several pieces: those are in memory, in turn."""
    rows: list[tuple[int, bytes] | None] = [None] * len(manifest)
    with byte_bar(manifest.total_bytes, "verify", shown=progress) as bar:
        single = [i for i in range(len(manifest)) if i not in manifest.pieces]
        part = manifest.take(single)
        found = hash_checkpoint(part, files, [dims[i] for i in single], threads=threads)
        for i, digest in zip(single, found.iter(part), strict=True):
            rows[i] = None if digest is None else (digest.dim, digest.blocks)
        bar.update(part.total_bytes)

        for i in manifest.pieces:
            dtype, shape = manifest.dtypes[i], manifest.shapes[i]
            planned = plan(manifest, Wanted(tensors=[i], boxes=[Box.whole(shape)], dtypes=[dtype]))
            buffer = Buffer(planned.arena_bytes)
            with ExitStack() as stack:
                shards = {s: stack.enter_context(files[s].open()) for s in {*planned.shards, *planned.rows.shards}}
                read(Reading(planned, shards, buffer, None), threads, None)
            rows[i] = (dims[i], hash_memory(buffer.memory, dtype, shape, dims[i]))
            bar.update(planned.arena_bytes)

    return recorded(manifest, rows)
