from __future__ import annotations

import math
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from lading.planning.box import Box


@st.composite
def shapes_and_boxes(draw: st.DrawFn, max_dims: int = 4) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=max_dims)))
    starts = tuple(draw(st.integers(0, n)) for n in shape)
    sizes = tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, starts, strict=True))
    return shape, Box(starts, sizes)


@given(shapes_and_boxes())
def test_runs_are_the_elements_of_the_slice_in_order(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    tensor = torch.arange(math.prod(shape)).view(shape)
    sliced = tensor[tuple(slice(a, b) for a, b in zip(box.starts, box.ends, strict=True))]

    runs = list(box.runs(shape))

    assert [i for first, count in runs for i in range(first, first + count)] == sliced.flatten().tolist()
    assert all(a + n < b for (a, n), (b, _) in pairwise(runs)), "runs that touch are one run"
