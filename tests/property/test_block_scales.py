"""A part of scaled tensors equals the same part of their whole values, bit by bit, through any composition."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lading.checkpoints.checkpoint import path_checkpoint
from lading.models.tensors import read_tensors
from lading.planning.box import Box
from lading.planning.composition import (
    Joined,
    Regroup,
    Reordered,
    Sliced,
    Source,
    Stacked,
    Transposed,
    Unfolded,
    shape_of,
)
from tests.helpers.block_scaled import values
from tests.property.test_compose import compose, part_of

SIZES = st.one_of(st.integers(1, 20), st.integers(100, 300), st.sampled_from([127, 128, 129, 256, 257]))
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    starts = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(starts, tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, starts, strict=True)))


@st.composite
def sources(draw: st.DrawFn) -> tuple[Source, list[tuple[int, ...]]]:
    """A source of one or two matrices, or of a stack of them in one tensor."""
    rows, columns = draw(SIZES), draw(SIZES)
    kind = draw(st.sampled_from(["tensor", "joined", "stacked", "both", "reordered", "sliced", "experts", "folded"]))
    if kind == "experts":
        return 0, [(draw(st.integers(1, 3)), min(rows, 140), columns)]
    if kind == "folded":
        return draw(st.sampled_from([Transposed(0), Unfolded(2, 0), Transposed(Unfolded(2, 0))])), [(rows * 2, columns)]
    if kind == "reordered":
        dim = draw(st.sampled_from([0, 1]))
        shape = (rows * 2, columns) if dim == 0 else (rows, columns * 2)
        return Reordered(Regroup(dim, shape[dim] // 2, 2), 0), [shape]
    if kind == "sliced":
        dim = draw(st.sampled_from([0, 1]))
        size = (rows, columns)[dim]
        start = draw(st.integers(0, size - 1))
        return Sliced(dim, start, size - start, 0), [(rows, columns)]
    shapes = [(rows, columns)]
    if kind == "tensor":
        return 0, shapes
    shapes = [*shapes, (draw(SIZES), columns)] if kind != "stacked" else shapes * 2
    if kind == "joined":
        return Joined(0, (0, 1)), shapes
    return Stacked((0, 1) if kind == "stacked" else (Joined(0, (0, 1)), Joined(0, (1, 0)))), shapes


@given(case=sources(), data=st.data())
def test_a_part_of_scaled_tensors(case: tuple[Source, list[tuple[int, ...]]], data: st.DataObject) -> None:
    source, shapes = case
    box = data.draw(boxes(shape_of(source, shapes)))
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    float8 = data.draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    stored, plain = {}, []
    for i, shape in enumerate(shapes):
        numbers = torch.randn(shape, generator=generator).mul_(8).to(float8)
        scales = torch.randn((*shape[:-2], *(-(-n // 128) for n in shape[-2:])), generator=generator)
        stored |= {f"t{i}": numbers, f"t{i}_scale_inv": scales}
        plain.append(values(numbers, scales, DTYPES[dtype]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(stored, path)
        checkpoint = path_checkpoint(path, cache=Path(folder))
        place = {name: i for i, name in enumerate(checkpoint.manifest.names)}
        (found,) = read_tensors(checkpoint, [_renumbered(source, place)], [dtype], boxes=[box])

    assert torch.equal(found, part_of(compose(source, plain), box))


def _renumbered(source: Source, place: dict[str, int]) -> Source:
    if isinstance(source, int):
        return place[f"t{source}"]
    if isinstance(source, Reordered):
        return Reordered(source.order, _renumbered(source.source, place))
    if isinstance(source, Sliced):
        return Sliced(source.dim, source.start, source.size, _renumbered(source.source, place))
    if isinstance(source, Transposed):
        return Transposed(_renumbered(source.source, place))
    if isinstance(source, Unfolded):
        return Unfolded(source.count, _renumbered(source.source, place))
    parts = tuple(_renumbered(part, place) for part in source.parts)
    return Joined(source.dim, parts) if isinstance(source, Joined) else Stacked(parts)
