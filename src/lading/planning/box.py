"""Integer boxes: parts of tensors, as a start and a size along each dim.

A box without dims is a scalar and holds one element; a box with a size of zero along any dim is empty.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


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

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether the box lies within a tensor of shape ``shape``."""
        return len(shape) == len(self.sizes) and all(end <= n for end, n in zip(self.ends, shape, strict=True))

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
        if self.numel == 0:
            return

        # Dims after `split` are complete, so that one run covers all of them and a part of dim `split`.
        split = len(shape) - 1
        while split > 0 and self.sizes[split] == shape[split]:
            split -= 1

        strides = [1] * len(shape)
        for dim in range(len(shape) - 2, -1, -1):
            strides[dim] = strides[dim + 1] * shape[dim + 1]

        first = sum(start * stride for start, stride in zip(self.starts, strides, strict=True))
        length = self.sizes[split] * strides[split] if shape else 1
        outer = [(self.sizes[dim], strides[dim]) for dim in range(max(split, 0)) if self.sizes[dim] > 1]

        count, stride = outer.pop() if outer else (1, length)
        while outer and outer[-1][1] == count * stride:
            count *= outer.pop()[0]

        for steps in itertools.product(*(range(0, size * distance, distance) for size, distance in outer)):
            yield first + sum(steps), stride, length, count
