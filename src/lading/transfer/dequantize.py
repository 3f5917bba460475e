"""The products of tensors with the scales of their blocks, in the memory that a load has filled."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lading.formats.manifest import BLOCK
from lading.planning.plan import Scaling
from lading.transfer.drive import busy, cores, drive
from lading.transfer.execute import single_threads

_ITEMS = 1 << 18
"""The most elements to multiply at once, but at least a row: they have to stay in a core's cache in float32."""


class _Step(NamedTuple):
    """Rows of a matrix that share the scales of one row of blocks."""

    scaling: int
    matrix: tuple[int, ...]
    """The index along the dims before the last two."""
    first: int
    rows: int


def dequantize(tensors: Sequence[Tensor], scalings: Sequence[Scaling], *, progress: bool = False) -> Sequence[Tensor]:
    """Multiply tensors by the scales of their blocks, in place, and return the tensors without the scales.

    A product is made in float32 and rounded once to the dtype of its tensor. The plain dtypes hold each float8 number
    exactly, so the result is the same as that of a product before the cast.

    :param tensors: the wanted tensors, contiguous; the last ones are the scales, one for each of ``scalings``.
    :param progress: show a bar on stderr.
    """
    if not scalings:
        return tensors
    own = tensors[: len(tensors) - len(scalings)]
    scales = tensors[len(own) :]
    total = sum(math.prod(scaling.selection.sizes) * own[scaling.wanted].itemsize for scaling in scalings)

    device = scales[0].device

    def run(steps: Iterator[_Step]) -> Iterator[int]:
        with torch.no_grad():
            for step in steps:
                scaling = scalings[step.scaling]
                yield _multiply(own[scaling.wanted], scaling, scales[step.scaling], step)
        if device.type != "cpu":  # the caller's stream may be another
            torch.get_device_module(device).synchronize(device)

    on_cpu = device.type == "cpu"
    with single_threads() as begin:
        drive(_steps(scalings), run, busy(cores(), total) if on_cpu else 1, total, "scale" if progress else None, begin)

    return own


def _steps(scalings: Sequence[Scaling]) -> Iterator[_Step]:
    for number, scaling in enumerate(scalings):
        *outer, rows, columns = scaling.selection.sizes
        start, step = scaling.selection.starts[-2], scaling.selection.steps[-2]
        most = max(1, _ITEMS // columns)
        for matrix in itertools.product(*map(range, outer)):
            first = 0
            while first < rows:
                left = BLOCK - (start + first * step) % BLOCK
                count = min(most, rows - first, -(-left // step))
                yield _Step(number, matrix, first, count)
                first += count


def _multiply(tensor: Tensor, scaling: Scaling, scales: Tensor, step: _Step) -> int:
    """Multiply the rows of a step; return their bytes."""
    selection, outer = scaling.selection, len(step.matrix)
    place = tensor.storage_offset() + selection.place + step.first * selection.strides[-2]
    place += sum(map(operator.mul, step.matrix, selection.strides[:outer]))
    columns = selection.sizes[-1]
    part = tensor.as_strided((step.rows, columns), selection.strides[-2:], place)

    (row, column), (down, across) = selection.starts[-2:], selection.steps[-2:]
    of_row = scales[tuple(map(operator.mul, step.matrix, selection.steps[:outer]))][
        (row + step.first * down) // BLOCK - row // BLOCK
    ]
    blocks = torch.arange(column, column + columns * across, across, device=scales.device) // BLOCK - column // BLOCK
    factors = of_row[blocks]
    if part.dtype == torch.float32:
        part.mul_(factors)
    else:
        part.copy_(part.to(torch.float32).mul_(factors))

    return part.numel() * part.itemsize
