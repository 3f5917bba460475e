"""The comparison of the values of tensors in files, in one pass and a few MiB of memory per thread."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lading.formats.manifest import BITS, BLOCK, Manifest
from lading.planning.block_scales import SCALE_DTYPE, misfits_of_scales
from lading.planning.box import Box
from lading.planning.plan import PAGE
from lading.transfer.drive import COLD_THREADS, busy, cores, drive
from lading.transfer.dtypes import TORCH_DTYPES
from lading.transfer.execute import single_threads
from lading.transfer.files import OpenShard, ShardFile, open_shard

_STEP = 4 << 20
"""The bytes of each side to read at once: large enough for a disk."""

_ITEMS = 1 << 16
"""The elements to compute with at once: they and their differences have to stay in a core's cache."""

_SIGN = -(1 << 63)
_INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_SIGNED = frozenset({"I8", "I16", "I32", "I64"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueDifference:
    """The difference of the values of two tensors of the same shape.

    A NaN equals a NaN at the same place. If one side alone is NaN or infinite, or they are infinities of different
    signs, the element differs by infinity.
    """

    compared_as: str
    """The dtype that has the values of both: theirs, or a wider one if they differ."""
    elements: int
    changed: int
    """The number of elements that are not equal."""
    max_abs: float
    """The largest absolute difference; an exact ``int`` for integers and booleans."""
    max_rel: float
    """The largest relative difference: the absolute one by the larger of both magnitudes."""

    @property
    def equal(self) -> bool:
        return self.changed == 0

    @property
    def changed_share(self) -> float:
        """The share of elements that are not equal, from 0 to 1."""
        return self.changed / self.elements if self.elements else 0.0


class Found(NamedTuple):
    """The difference of some elements."""

    changed: int = 0
    max_abs: float = 0
    max_rel: float = 0.0

    def joined(self, other: Found) -> Found:
        """Return the difference of the elements of both."""
        return Found(self.changed + other.changed, max(self.max_abs, other.max_abs), max(self.max_rel, other.max_rel))


class _Step(NamedTuple):
    """Elements to compare."""

    pair: int
    first: int
    size: int


class Files(NamedTuple):
    """A checkpoint on this machine: its manifest, and a file for each of its shards."""

    manifest: Manifest
    files: Sequence[ShardFile]

    def has_values(self, tensor: int) -> bool:
        """Return whether the values of a tensor can be read: torch has its dtype, and its scales are as they should."""
        return self.manifest.dtypes[tensor] in TORCH_DTYPES and not misfits_of_scales(self.manifest, tensor)


def compare_tensors(
    a: Files, b: Files, pairs: Sequence[tuple[int, int]], *, progress: bool = False, threads: int | None = None
) -> list[ValueDifference]:
    """Return the difference of the values of each pair of tensors, reading each once.

    This compares integers and booleans exactly, double precision in double precision, and other floating dtypes in
    single precision unless a difference exceeds it.

    :param pairs: positions of tensors in the manifests of A and B, of the same shape, whose values can be read.
    :param threads: the number of threads; default: the cores of this process, and some more for a disk.

    :raises CorruptModelCheckpointError: a file ends early, or is not the one whose manifest this is.
    :raises OSError: a file cannot be read.
    """
    with ExitStack() as stack:
        sides = [_Side.opened(stack, side, {pair[n] for pair in pairs}) for n, side in enumerate((a, b))]
        comparison = _Comparison(sides[0], sides[1], pairs)
        if pairs:
            if threads is None:
                cold = any(side.is_cold(i) for n, side in enumerate(sides) for i in {pair[n] for pair in pairs})
                threads = max(cores(), COLD_THREADS) if cold else cores()
            total = sum(a.manifest.nbytes(i) + b.manifest.nbytes(j) for i, j in pairs)
            with single_threads() as begin:
                label = "compare" if progress else None
                drive(comparison.steps(), comparison.run, busy(threads, total), total, label, begin)

    return [
        ValueDifference(compared_as=name, elements=elements, **found._asdict())
        for (name, _), elements, found in zip(comparison.dtypes, comparison.elements, comparison.found, strict=True)
    ]


class _Side(NamedTuple):
    manifest: Manifest
    shards: Mapping[int, OpenShard]

    @classmethod
    def opened(cls, stack: ExitStack, side: Files, tensors: set[int]) -> _Side:
        pieces, scales = side.manifest.pieces, side.manifest.scales
        tensors = tensors | {scales[i] for i in tensors if i in scales}
        needed = sorted(
            {side.manifest.shard_ids[i] for i in tensors} | {p.shard for i in tensors for p in pieces.get(i, ())}
        )

        return cls(side.manifest, {i: stack.enter_context(open_shard(side.files[i])) for i in needed})

    def is_cold(self, tensor: int) -> bool:
        return self.shards[self.manifest.shard_ids[tensor]].is_cold(self.manifest.offsets[tensor])

    def dtype_of(self, tensor: int) -> str:
        """Return the dtype of the values of a tensor, as :meth:`read` returns them."""
        return SCALE_DTYPE if tensor in self.manifest.scales else self.manifest.dtypes[tensor]

    def read(self, tensor: int, first: int, count: int, buffer: mmap.mmap) -> Tensor:
        """Return elements of a tensor, valid until the next call with this buffer."""
        values = self._read_stored(tensor, first, count, buffer)
        if tensor not in self.manifest.scales:
            return values

        scales = self.manifest.scales[tensor]
        shape, blocks = self.manifest.shapes[tensor], self.manifest.shapes[scales]
        at = torch.arange(first, first + count)
        rows, columns = at // shape[-1], at % shape[-1]
        matrix, row = rows // shape[-2], rows % shape[-2]
        block = (matrix * blocks[-2] + row // BLOCK) * blocks[-1] + columns // BLOCK
        low, high = int(block.min()), int(block.max()) + 1
        # This memory is freed with its last view.
        memory = mmap.mmap(-1, (high - low) * BITS[SCALE_DTYPE] // 8 + PAGE)
        factors = self._read_stored(scales, low, high - low, memory)

        return values.to(torch.float32).mul_(factors[block - low])

    def _read_stored(self, tensor: int, first: int, count: int, buffer: mmap.mmap) -> Tensor:
        dtype = TORCH_DTYPES[self.manifest.dtypes[tensor]]
        if tensor in self.manifest.pieces:
            for shard, offset, place, size in self._runs(tensor, first, count):
                at = memoryview(buffer)[place * dtype.itemsize : (place + size) * dtype.itemsize]
                self.shards[shard].fill(offset, at)
            return torch.frombuffer(buffer, dtype=dtype, count=count)

        file = self.shards[self.manifest.shard_ids[tensor]]
        offset = self.manifest.offsets[tensor] + first * dtype.itemsize
        # Direct reads put a byte at its offset in its page; items have to be aligned all the same.
        direct = file.is_cold(offset) and offset % dtype.itemsize == 0
        skip = offset % PAGE if direct else 0
        file.fill(offset, memoryview(buffer)[skip : skip + count * dtype.itemsize], direct=direct)

        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=skip)

    def _runs(self, tensor: int, first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield ``(shard, offset in its file, place among the elements, number of elements)`` of elements in pieces."""
        item, last = BITS[self.manifest.dtypes[tensor]] // 8, first + count
        for piece in self.manifest.pieces[tensor]:
            before = 0
            for begin, distance, length, runs in Box(piece.starts, piece.shape).rows(self.manifest.shapes[tensor]):
                # Only the runs that meet the wanted elements.
                low = max(0, (first - begin - length) // distance + 1)
                high = min(runs, (last - 1 - begin) // distance + 1)
                for k in range(low, high):
                    start = begin + k * distance
                    skip = max(0, first - start)
                    size = min(start + length, last) - start - skip
                    yield piece.shard, piece.offset + (before + k * length + skip) * item, start + skip - first, size
                before += runs * length


class _Comparison:
    """One run over pairs of tensors, which several threads share."""

    def __init__(self, a: _Side, b: _Side, pairs: Sequence[tuple[int, int]]) -> None:
        self._a, self._b = a, b
        self._pairs = pairs
        self._lock = threading.Lock()
        self.dtypes = [compared_as(a.dtype_of(i), b.dtype_of(j)) for i, j in pairs]
        self.elements = [math.prod(a.manifest.shapes[i]) for i, _ in pairs]
        self.found = [Found(0, 0 if dtype is torch.int64 else 0.0, 0.0) for _, dtype in self.dtypes]

    def steps(self) -> Iterator[_Step]:
        """Yield all elements, in steps for several threads."""
        for pair, (i, j) in enumerate(self._pairs):
            most = _STEP * 8 // max(BITS[self._a.dtype_of(i)], BITS[self._b.dtype_of(j)])
            for first in range(0, self.elements[pair], most):
                yield _Step(pair, first, min(most, self.elements[pair] - first))

    def run(self, steps: Iterator[_Step]) -> Iterator[int]:
        """Do steps on this thread, and yield the number of bytes read in each."""
        buffers = [mmap.mmap(-1, _STEP + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
        for pair, first, count in steps:
            i, j = self._pairs[pair]
            bits = BITS[self._a.manifest.dtypes[i]] + BITS[self._b.manifest.dtypes[j]]
            x, y = self._a.read(i, first, count, buffers[0]), self._b.read(j, first, count, buffers[1])
            if x.dtype != y.dtype or not _has_same_bytes(x, y):
                found = difference(x, y, self.dtypes[pair][1])
                with self._lock:
                    self.found[pair] = self.found[pair].joined(found)
            yield count * bits // 8


def compared_as(a: str, b: str) -> tuple[str, torch.dtype]:
    """Return the dtype that has the values of both, by name, and the one to compute with.

    Unsigned integers of 64 bits are in the bits of signed ones.
    """
    if a in _INTEGERS and b in _INTEGERS and not ("U64" in (a, b) and _SIGNED & {a, b}):
        return (a if a == b else "U64" if "U64" in (a, b) else "I64"), torch.int64
    if "C64" in (a, b):
        return "C64" if a == b else "C128", torch.complex128
    if "F64" in (a, b) or a in _INTEGERS or b in _INTEGERS:
        return "F64", torch.float64

    return a if a == b else "F32", torch.float32


def _has_same_bytes(x: Tensor, y: Tensor) -> bool:
    # As items of the widest size, so that there are few. As floats, a NaN would not equal itself.
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        if all(z.numel() * z.itemsize % dtype.itemsize == 0 == z.data_ptr() % dtype.itemsize for z in (x, y)):
            return torch.equal(x.view(torch.uint8).view(dtype), y.view(torch.uint8).view(dtype))

    raise AssertionError("any bytes are items of one byte")


def difference(x: Tensor, y: Tensor, dtype: torch.dtype) -> Found:
    """Return the difference of two vectors of equal length.

    :param dtype: the second result of :func:`compared_as`.
    """
    found = Found()
    for first in range(0, x.numel(), _ITEMS):
        part, other = x[first : first + _ITEMS], y[first : first + _ITEMS]
        if dtype is torch.int64:
            found = found.joined(_of_integers(part, other))
        else:
            found = found.joined(_of_finite(part, other, dtype) or _of_any(part, other, dtype))

    return found


def _of_finite(x: Tensor, y: Tensor, dtype: torch.dtype) -> Found | None:
    """Return the difference; ``None`` if an element or a difference is not finite."""
    x, y = x.to(dtype), y.to(dtype)
    apart = (x - y).abs()
    most = apart.max().item()
    if not math.isfinite(most):
        return None

    # Where both are zero, zero is divided by the smallest number instead.
    magnitude = torch.maximum(x.abs(), y.abs()).clamp_min_(math.ulp(0) if apart.itemsize == 8 else 2.0**-149)
    changed = int(torch.count_nonzero(apart))

    return Found(changed, most, apart.div_(magnitude).max().item() if changed else 0.0)


def _of_any(x: Tensor, y: Tensor, dtype: torch.dtype) -> Found:
    wide = dtype if dtype.is_complex else torch.float64
    x, y = x.to(wide), y.to(wide)
    same = (x == y) | (x.isnan() & y.isnan())
    apart = (x - y).abs().nan_to_num_(nan=math.inf, posinf=math.inf).masked_fill_(same, 0)
    share = (apart / torch.maximum(x.abs(), y.abs())).nan_to_num_(nan=math.inf, posinf=math.inf).masked_fill_(same, 0)

    return Found(int(torch.count_nonzero(~same)), apart.max().item(), share.max().item())


def _of_integers(x: Tensor, y: Tensor) -> Found:
    magnitude = torch.maximum(x.to(torch.float64).abs(), y.to(torch.float64).abs())
    unsigned = torch.uint64 in (x.dtype, y.dtype)
    x, y = _ordered(x, unsigned=unsigned), _ordered(y, unsigned=unsigned)
    # The difference fits into 64 bits without a sign; those of 2**63 and more look negative.
    apart = torch.maximum(x, y) - torch.minimum(x, y)
    changed = int(torch.count_nonzero(apart))
    if not changed:
        return Found(0, 0, 0.0)

    large = apart[apart < 0]
    most = int(large.max()) + (1 << 64) if len(large) else int(apart.max())
    size = apart.to(torch.float64) + (apart < 0) * 2.0**64

    return Found(changed, most, (size / magnitude.clamp_min_(1)).max().item())


def _ordered(x: Tensor, *, unsigned: bool) -> Tensor:
    """Return integers as signed ones of 64 bits, at the same distances."""
    x = x.view(torch.int64) if x.dtype is torch.uint64 else x.to(torch.int64)

    return x ^ _SIGN if unsigned else x
