"""Sinusoidal positions (https://arxiv.org/abs/1706.03762, section 3.5), in the form of tensor2tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout


def position_angles(positions: Tensor, half: int, *, divisor: int) -> Tensor:
    """Multiply positions (…) by ``half`` frequencies, ``10_000 ** (-i / divisor)`` → (…, half), float32."""
    steps = torch.arange(half, dtype=torch.float32, device=positions.device)

    return positions.float()[..., None] * torch.exp(steps * (-math.log(10_000.0) / divisor))


def sinusoids(position_ids: Tensor, dim: int) -> Tensor:
    """Return the encodings of positions (N, S) → (N, S, dim), float32: all sines, then all cosines.

    :param dim: an even number, 4 or more.
    """
    angles = position_angles(position_ids, dim // 2, divisor=dim // 2 - 1)

    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class SinusoidalPositions(nn.Module):
    """The inputs of a stack: scaled vectors and their positions.

    The encodings are computed as they are needed, in float32, without a table or a longest sequence.

    :param first: the position of the first vector that is not padding.
    """

    def __init__(self, dim: int, *, first: int, dropout_p: float) -> None:
        super().__init__()

        self.scale = dim**0.5
        self.first = first
        self.dropout_p = dropout_p

    def forward(self, x: Tensor, padding: Tensor | None = None, *, past: int = 0) -> Tensor:
        """Scale (N, S, dim) and add positions → the same shape.

        :param padding: bool, (N, past + S); false for padding, which has no position of its own.
        :param past: the number of vectors before these.
        """
        if padding is None:
            position_ids = torch.arange(past, past + x.size(1), device=x.device)[None]
        else:
            position_ids = (padding.long().cumsum(1)[:, past:] - 1).clamp(min=0)
        encodings = sinusoids(position_ids + self.first, x.size(2))

        return dropout(((x * self.scale).float() + encodings).to(x.dtype), self.dropout_p, self.training)
