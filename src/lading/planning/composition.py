"""Compositions: values that describe how the tensors of a checkpoint make a parameter. Pure.

A *source* is a tensor, by its position in the manifest, or sources that are joined along a dim, stacked along a new
dim, reordered or sliced along a dim, unfolded or transposed. It is never executed on tensors: for a box of the
parameter it yields pieces, each a strided copy from one tensor to the memory of the box, so that a rank reads the bytes
of its box and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lading.errors import InternalError
from lading.planning.box import Box, Selection


@dataclass(frozen=True, slots=True)
class Regroup:
    """A reordering along ``dim`` that transposes every group of ``rows × columns`` indices, seen as a matrix.

    Index ``i * columns + j`` of a group of the source is index ``j * rows + i`` of the same group of the parameter.
    ``rows = head_dim // 2`` and ``columns = 2`` convert rotary embeddings that rotate adjacent channels, as Meta's
    LLaMA does, to those that rotate the two halves of a head, as Hugging Face's does.
    """

    dim: int
    rows: int
    columns: int

    @property
    def group(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Joined:
    """Sources concatenated along ``dim``."""

    dim: int
    parts: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Stacked:
    """Sources of one shape, stacked along a new first dim."""

    parts: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Reordered:
    """A source with its indices along a dim in another order."""

    order: Regroup
    source: Source


@dataclass(frozen=True, slots=True)
class Sliced:
    """A slice of a source: ``size`` indices from ``start`` along ``dim``."""

    dim: int
    start: int
    size: int
    source: Source


@dataclass(frozen=True, slots=True)
class Unfolded:
    """A source whose first dim is divided, into ``count`` parts: (count * N, …) as (count, N, …)."""

    count: int
    source: Source


@dataclass(frozen=True, slots=True)
class Transposed:
    """A source with its last two dims exchanged."""

    source: Source


Source = int | Joined | Stacked | Reordered | Sliced | Unfolded | Transposed


def tensors_of(source: Source) -> Iterator[int]:
    """Yield the positions of all tensors in ``source``."""
    if isinstance(source, int):
        yield source
    elif isinstance(source, Joined | Stacked):
        for part in source.parts:
            yield from tensors_of(part)
    else:
        yield from tensors_of(source.source)


def with_tensors(source: Source, number: Callable[[int], int]) -> Source:
    """Return ``source`` with the tensor at each position ``i`` replaced by the one at ``number(i)``."""
    if isinstance(source, int):
        return number(source)
    if isinstance(source, Joined | Stacked):
        return replace(source, parts=tuple(with_tensors(part, number) for part in source.parts))

    return replace(source, source=with_tensors(source.source, number))


def shape_of(source: Source, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of ``source``.

    :param shapes: the shapes of the tensors of the manifest.
    :raises ValueError: the parts of ``source`` do not fit together.
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
    if isinstance(source, Unfolded):
        shape = shape_of(source.source, shapes)
        if not shape or shape[0] % source.count:
            raise ValueError(f"{list(shape)} has no {source.count} equal parts along dim 0")
        return (source.count, shape[0] // source.count, *shape[1:])
    if isinstance(source, Transposed):
        shape = shape_of(source.source, shapes)
        if len(shape) < 2:
            raise ValueError(f"{list(shape)} has no two dims to exchange")
        return (*shape[:-2], shape[-1], shape[-2])

    parts = [shape_of(part, shapes) for part in source.parts]
    if isinstance(source, Stacked):
        if len(set(parts)) != 1:
            raise ValueError(f"tensors of the shapes {_format_shapes(parts)} cannot be stacked")
        return (len(parts), *parts[0])

    dim = source.dim
    if any(len(shape) <= dim for shape in parts) or len({(*s[:dim], *s[dim + 1 :]) for s in parts}) != 1:
        raise ValueError(f"tensors of the shapes {_format_shapes(parts)} cannot be joined along dim {dim}")

    return (*parts[0][:dim], sum(shape[dim] for shape in parts), *parts[0][dim + 1 :])


def cut(source: Source, shapes: Sequence[tuple[int, ...]], box: Box) -> Source:
    """Return the source of a box of ``source``: one of its parts, where the box is just that.

    :param shapes: the shapes of the tensors of the manifest.
    """
    whole = shape_of(source, shapes)
    if box.covers(whole):
        return source
    if isinstance(source, Stacked) and box.sizes[0] == 1:
        return cut(source.parts[box.starts[0]], shapes, Box(box.starts[1:], box.sizes[1:]))
    if isinstance(source, Joined):
        dim, begin = source.dim, 0
        for part in source.parts:
            size = shape_of(part, shapes)[dim]
            if (box.starts[dim], box.sizes[dim]) == (begin, size):
                return cut(part, shapes, Box((*box.starts[:dim], 0, *box.starts[dim + 1 :]), box.sizes))
            begin += size

    for dim, (start, size) in enumerate(zip(box.starts, box.sizes, strict=True)):
        if size < whole[dim]:
            source = Sliced(dim, start, size, source)

    return source


def pieces(source: Source, shapes: Sequence[tuple[int, ...]], box: Box) -> Iterator[tuple[int, Selection]]:
    """Yield the tensors, and the copies of them that fill the memory of ``box``, row-major, each element once.

    :param shapes: the shapes of the tensors of the manifest.
    :param box: a box within the shape of ``source``.
    """
    yield from _walk(source, shapes, Selection.of(box))


def _walk(source: Source, shapes: Sequence[tuple[int, ...]], selection: Selection) -> Iterator[tuple[int, Selection]]:
    if 0 in selection.sizes:
        return
    if isinstance(source, int):
        yield source, selection
    elif isinstance(source, Joined):
        for part, inner in _joined(source, shapes, selection):
            yield from _walk(part, shapes, inner)
    elif isinstance(source, Stacked):
        for i in range(selection.sizes[0]):
            part = source.parts[selection.starts[0] + i * selection.steps[0]]
            place = selection.place + i * selection.strides[0]
            inner = Selection(
                selection.starts[1:], selection.sizes[1:], selection.steps[1:], place, selection.strides[1:]
            )
            yield from _walk(part, shapes, inner)
    elif isinstance(source, Sliced):
        dim = source.dim
        start = selection.starts[dim] + source.start
        yield from _walk(
            source.source, shapes, selection.along(dim, 0, selection.sizes[dim], start, selection.steps[dim])
        )
    elif isinstance(source, Unfolded):
        for inner in _unfolded(shape_of(source, shapes)[1], selection):
            yield from _walk(source.source, shapes, inner)
    elif isinstance(source, Transposed):
        starts, sizes, steps, place, strides = selection
        swapped = ((*of[:-2], of[-1], of[-2]) for of in (starts, sizes, steps, strides))
        starts, sizes, steps, strides = swapped
        yield from _walk(source.source, shapes, Selection(starts, sizes, steps, place, strides))
    else:
        for inner in _reordered(source.order, selection):
            yield from _walk(source.source, shapes, inner)


def _joined(
    source: Joined, shapes: Sequence[tuple[int, ...]], selection: Selection
) -> Iterator[tuple[Source, Selection]]:
    dim = source.dim
    start, step, end = selection.starts[dim], selection.steps[dim], 0
    done = 0
    for part in source.parts:
        begin, end = end, end + shape_of(part, shapes)[dim]
        # Count the remaining indices before the end of this part.
        count = min(selection.sizes[dim], max(0, -(-(end - start) // step))) - done
        if count > 0:
            yield part, selection.along(dim, done, count, start + done * step - begin, step)
            done += count


def _unfolded(length: int, selection: Selection) -> Iterator[Selection]:
    """Yield the parts of ``selection`` at each index of the first dim, whose ``length`` the second has."""
    for i in range(selection.sizes[0]):
        start = (selection.starts[0] + i * selection.steps[0]) * length + selection.starts[1]
        place = selection.place + i * selection.strides[0]
        yield Selection(
            (start, *selection.starts[2:]), selection.sizes[1:], selection.steps[1:], place, selection.strides[1:]
        )


def _reordered(order: Regroup, selection: Selection) -> Iterator[Selection]:
    dim = order.dim
    start, size, step = selection.starts[dim], selection.sizes[dim], selection.steps[dim]
    if step != 1:
        raise InternalError("a source is reordered twice along one dim")

    first = 0
    while first < size:
        # Until the end of a column of the group, the indices of the source are `columns` apart.
        group, within = divmod(start + first, order.group)
        column, row = divmod(within, order.rows)
        count = min(size - first, order.rows - row)
        yield selection.along(dim, first, count, group * order.group + row * order.columns + column, order.columns)
        first += count


def _format_shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    distinct = list(dict.fromkeys(shapes))

    return ", ".join(str(list(shape)) for shape in distinct[:4]) + (" …" if len(distinct) > 4 else "")
