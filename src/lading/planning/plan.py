"""Which bytes to read, and where they go: parameters × manifest → reads. Pure: no I/O, no torch."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lading.formats.manifest import BITS, Manifest
from lading.planning.box import Box
from lading.planning.composition import Source, pieces

PAGE = 4096
ALIGNMENT = 64
"""Of a tensor in the arena, unless it lies as it lies in the file: a cache line, and the widest vector register."""

ARENA = -1
"""The home of a tensor that is read into memory of its own."""


GAP = 32 << 10
"""Bytes between two runs that are read with them rather than by-passed: what a system call costs more than a copy."""

LONG_RUN = 256 << 10
"""Bytes of a run that is a read of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What memory is to hold, in columns of equal length."""

    tensors: Sequence[int]
    """Positions in the manifest."""
    boxes: Sequence[Box]
    """The part of each; within the tensor's shape."""
    dtypes: Sequence[str]
    """What memory holds; bytes are cast where the manifest says another."""
    composed: Mapping[int, Source] = field(default_factory=dict)
    """By the position in these columns, what those are made of that are not one tensor as it is; the box is a part of
    what that makes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Runs of equal size at equal distances, as a part of the columns of a matrix has them; in columns, sorted as the
    reads of a plan are. In memory one run follows the other.
    """

    shards: array[int] = field(default_factory=lambda: array("I"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    """Where the first run begins in the shard's file; type code ``q``, as all that follow."""
    strides: array[int] = field(default_factory=lambda: array("q"))
    """Bytes in the file from the beginning of a run to that of the next."""
    lengths: array[int] = field(default_factory=lambda: array("q"))
    """Bytes in the file of a run; at most :data:`LONG_RUN`."""
    counts: array[int] = field(default_factory=lambda: array("q"))
    """Runs; two at least."""
    targets: array[int] = field(default_factory=lambda: array("q"))
    """Where the first run goes in the arena."""
    casts: array[int] = field(default_factory=lambda: array("I"))
    """Position in the plan's ``conversions``."""

    def add(self, shard: int, offset: int, stride: int, length: int, count: int, target: int, cast: int) -> None:
        self.shards.append(shard)
        self.offsets.append(offset)
        self.strides.append(stride)
        self.lengths.append(length)
        self.counts.append(count)
        self.targets.append(target)
        self.casts.append(cast)

    @property
    def read_bytes(self) -> int:
        """Bytes that are read, gaps included where they are read too."""
        return sum(
            (count - 1) * (stride if reads_gaps(stride, length) else length) + length
            for stride, length, count in zip(self.strides, self.lengths, self.counts, strict=True)
        )

    @property
    def num_reads(self) -> int:
        return sum(
            1 if reads_gaps(stride, length) else count
            for stride, length, count in zip(self.strides, self.lengths, self.counts, strict=True)
        )


def reads_gaps(stride: int, length: int) -> bool:
    """Whether runs of ``length`` bytes, ``stride`` bytes apart, are read with what is between them."""
    return stride - length <= GAP


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Reads in columns, sorted by shard and offset, neighbours joined. What is composed comes last, sorted likewise."""

    arena_bytes: int
    """The size of the arena that the reads fill."""
    homes: array[int]
    """For each wanted tensor the shard whose mapping holds it, or :data:`ARENA`; type code ``i``."""
    places: array[int]
    """For each wanted tensor where it begins, in its home; type code ``q``."""

    shards: array[int]
    """For each read its shard; type code ``I``."""
    offsets: array[int]
    """Where it begins in the shard's file; type code ``q``."""
    sizes: array[int]
    """Bytes in the file; type code ``q``."""
    targets: array[int]
    """Where it goes in the arena; type code ``q``."""
    casts: array[int]
    """Position in ``conversions``; type code ``I``."""
    conversions: tuple[tuple[str, str], ...]
    """(dtype in the file, dtype in memory) of each cast; the first stands for none."""
    rows: Rows = field(default_factory=Rows)
    """What is read besides: runs at equal distances."""

    @property
    def read_bytes(self) -> int:
        return sum(self.sizes) + self.rows.read_bytes

    @property
    def num_reads(self) -> int:
        return len(self.sizes) + self.rows.num_reads


def plan(manifest: Manifest, wanted: Wanted, *, mapped: bool = False) -> Plan:
    """Plan the reads for ``wanted``.

    The arena is laid out in the order of the files, so that a shard that is wanted whole is one read. Where nothing is
    cast, arena and file agree modulo the page size, so that direct I/O can read straight into the arena.

    :param mapped: leave tensors where they are, in a mapping of the file, wherever their box is one run of bytes that
        need no cast, are aligned, and are of no other tensor: else who writes to one would change another.
    """
    reads = _Reads()
    taken = _Taken()
    rows = Rows()
    homes = array("i", [ARENA]) * len(wanted.tensors)
    places = array("q", [0]) * len(wanted.tensors)
    conversions: dict[tuple[str, str], int] = {("", ""): 0}
    end = 0

    # The manifest is in the order (shard, offset), therefore its positions are too.
    order = sorted(range(len(wanted.tensors)), key=wanted.tensors.__getitem__)
    for i in order:
        if i in wanted.composed:
            continue
        tensor, box, dtype = wanted.tensors[i], wanted.boxes[i], wanted.dtypes[i]
        stored, shape = manifest.dtypes[tensor], manifest.shapes[tensor]
        shard, base = manifest.shard_ids[tensor], manifest.offsets[tensor]
        source_size, size = BITS[stored] // 8, BITS[dtype] // 8

        if box.numel == 0:
            places[i] = end
            continue

        groups = [(0, box.numel, box.numel, 1)] if box.covers(shape) else list(box.rows(shape))
        first = base + groups[0][0] * source_size
        is_one_run = len(groups) == 1 and groups[0][3] == 1

        fits = mapped and stored == dtype and is_one_run and first % size == 0
        if fits and taken.take(shard, first, first + box.numel * size):
            homes[i], places[i] = shard, first
            continue

        cast = 0 if stored == dtype else conversions.setdefault((stored, dtype), len(conversions))
        if not reads.ends_at(shard, first, end, cast) or end % size:
            end = _congruent(end, first) if cast == 0 and first % size == 0 else -(-end // ALIGNMENT) * ALIGNMENT
        places[i] = end

        for start, stride, length, count in groups:
            offset = base + start * source_size
            if count > 1 and length * source_size <= LONG_RUN:
                rows.add(shard, offset, stride * source_size, length * source_size, count, end, cast)
                end += count * length * size
                continue
            for _ in range(count):
                reads.add(shard, offset, length * source_size, end, length * size, cast)
                offset += stride * source_size
                end += length * size

    copies: list[_Copy] = []
    for i in (i for i in order if i in wanted.composed):
        found = _copies(manifest, wanted.composed[i], wanted.boxes[i], wanted.dtypes[i])
        home = _home(found, wanted.dtypes[i]) if mapped else None
        nbytes = wanted.boxes[i].numel * (BITS[wanted.dtypes[i]] // 8)
        if home is not None and taken.take(*home, home[1] + nbytes):
            homes[i], places[i] = home
            continue
        places[i] = end = -(-end // ALIGNMENT) * ALIGNMENT
        copies += (copy.at(end) for copy in found)
        end += nbytes

    for copy in sorted(copies):
        copy.add_to(reads, rows, conversions.setdefault(copy.conversion, len(conversions)))

    return Plan(
        arena_bytes=end,
        homes=homes,
        places=places,
        shards=reads.shards,
        offsets=reads.offsets,
        sizes=reads.sizes,
        targets=reads.targets,
        casts=reads.casts,
        conversions=tuple(conversions),
        rows=rows,
    )


def plan_pass(manifest: Manifest) -> tuple[Plan, Wanted]:
    """Plan to read each tensor of a checkpoint once, whole and as it is, for its bytes to be looked at as they pass."""
    reads = _Reads()
    places = array("q")
    end = 0
    for i in range(len(manifest)):
        size = manifest.nbytes(i)
        places.append(end)
        if size:
            reads.add(manifest.shard_ids[i], manifest.offsets[i], size, end, size, 0)
        end += size

    plan = Plan(
        arena_bytes=end,
        homes=array("i", [ARENA]) * len(manifest),
        places=places,
        shards=reads.shards,
        offsets=reads.offsets,
        sizes=reads.sizes,
        targets=reads.targets,
        casts=reads.casts,
        conversions=(("", ""),),
    )
    boxes = [Box.whole(shape) for shape in manifest.shapes]

    return plan, Wanted(tensors=range(len(manifest)), boxes=boxes, dtypes=manifest.dtypes)


@dataclass(frozen=True, slots=True, order=True)
class _Copy:
    """Runs of bytes at equal distances in a file, that go to equal distances in the arena."""

    shard: int
    offset: int
    stride: int
    length: int
    count: int
    target: int
    apart: int
    """Bytes in the arena from the beginning of a run to that of the next."""
    target_length: int
    """Bytes in the arena of a run."""
    conversion: tuple[str, str]

    def at(self, place: int) -> _Copy:
        """The same for memory that begins at ``place`` of the arena."""
        return replace(self, target=place + self.target)

    def add_to(self, reads: _Reads, rows: Rows, cast: int) -> None:
        side_by_side = self.apart == self.target_length
        if self.count > 1 and side_by_side and self.length <= LONG_RUN:
            rows.add(self.shard, self.offset, self.stride, self.length, self.count, self.target, cast)
            return
        for k in range(self.count):
            offset, target = self.offset + k * self.stride, self.target + k * self.apart
            reads.add(self.shard, offset, self.length, target, self.target_length, cast)


def _copies(manifest: Manifest, source: Source, box: Box, dtype: str) -> list[_Copy]:
    """What fills the memory of ``box``, which begins at 0."""
    found: list[_Copy] = []
    size = BITS[dtype] // 8
    for piece in pieces(source, manifest.shapes, box):
        tensor = piece.tensor
        stored = manifest.dtypes[tensor]
        item = BITS[stored] // 8
        found += (
            _Copy(
                shard=manifest.shard_ids[tensor],
                offset=manifest.offsets[tensor] + first * item,
                stride=stride * item,
                length=length * item,
                count=count,
                target=place * size,
                apart=apart * size,
                target_length=length * size,
                conversion=("", "") if stored == dtype else (stored, dtype),
            )
            for first, stride, length, count, place, apart in piece.rows(manifest.shapes[tensor])
        )

    return found


def _home(copies: Sequence[_Copy], dtype: str) -> tuple[int, int] | None:
    """The shard, and the place in it, where all of the copies lie as they would in memory; ``None`` if nowhere."""
    if len(copies) != 1:
        return None
    (copy,) = copies
    as_it_is = copy.count == 1 and copy.conversion == ("", "") and copy.offset % (BITS[dtype] // 8) == 0

    return (copy.shard, copy.offset) if as_it_is else None


def _congruent(place: int, offset: int) -> int:
    """The first place at or behind ``place`` that equals ``offset`` modulo the page size."""
    return place + (offset - place) % PAGE


class _Taken:
    """Ranges of files, each of them in one place only."""

    def __init__(self) -> None:
        self._starts: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}

    def take(self, shard: int, begin: int, end: int) -> bool:
        """Take a range; return whether nothing of it is taken yet."""
        starts, ends = self._starts.setdefault(shard, []), self._ends.setdefault(shard, [])
        at = bisect_left(starts, end)  # ranges are in order, and those before this place begin before the end
        if at and ends[at - 1] > begin:
            return False
        starts.insert(at, begin)
        ends.insert(at, end)

        return True


class _Reads:
    """Columns of reads that join what is added next to the last one."""

    def __init__(self) -> None:
        self.shards, self.casts = array("I"), array("I")
        self.offsets, self.sizes, self.targets = array("q"), array("q"), array("q")
        self._last = (-1, -1, -1, -1)
        """Shard, end in the file, end in the arena, and cast of the last read."""

    def ends_at(self, shard: int, offset: int, target: int, cast: int) -> bool:
        """Whether bytes that begin there would join the last read."""
        return self._last == (shard, offset, target, cast)

    def add(self, shard: int, offset: int, size: int, target: int, target_size: int, cast: int) -> None:
        if self.ends_at(shard, offset, target, cast):
            self.sizes[-1] += size
        else:
            self.shards.append(shard)
            self.offsets.append(offset)
            self.sizes.append(size)
            self.targets.append(target)
            self.casts.append(cast)

        self._last = (shard, offset + size, target + target_size, cast)
