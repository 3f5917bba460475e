"""How a parameter is made of the tensors of a checkpoint, as a value, and what a part of it needs of them. Pure.

A *source* is a tensor, by its position in the manifest; or sources that are joined along a dim, stacked along a new
one, or re-ordered or cut along one. It is never carried out on tensors: for a box of the parameter it gives pieces,
each a strided copy from one tensor to the memory of the box, so that a rank reads what its box needs and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from lading.errors import InternalError
from lading.planning.box import Box


@dataclass(frozen=True, slots=True)
class Regroup:
    """Along ``dim``, every group of ``rows × columns`` indices of the source is a matrix, and is transposed.

    Index ``i * columns + j`` of a group of the source is index ``j * rows + i`` of the same group of the parameter.
    With ``rows = head_dim // 2`` and ``columns = 2`` this is the way from rotary embeddings that turn neighbouring
    channels, as in Meta's LLaMA, to those that turn the two halves of a head, as in Hugging Face's.
    """

    dim: int
    rows: int
    columns: int

    @property
    def group(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Joined:
    """Sources that lie one after another along ``dim``."""

    dim: int
    parts: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Stacked:
    """Sources of one shape that lie one after another along a new first dim."""

    parts: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Reordered:
    """A source whose indices along a dim come in another order."""

    order: Regroup
    source: Source


@dataclass(frozen=True, slots=True)
class Sliced:
    """Of a source the ``size`` indices from ``start`` on along ``dim``."""

    dim: int
    start: int
    size: int
    source: Source


Source = int | Joined | Stacked | Reordered | Sliced


@dataclass(frozen=True, slots=True)
class Piece:
    """A strided copy: of a tensor the elements at ``starts + i * steps``, for ``i`` below ``sizes``, dim by dim."""

    tensor: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    place: int
    """Of the first element in the memory of the box, in elements."""
    strides: tuple[int, ...]
    """In that memory, of each dim of the tensor, in elements."""

    def rows(self, shape: Sequence[int]) -> Iterator[tuple[int, int, int, int, int, int]]:
        """The copy as runs, in groups of equal distances: ``(first element, elements from one run to the next, elements
        of a run, number of runs)``, all of the tensor, then the same first and distance in the memory.

        :param shape: of the tensor.
        """
        if 0 in self.sizes:
            return

        own = _strides(shape)
        first = sum(start * stride for start, stride in zip(self.starts, own, strict=True))
        loops: list[tuple[int, int, int]] = []
        length = 1
        for size, step, stride, target in zip(
            reversed(self.sizes), reversed(self.steps), reversed(own), reversed(self.strides), strict=True
        ):
            distance = step * stride
            if size == 1:
                continue
            if not loops and distance == length == target:
                length *= size
            elif loops and (distance, target) == (loops[-1][0] * loops[-1][1], loops[-1][0] * loops[-1][2]):
                loops[-1] = (loops[-1][0] * size, *loops[-1][1:])
            else:
                loops.append((size, distance, target))

        (count, distance, apart), *outer = loops or [(1, length, length)]
        outer.reverse()
        for at in product(*(range(size) for size, _, _ in outer)):
            begin, place = first, self.place
            for i, (_, stride, target) in zip(at, outer, strict=True):
                begin += i * stride
                place += i * target
            yield begin, distance, length, count, place, apart


def tensors_of(source: Source) -> Iterator[int]:
    """The positions of all tensors that ``source`` is made of."""
    if isinstance(source, int):
        yield source
    elif isinstance(source, Reordered | Sliced):
        yield from tensors_of(source.source)
    else:
        for part in source.parts:
            yield from tensors_of(part)


def shape_of(source: Source, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what ``source`` makes.

    :param shapes: of the tensors of the manifest.

    :raises ValueError: its parts do not fit together; says why.
    """
    if isinstance(source, int):
        return shapes[source]
    if isinstance(source, Reordered):
        shape, order = shape_of(source.source, shapes), source.order
        if order.dim >= len(shape) or shape[order.dim] % order.group:
            raise ValueError(f"{list(shape)} has no groups of {order.group} along dim {order.dim}")
        return shape
    if isinstance(source, Sliced):
        shape, dim = shape_of(source.source, shapes), source.dim
        if dim >= len(shape) or source.start + source.size > shape[dim]:
            raise ValueError(f"{list(shape)} has no {source.size} indices from {source.start} on along dim {dim}")
        return (*shape[:dim], source.size, *shape[dim + 1 :])

    parts = [shape_of(part, shapes) for part in source.parts]
    if isinstance(source, Stacked):
        if len(set(parts)) != 1:
            raise ValueError(f"tensors of the shapes {_some(parts)} cannot be stacked")
        return (len(parts), *parts[0])

    dim = source.dim
    if any(len(shape) <= dim for shape in parts) or len({(*s[:dim], *s[dim + 1 :]) for s in parts}) != 1:
        raise ValueError(f"tensors of the shapes {_some(parts)} cannot be joined along dim {dim}")

    return (*parts[0][:dim], sum(shape[dim] for shape in parts), *parts[0][dim + 1 :])


def pieces(source: Source, shapes: Sequence[tuple[int, ...]], box: Box) -> Iterator[Piece]:
    """The copies that fill the memory of ``box``, which is contiguous and row-major, each element once.

    :param shapes: of the tensors of the manifest.
    :param box: within the shape of ``source``.
    """
    need = _Need(box.starts, box.sizes, (1,) * len(box.sizes), 0, tuple(_strides(box.sizes)))

    yield from _walk(source, shapes, need)


@dataclass(frozen=True, slots=True)
class _Need:
    """What is needed of a source, in its own indices; the fields mean what they mean in a piece."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    place: int
    strides: tuple[int, ...]

    def along(self, dim: int, first: int, count: int, start: int, step: int) -> _Need:
        """The ``count`` indices from the ``first`` on along ``dim``, which are ``start``, ``start + step`` … below."""
        return _Need(
            (*self.starts[:dim], start, *self.starts[dim + 1 :]),
            (*self.sizes[:dim], count, *self.sizes[dim + 1 :]),
            (*self.steps[:dim], step, *self.steps[dim + 1 :]),
            self.place + first * self.strides[dim],
            self.strides,
        )


def _walk(source: Source, shapes: Sequence[tuple[int, ...]], need: _Need) -> Iterator[Piece]:
    if 0 in need.sizes:
        return
    if isinstance(source, int):
        yield Piece(source, need.starts, need.sizes, need.steps, need.place, need.strides)
    elif isinstance(source, Joined):
        for part, inner in _joined(source, shapes, need):
            yield from _walk(part, shapes, inner)
    elif isinstance(source, Stacked):
        for i in range(need.sizes[0]):
            part = source.parts[need.starts[0] + i * need.steps[0]]
            place = need.place + i * need.strides[0]
            inner = _Need(need.starts[1:], need.sizes[1:], need.steps[1:], place, need.strides[1:])
            yield from _walk(part, shapes, inner)
    elif isinstance(source, Sliced):
        dim = source.dim
        start = need.starts[dim] + source.start
        yield from _walk(source.source, shapes, need.along(dim, 0, need.sizes[dim], start, need.steps[dim]))
    else:
        for inner in _reordered(source.order, need):
            yield from _walk(source.source, shapes, inner)


def _joined(source: Joined, shapes: Sequence[tuple[int, ...]], need: _Need) -> Iterator[tuple[Source, _Need]]:
    dim = source.dim
    start, step, end = need.starts[dim], need.steps[dim], 0
    done = 0
    for part in source.parts:
        begin, end = end, end + shape_of(part, shapes)[dim]
        # Those of the remaining indices that lie before the end of this part.
        count = min(need.sizes[dim], max(0, -(-(end - start) // step))) - done
        if count > 0:
            yield part, need.along(dim, done, count, start + done * step - begin, step)
            done += count


def _reordered(order: Regroup, need: _Need) -> Iterator[_Need]:
    dim = order.dim
    start, size, step = need.starts[dim], need.sizes[dim], need.steps[dim]
    if step != 1:
        raise InternalError("a source that is re-ordered twice along one dim")

    first = 0
    while first < size:
        # Up to the end of a column of the group, the indices of the source are `columns` apart.
        group, within = divmod(start + first, order.group)
        column, row = divmod(within, order.rows)
        count = min(size - first, order.rows - row)
        yield need.along(dim, first, count, group * order.group + row * order.columns + column, order.columns)
        first += count


def _strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]

    return strides


def _some(shapes: Sequence[tuple[int, ...]]) -> str:
    distinct = list(dict.fromkeys(shapes))

    return ", ".join(str(list(shape)) for shape in distinct[:4]) + (" …" if len(distinct) > 4 else "")
