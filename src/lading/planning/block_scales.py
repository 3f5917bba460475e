"""Scales of blocks: a tensor whose values are products with one number for each block of the last two dims. Pure.

A load reads the box of such a tensor, and the scales of the blocks that the box touches. Both are entries of what is
wanted; the products are made in memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from lading.formats.manifest import BLOCK, SCALE_SUFFIX, Manifest
from lading.planning.box import Box, Selection
from lading.planning.composition import pieces
from lading.planning.plan import Scaling, Wanted
from lading.planning.rules import Rule

SCALES_RULE = Rule(f"{{name*}}{SCALE_SUFFIX}", None, computed=True)
"""The rule of the tensors with scales, which belong to another tensor and make no parameter of their own."""

SCALE_DTYPE = "F32"
"""The dtype of scales, in which the products are made."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor of two dims or more."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def misfits_of_scales(manifest: Manifest, tensor: int) -> list[str]:
    """Return how the scales of a tensor are not as they should be, one line each; nothing for one without scales."""
    if (scales := manifest.scales.get(tensor)) is None:
        return []

    name, shape, dtype = manifest.names[scales], manifest.shapes[scales], manifest.dtypes[scales]
    found: list[str] = []
    if shape != (expected := scale_shape(manifest.shapes[tensor])):
        found.append(f"mis-shaped: {name} is expected to be {list(expected)}, but is {list(shape)}")
    if dtype != SCALE_DTYPE:
        found.append(f"of another dtype: {name} is expected to be {SCALE_DTYPE}, but is {dtype}")

    return found


def touched_blocks(selection: Selection) -> Box:
    """Return the box of the scales of all blocks that a part of a tensor touches; the part is not empty."""
    return _touched(selection.starts, selection.sizes, selection.steps)


@lru_cache(maxsize=1024)  # a model has many tensors of few shapes
def _touched(firsts: tuple[int, ...], counts: tuple[int, ...], steps: tuple[int, ...]) -> Box:
    sizes = (*(1,) * (len(counts) - 2), BLOCK, BLOCK)
    starts, ends = [], []
    for first, count, step, size in zip(firsts, counts, steps, sizes, strict=True):
        starts.append(first // size)
        ends.append((first + (count - 1) * step) // size + 1)

    return Box(tuple(starts), tuple(end - start for start, end in zip(starts, ends, strict=True)))


def blocks_of(box: Box) -> Box:
    """Return the box of the scales of the blocks that ``box`` touches; an empty one for an empty box."""
    return touched_blocks(Selection.of(box)) if box.numel else box.empty()


def with_scales(manifest: Manifest, wanted: Wanted) -> Wanted:
    """Return what is wanted with the scales that it needs: an entry for each of its ``scalings``, behind all others."""
    if not manifest.scales:
        return wanted

    scalings: list[Scaling] = []
    tensors: list[int] = []
    for i, (tensor, box) in enumerate(zip(wanted.tensors, wanted.boxes, strict=True)):
        if i in wanted.composed:
            parts = list(pieces(wanted.composed[i], manifest.shapes, box))
        else:
            parts = [(tensor, Selection.of(box))] if box.numel else []
        for part, selection in parts:
            if (scales := manifest.scales.get(part)) is not None:
                scalings.append(Scaling(i, selection))
                tensors.append(scales)

    return replace(
        wanted,
        tensors=[*wanted.tensors, *tensors],
        boxes=[*wanted.boxes, *(touched_blocks(scaling.selection) for scaling in scalings)],
        dtypes=[*wanted.dtypes, *[SCALE_DTYPE] * len(scalings)],
        scalings=scalings,
    )
