"""Executing a plan of what is composed equals loading whole tensors, composing them, and slicing."""

from __future__ import annotations

import tempfile
from array import array
from collections import Counter
from itertools import product
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from lading.formats.manifest import BITS, Manifest, Shard
from lading.planning.box import Box, Selection
from lading.planning.composition import (
    Joined,
    Regroup,
    Reordered,
    Sliced,
    Source,
    Stacked,
    Transposed,
    Unfolded,
    pieces,
    shape_of,
    tensors_of,
)
from lading.planning.plan import ARENA, Wanted, plan
from lading.planning.rules import Rule, route
from lading.system.filesystem import FileStat
from lading.transfer.dtypes import TORCH_DTYPES
from lading.transfer.execute import execute
from lading.transfer.files import ShardFile

Shape = tuple[int, ...]


@st.composite
def sources(draw: st.DrawFn, shape: Shape, shapes: list[Shape], depth: int = 3, ordered: bool = True) -> Source:
    """A source that makes ``shape``; the shapes of its tensors are added to ``shapes``."""
    kinds = ["tensor"]
    if depth and shape:
        kinds += ["joined", "sliced"]
        kinds += ["stacked"] if shape[0] else []
        kinds += ["reordered"] if ordered else []
        kinds += ["transposed"] if len(shape) > 1 else []
        kinds += ["unfolded"] if len(shape) > 1 and shape[0] else []
    kind = draw(st.sampled_from(kinds))
    if kind == "joined":
        dim = draw(st.integers(0, len(shape) - 1))
        cuts = sorted(draw(st.lists(st.integers(0, shape[dim]), max_size=3)))
        parts = []
        for a, b in zip([0, *cuts], [*cuts, shape[dim]], strict=True):
            parts.append(draw(sources((*shape[:dim], b - a, *shape[dim + 1 :]), shapes, depth - 1, ordered)))
        return Joined(dim, tuple(parts))
    if kind == "stacked":
        return Stacked(tuple(draw(sources(shape[1:], shapes, depth - 1, ordered)) for _ in range(shape[0])))
    if kind == "reordered":
        dim = draw(st.integers(0, len(shape) - 1))
        group = draw(st.sampled_from([n for n in range(1, max(shape[dim], 1) + 1) if shape[dim] % n == 0]))
        rows = draw(st.sampled_from([n for n in range(1, group + 1) if group % n == 0]))
        inner = draw(sources(shape, shapes, depth - 1, ordered=False))
        return Reordered(Regroup(dim, rows, group // rows), inner)
    if kind == "sliced":
        dim = draw(st.integers(0, len(shape) - 1))
        start, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        whole = (*shape[:dim], start + shape[dim] + after, *shape[dim + 1 :])
        # What is cut may be re-ordered, if what makes it is not.
        return Sliced(dim, start, shape[dim], draw(sources(whole, shapes, depth - 1, ordered)))
    if kind == "transposed":
        return Transposed(draw(sources((*shape[:-2], shape[-1], shape[-2]), shapes, depth - 1, ordered)))
    if kind == "unfolded":
        folded = (shape[0] * shape[1], *shape[2:])
        return Unfolded(shape[0], draw(sources(folded, shapes, depth - 1, ordered)))
    shapes.append(shape)
    return len(shapes) - 1


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    if draw(st.booleans()):
        return Box.whole(shape)
    starts = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(starts, tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, starts, strict=True)))


SHAPES = st.lists(st.integers(0, 8), max_size=3).map(tuple)


@st.composite
def compositions(draw: st.DrawFn) -> tuple[Source, list[Shape], Box]:
    shapes: list[Shape] = []
    shape = draw(SHAPES)
    source = draw(sources(shape, shapes))
    assert shape_of(source, shapes) == shape
    return source, shapes, draw(boxes(shape))


def compose(source: Source, tensors: list[torch.Tensor]) -> torch.Tensor:
    """What the values mean, carried out."""
    if isinstance(source, int):
        return tensors[source]
    if isinstance(source, Joined):
        return torch.cat([compose(part, tensors) for part in source.parts], source.dim)
    if isinstance(source, Stacked):
        return torch.stack([compose(part, tensors) for part in source.parts])
    if isinstance(source, Sliced):
        return compose(source.source, tensors).narrow(source.dim, source.start, source.size)
    if isinstance(source, Transposed):
        return compose(source.source, tensors).transpose(-1, -2)
    if isinstance(source, Unfolded):
        value = compose(source.source, tensors)
        return value.reshape(source.count, len(value) // source.count, *value.shape[1:])
    order, value = source.order, compose(source.source, tensors)
    shape = value.shape
    groups = (*shape[: order.dim], shape[order.dim] // order.group, order.rows, order.columns, *shape[order.dim + 1 :])
    return value.reshape(groups).transpose(order.dim + 1, order.dim + 2).reshape(shape)


def part_of(value: torch.Tensor, box: Box) -> torch.Tensor:
    return value[tuple(slice(a, b) for a, b in zip(box.starts, box.ends, strict=True))].contiguous()


def _elements(piece: Selection) -> Counter[int]:
    """Where in memory the elements of a piece go."""
    places = (
        piece.place + sum(i * stride for i, stride in zip(at, piece.strides, strict=True))
        for at in product(*map(range, piece.sizes))
    )
    return Counter(places)


@given(compositions())
def test_pieces_fill_the_memory_of_a_box_once(case: tuple[Source, list[Shape], Box]) -> None:
    source, shapes, box = case
    filled: Counter[int] = Counter()
    for tensor, piece in pieces(source, shapes, box):
        filled += _elements(piece)
        last = [s + (n - 1) * step for s, n, step in zip(piece.starts, piece.sizes, piece.steps, strict=True)]
        assert all(0 <= at < n for at, n in zip(last, shapes[tensor], strict=True))
    assert filled == Counter(range(box.numel))


@given(compositions())
def test_rows_are_the_elements_of_a_piece_in_the_order_of_the_memory(case: tuple[Source, list[Shape], Box]) -> None:
    source, shapes, box = case
    tensors = [torch.arange(Box.whole(s).numel).reshape(s) + 10_000 * i for i, s in enumerate(shapes)]
    memory = torch.full((box.numel,), -1)
    for tensor, piece in pieces(source, shapes, box):
        flat = tensors[tensor].reshape(-1)
        for first, stride, length, count, place, apart in piece.rows(shapes[tensor]):
            for k in range(count):
                begin, target = first + k * stride, place + k * apart
                memory[target : target + length] = flat[begin : begin + length]
    assert torch.equal(memory.reshape(box.sizes), part_of(compose(source, tensors), box))


def _checkpoint(
    folder: Path, shapes: list[Shape], dtypes: list[str], skips: list[int]
) -> tuple[Manifest, list[ShardFile], list[torch.Tensor]]:
    """The tensors in three files, with gaps of ``skips`` bytes before each of them."""
    tensors = [
        torch.arange(1, Box.whole(shape).numel + 1).add(i).to(TORCH_DTYPES[dtype]).reshape(shape)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    shard_ids = array("I", sorted(i % 3 for i in range(len(shapes))))
    files, offsets = [bytearray(7) for _ in range(3)], array("q")
    for tensor, shard, skip in zip(tensors, shard_ids, skips, strict=True):
        files[shard] += bytes(skip)
        offsets.append(len(files[shard]))
        files[shard] += tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    opened = []
    for i, data in enumerate(files):
        path = folder / str(i)
        path.write_bytes(data)
        opened.append(ShardFile(path=path, stat=FileStat.from_stat(path.stat())))
    manifest = Manifest(
        format="safetensors",
        shards=tuple(Shard(name=str(i), size=len(data)) for i, data in enumerate(files)),
        names=[f"t{i}" for i in range(len(shapes))],
        dtypes=dtypes,
        shapes=shapes,
        shard_ids=shard_ids,
        offsets=offsets,
    )
    return manifest, opened, tensors


@given(st.data(), st.booleans())
def test_executing_equals_composing_and_slicing(data: st.DataObject, mapped: bool) -> None:
    shapes: list[Shape] = []
    wanted_sources = [data.draw(sources(data.draw(SHAPES), shapes)) for _ in range(data.draw(st.integers(1, 3)))]
    dtypes = [data.draw(st.sampled_from(["BF16", "F32"])) for _ in shapes]
    skips = [data.draw(st.integers(0, 9)) for _ in shapes]
    memory = [data.draw(st.sampled_from(["BF16", "F32"])) for _ in wanted_sources]

    with tempfile.TemporaryDirectory() as folder:
        manifest, files, tensors = _checkpoint(Path(folder), shapes, dtypes, skips)
        parts = [data.draw(boxes(shape_of(source, shapes))) for source in wanted_sources]
        wanted = Wanted(
            tensors=[next(tensors_of(source), 0) for source in wanted_sources],
            boxes=parts,
            dtypes=memory,
            composed={i: source for i, source in enumerate(wanted_sources) if not isinstance(source, int)},
        )
        planned = plan(manifest, wanted, mapped=mapped)
        found = execute(planned, files, list(zip([b.sizes for b in parts], memory, strict=True)))
        for source, box, dtype, tensor in zip(wanted_sources, parts, memory, found, strict=True):
            whole = compose(source, [t.to(TORCH_DTYPES[dtype]) for t in tensors])
            assert tensor.dtype == TORCH_DTYPES[dtype]
            assert torch.equal(tensor, part_of(whole, box))

    # Nothing is read but what is wanted, gaps apart, and no two reads fill one place.
    filled: Counter[int] = Counter()
    for size, target, cast in zip(planned.sizes, planned.targets, planned.casts, strict=True):
        before, after = (BITS[d] if d else 8 for d in planned.conversions[cast])
        filled.update(range(target, target + size * after // before))
    rows = planned.rows
    for length, count, target, cast in zip(rows.lengths, rows.counts, rows.targets, rows.casts, strict=True):
        before, after = (BITS[d] if d else 8 for d in planned.conversions[cast])
        filled.update(range(target, target + count * length * after // before))
    assert max(filled.values(), default=1) == 1
    in_arena = sum(
        box.numel * BITS[dtype] // 8
        for box, dtype, home in zip(parts, memory, planned.homes, strict=True)
        if home == ARENA
    )
    assert filled.total() == in_arena


@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_the_parts_of_ranks_make_the_tensor_that_they_were_cut_from(
    data: st.DataObject, tp: int, sdp: int, ordered: bool
) -> None:
    """Cut as tensor parallelism and then FSDP do, whichever dim it was: the shape of the target tells."""
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2).map(lambda s: tuple(8 * n for n in s)))
    dim = data.draw(st.sampled_from([*range(len(shape)), None]))
    value = torch.arange(Box.whole(shape).numel).reshape(shape)
    parts = {}
    for i, part in enumerate([value] * tp if dim is None else torch.chunk(value, tp, dim)):
        for j, piece in enumerate(torch.chunk(part, sdp)):
            parts[f"w#{i}.{j}"] = piece
    order = Regroup(0, 4, 2) if ordered else None
    names = data.draw(st.permutations(list(parts)))
    tensors = [parts[name] for name in names]
    shapes = [tuple(tensor.shape) for tensor in tensors]

    routed = route(names, ["p"], [Rule("w", "p", order=order)], shapes=shapes, target_shapes=[shape])
    assert not routed.incomplete
    assert not routed.missing
    source = routed.composed.get(0, routed.tensors[0])
    expected = value if order is None else compose(Reordered(order, 0), [value])
    assert torch.equal(compose(source, tensors), expected)
