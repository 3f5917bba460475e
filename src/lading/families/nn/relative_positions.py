"""Relative positions as embeddings of distances, as in Transformer-XL (https://arxiv.org/abs/1901.02860)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lading.families.nn.attention import split_heads
from lading.families.nn.positions import position_angles
from lading.families.nn.uninitialized import Linear


def embed_distances(length: int, dim: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Embed the distances between two of ``length`` frames, from the longest one forward → (2 * length - 1, dim).

    Sines and cosines alternate. They are computed in float32, whatever ``dtype``.
    """
    angles = position_angles(torch.arange(length - 1, -length, -1, device=device), dim // 2, divisor=dim // 2)

    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(dtype)


def align(scores: Tensor) -> Tensor:
    """Select the score of the distance between each query and key: (…, T, 2 T - 1), by distance → (…, T, T), by key."""
    length = scores.size(-2)

    # The scores that a query needs begin one column before those of the query above it. With a column more in front of
    # each row, the rows of the same memory that are one column shorter begin at these scores.
    shifted = pad(scores, (1, 0)).flatten(-2)[..., length:]

    return torch.unflatten(shifted, -1, (length, 2 * length - 1))[..., :length]


class PositionBias(nn.Module):
    """The biases of queries: ``u`` for their comparison to keys, ``v`` for that to distances; uninitialized."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()

        self.u = nn.Parameter(torch.empty(num_heads, head_dim))
        self.v = nn.Parameter(torch.empty(num_heads, head_dim))

    def forward(self) -> Tensor:
        """Return both, (2, num_heads * head_dim)."""
        return torch.stack((self.u.flatten(), self.v.flatten()))


class RelativePositions(nn.Module):
    """The scores of distances in attention; uninitialized."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()

        self.head_dim = head_dim

        self.projection = Linear(num_heads * head_dim, num_heads * head_dim, bias=False)
        self.bias = PositionBias(num_heads, head_dim)

    def forward(self, q: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Score the distances for queries (N, H, T, head_dim).

        :param distances: as :func:`embed_distances` returns them.

        :returns: the queries to compare keys with, and what to add to their scores, (N, H, T, T).
        """
        u, v = split_heads(self.bias()[:, None], self.head_dim)  # each (H, 1, head_dim)
        projected = split_heads(self.projection(distances)[None], self.head_dim)

        return q + u, align((q + v) @ projected.transpose(-1, -2)) * self.head_dim**-0.5
