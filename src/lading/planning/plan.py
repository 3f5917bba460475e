"""The plan of a load: parameters × manifest → reads. Pure: no I/O, no torch."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lading.errors import InternalError
from lading.formats.manifest import BITS, Manifest, Piece
from lading.planning.box import Box, Selection
from lading.planning.composition import Source, pieces

PAGE = 4096
ALIGNMENT = 64
"""The alignment of a tensor in the arena, unless it follows the file: a cache line and the widest vector register."""

ARENA = -1
"""The home of a tensor that is read into the arena."""


GAP = 32 << 10
"""The most bytes between two runs that are read with them rather than skipped: copying them costs less than a call."""

LONG_RUN = 256 << 10
"""The size in bytes above which a run is a read of its own."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """The products of a part of a tensor in memory with the scales of its blocks."""

    wanted: int
    """The position of the entry with the part."""
    selection: Selection
    """The elements of the tensor in the file, and their places in the memory of the entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The tensors to read, in columns of equal length."""

    tensors: Sequence[int]
    """The positions in the manifest."""
    boxes: Sequence[Box]
    """The part of each tensor to read, within its shape."""
    dtypes: Sequence[str]
    """The dtype in memory; values are cast if the manifest has another."""
    composed: Mapping[int, Source] = field(default_factory=dict)
    """The compositions, by position in these columns, of entries that are not one tensor as it is; the box is a part of
    the composed tensor."""
    scalings: Sequence[Scaling] = ()
    """The products to make in memory. The scales of each are an entry of these columns: the last ones, in this
    order."""

    def outputs(self) -> list[tuple[tuple[int, ...], str]]:
        """Return the shape and the dtype in memory of each entry."""
        return [(box.sizes, dtype) for box, dtype in zip(self.boxes, self.dtypes, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Runs of equal size at equal distances, such as some columns of a matrix, contiguous in memory.

    They are stored in columns, sorted like the reads of a plan.
    """

    shards: array[int] = field(default_factory=lambda: array("I"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    """The offset of the first run in the shard's file; type code ``q``, as for the columns below."""
    strides: array[int] = field(default_factory=lambda: array("q"))
    """The bytes in the file from the start of a run to the start of the next."""
    lengths: array[int] = field(default_factory=lambda: array("q"))
    """The bytes of a run in the file, at most :data:`LONG_RUN`."""
    counts: array[int] = field(default_factory=lambda: array("q"))
    """The number of runs, at least two."""
    targets: array[int] = field(default_factory=lambda: array("q"))
    """The offset of the first run in the arena."""
    casts: array[int] = field(default_factory=lambda: array("I"))
    """The position in the plan's ``conversions``."""

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
        """The bytes to read, including the gaps that are read along."""
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
    """Return whether runs of ``length`` bytes, ``stride`` bytes apart, are read together with the gaps between them."""
    return stride - length <= GAP


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Reads in columns, sorted by shard and offset, with adjacent reads joined; reads of compositions come last."""

    arena_bytes: int
    """The size of the arena that the reads fill."""
    homes: array[int]
    """The home of each wanted tensor: the shard whose mapping holds it, or :data:`ARENA`; type code ``i``."""
    places: array[int]
    """The offset of each wanted tensor in its home; type code ``q``."""

    shards: array[int]
    """The shard of each read; type code ``I``."""
    offsets: array[int]
    """The offset of each read in the shard's file; type code ``q``."""
    sizes: array[int]
    """The bytes of each read in the file; type code ``q``."""
    targets: array[int]
    """The offset of each read in the arena; type code ``q``."""
    casts: array[int]
    """The position of each read's cast in ``conversions``; type code ``I``."""
    conversions: tuple[tuple[str, str], ...]
    """The ``(dtype in the file, dtype in memory)`` of each cast; the first entry means no cast."""
    rows: Rows = field(default_factory=Rows)
    """The other reads: runs at equal distances."""

    @property
    def read_bytes(self) -> int:
        return sum(self.sizes) + self.rows.read_bytes

    @property
    def num_reads(self) -> int:
        return len(self.sizes) + self.rows.num_reads


def plan(manifest: Manifest, wanted: Wanted, *, mapped: bool = False) -> Plan:
    """Plan the reads for ``wanted``.

    The arena follows the order of the files, so that a complete shard is one read. Without a cast, offsets in arena and
    file agree modulo the page size, so that direct I/O can read straight into the arena.

    :param mapped: leave tensors in a mapping of the file if their box is one aligned run of bytes that needs no cast
        and belongs to no other tensor; otherwise a write to one would change another.
    """
    reads = _Reads()
    claimed = _ClaimedRanges()
    rows = Rows()
    homes = array("i", [ARENA]) * len(wanted.tensors)
    places = array("q", [0]) * len(wanted.tensors)
    conversions: dict[tuple[str, str], int] = {("", ""): 0}
    end = 0

    # The manifest is sorted by (shard, offset), so positions in it are as well.
    order = sorted(range(len(wanted.tensors)), key=wanted.tensors.__getitem__)
    composed = wanted.composed
    if manifest.pieces:
        in_pieces: dict[int, Source] = {i: t for i, t in enumerate(wanted.tensors) if t in manifest.pieces}
        composed = {**in_pieces, **composed}
    for i in order:
        if i in composed:
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
        if fits and claimed.claim(shard, first, first + box.numel * size):
            homes[i], places[i] = shard, first
            continue

        cast = 0 if stored == dtype else conversions.setdefault((stored, dtype), len(conversions))
        if not reads.is_adjacent(shard, first, end, cast) or end % size:
            end = (
                _align_modulo_page(end, first) if cast == 0 and first % size == 0 else -(-end // ALIGNMENT) * ALIGNMENT
            )
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
    for i in (i for i in order if i in composed):
        found = _copies(manifest, composed[i], wanted.boxes[i], wanted.dtypes[i])
        home = _mapped_home(found, wanted.dtypes[i]) if mapped else None
        nbytes = wanted.boxes[i].numel * (BITS[wanted.dtypes[i]] // 8)
        if home is not None and claimed.claim(*home, home[1] + nbytes):
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


def plan_full_read(manifest: Manifest) -> tuple[Plan, Wanted]:
    """Plan one pass over tensors of one piece, which reads each tensor once, complete and without a cast."""
    if manifest.pieces:
        raise InternalError("a tensor in several pieces is not one run of bytes")
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
    """Runs of bytes at equal distances in a file that go to equal distances in the arena."""

    shard: int
    offset: int
    stride: int
    length: int
    count: int
    target: int
    apart: int
    """The bytes in the arena from the start of a run to the start of the next."""
    target_length: int
    """The bytes of a run in the arena."""
    conversion: tuple[str, str]

    def at(self, place: int) -> _Copy:
        """Return the copy for memory that begins at ``place`` in the arena."""
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
    """Return the copies that fill the memory of ``box``, which begins at 0."""
    found: list[_Copy] = []
    size = BITS[dtype] // 8
    for tensor, selection in pieces(source, manifest.shapes, box):
        stored = manifest.dtypes[tensor]
        item = BITS[stored] // 8
        whole = Piece((), manifest.shapes[tensor], manifest.shard_ids[tensor], manifest.offsets[tensor])
        parts = [(whole, selection)]
        if several := manifest.pieces.get(tensor):
            parts = [(piece, selection.within(piece.starts, piece.shape)) for piece in several]
        found += (
            _Copy(
                shard=piece.shard,
                offset=piece.offset + first * item,
                stride=stride * item,
                length=length * item,
                count=count,
                target=place * size,
                apart=apart * size,
                target_length=length * size,
                conversion=("", "") if stored == dtype else (stored, dtype),
            )
            for piece, part in parts
            for first, stride, length, count, place, apart in part.rows(piece.shape)
        )

    return found


def _mapped_home(copies: Sequence[_Copy], dtype: str) -> tuple[int, int] | None:
    """Return the (shard, offset) that holds the bytes as they would be in memory; ``None`` without one."""
    if len(copies) != 1:
        return None
    (copy,) = copies
    as_it_is = copy.count == 1 and copy.conversion == ("", "") and copy.offset % (BITS[dtype] // 8) == 0

    return (copy.shard, copy.offset) if as_it_is else None


def _align_modulo_page(place: int, offset: int) -> int:
    """Return the first place from ``place`` on that equals ``offset`` modulo the page size."""
    return place + (offset - place) % PAGE


class _ClaimedRanges:
    """The ranges of files that mapped tensors have claimed, without overlaps."""

    def __init__(self) -> None:
        self._starts: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}

    def claim(self, shard: int, begin: int, end: int) -> bool:
        """Claim a range; return ``False`` if a part of it is already claimed."""
        starts, ends = self._starts.setdefault(shard, []), self._ends.setdefault(shard, [])
        at = bisect_left(starts, end)  # ranges are sorted: those before `at` start before `end`
        if at and ends[at - 1] > begin:
            return False
        starts.insert(at, begin)
        ends.insert(at, end)

        return True


class _Reads:
    """Columns of reads, in which a read adjacent to the last one is joined to it."""

    def __init__(self) -> None:
        self.shards, self.casts = array("I"), array("I")
        self.offsets, self.sizes, self.targets = array("q"), array("q"), array("q")
        self._last = (-1, -1, -1, -1)
        """The shard, end in the file, end in the arena, and cast of the last read."""

    def is_adjacent(self, shard: int, offset: int, target: int, cast: int) -> bool:
        """Return whether bytes from there on would join the last read."""
        return self._last == (shard, offset, target, cast)

    def add(self, shard: int, offset: int, size: int, target: int, target_size: int, cast: int) -> None:
        if self.is_adjacent(shard, offset, target, cast):
            self.sizes[-1] += size
        else:
            self.shards.append(shard)
            self.offsets.append(offset)
            self.sizes.append(size)
            self.targets.append(target)
            self.casts.append(cast)

        self._last = (shard, offset + size, target + target_size, cast)
