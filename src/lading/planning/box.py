"""Integer boxes: parts of tensors, as a start and a size along each dim.

A box without dims is a scalar and holds one element; a box with a size of zero along any dim is empty.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Box:
    """The part ``[start, start + size)`` of a tensor along each dim.

    :raises ValueError: a number is negative, or the number of starts and of sizes differs.
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.sizes):
            raise ValueError(f"a box needs as many starts as sizes, but got {self.starts} and {self.sizes}")
        if any(n < 0 for n in self.starts) or any(n < 0 for n in self.sizes):
            raise ValueError(f"starts and sizes must not be negative, but are {self.starts} and {self.sizes}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box that covers a tensor of shape ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    def empty(self) -> Box:
        """Return an empty box with the same dims; for a scalar, which is never empty, this box."""
        return Box((0,) * len(self.sizes), (0,) * len(self.sizes))

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.starts, self.sizes, strict=True))

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)

    def covers(self, shape: Sequence[int]) -> bool:
        """Return whether the box covers a tensor of shape ``shape``."""
        return self.sizes == tuple(shape) and not any(self.starts)

    def slabs(self, most: int) -> Iterator[Box]:
        """Yield boxes of at most ``most`` elements, but at least one index, along the first dim, in order."""
        if not self.sizes or self.numel == 0:
            yield self
            return
        count = max(1, most // math.prod(self.sizes[1:]))
        for first in range(0, self.sizes[0], count):
            yield Box((self.starts[0] + first, *self.starts[1:]), (min(count, self.sizes[0] - first), *self.sizes[1:]))

    def runs(self, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the box as runs ``(first element, number of elements)`` of the row-major tensor of shape ``shape``.

        The runs are ascending, do not touch, and are as few as possible: a box of whole rows is one run.
        """
        for first, stride, length, count in self.rows(shape):
            for i in range(count):
                yield first + i * stride, length

    def rows(self, shape: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
        """Yield the runs in groups of equal distances: ``(first element, distance between runs, elements per run,
        number of runs)``, all in elements. Some columns of a matrix are one group.
        """
        for first, distance, length, count, _, _ in Selection.of(self).rows(shape):
            yield first, distance, length, count


class Selection(NamedTuple):
    """A strided copy of the elements ``starts + i * steps`` of a source, for ``i`` below ``sizes``, along each dim."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    place: int
    """The position of the first element in the memory of the box, in elements."""
    strides: tuple[int, ...]
    """The stride of each dim of the source in that memory, in elements."""

    @classmethod
    def of(cls, box: Box) -> Selection:
        """Return the copy of the elements of ``box`` to memory of their own, row-major."""
        return cls(box.starts, box.sizes, (1,) * len(box.sizes), 0, _strides(box.sizes))

    def along(self, dim: int, first: int, count: int, start: int, step: int) -> Selection:
        """Return the ``count`` indices from ``first`` along ``dim``, as ``start``, ``start + step`` … of a part."""
        return Selection(
            (*self.starts[:dim], start, *self.starts[dim + 1 :]),
            (*self.sizes[:dim], count, *self.sizes[dim + 1 :]),
            (*self.steps[:dim], step, *self.steps[dim + 1 :]),
            self.place + first * self.strides[dim],
            self.strides,
        )

    def within(self, starts: Sequence[int], sizes: Sequence[int]) -> Selection:
        """Return the part of the copy that lies in a box of the source, as a copy from that box alone."""
        part = self
        for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            step = self.steps[dim]
            first = max(0, -(-(start - self.starts[dim]) // step))
            stop = min(self.sizes[dim], max(0, -(-(start + size - self.starts[dim]) // step)))
            part = part.along(dim, first, max(0, stop - first), self.starts[dim] + first * step - start, step)

        return part

    def rows(self, shape: Sequence[int]) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Yield the copy as runs, in groups of equal distances: ``(first element, distance between runs, elements per
        run, number of runs)`` in the tensor, then the first element and the distance in the memory.

        :param shape: the shape of the tensor.
        """
        if 0 in self.sizes:
            return

        own = _strides(tuple(shape))
        first = sum(map(operator.mul, self.starts, own))
        loops: list[tuple[int, int, int]] = []
        length = 1
        for dim in range(len(own) - 1, -1, -1):
            size, target = self.sizes[dim], self.strides[dim]
            if size == 1:
                continue
            distance = self.steps[dim] * own[dim]
            if not loops and distance == length == target:
                length *= size
            elif loops and (distance, target) == (loops[-1][0] * loops[-1][1], loops[-1][0] * loops[-1][2]):
                loops[-1] = (loops[-1][0] * size, *loops[-1][1:])
            else:
                loops.append((size, distance, target))

        # The runs of a group are side by side in memory if those of any loop are, as in a transposed matrix.
        inner = next((i for i, (_, _, target) in enumerate(loops) if target == length), 0)
        count, distance, apart = loops.pop(inner) if loops else (1, length, length)
        outer = loops[::-1]
        for at in itertools.product(*(range(size) for size, _, _ in outer)):
            begin, place = first, self.place
            for i, (_, stride, target) in zip(at, outer, strict=True):
                begin += i * stride
                place += i * target
            yield begin, distance, length, count, place, apart


@lru_cache(maxsize=1024)  # a model has many tensors of few shapes
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]

    return tuple(strides)
