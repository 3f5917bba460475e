"""Rotary position embeddings in the layout of Hugging Face checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lading.families.nn.rope_scaling import Scaling


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary position embedding (https://arxiv.org/abs/2104.09864)."""

    inv_freq: Tensor
    """The frequencies (head_dim / 2), always float32: in half precision distant positions coincide."""

    def __init__(self, head_dim: int, *, theta: float, scaling: Scaling | None = None) -> None:
        super().__init__()

        self.head_dim = head_dim
        self.theta = theta
        self.scaling = scaling

        self.register_buffer("inv_freq", torch.empty(head_dim // 2, dtype=torch.float32), persistent=False)
        self.reset_non_persistent_buffers(self.inv_freq.device)

    def reset_non_persistent_buffers(self, device: torch.device | str) -> None:
        """Recompute the frequencies and place them on ``device``."""
        if torch.device(device).type == "meta":
            self.inv_freq = torch.empty(self.head_dim // 2, dtype=torch.float32, device="meta")
        else:
            # On the CPU first, so that all devices hold the same bits.
            self.inv_freq = self._frequencies().to(device)

    def _frequencies(self) -> Tensor:
        index = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu")
        frequencies = 1.0 / (self.theta ** (index / self.head_dim))

        return frequencies if self.scaling is None else self.scaling.apply(frequencies, self.theta)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        # `Module.to(dtype)` casts buffers too, and the result cannot be cast back without loss.
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.inv_freq.dtype != torch.float32:
            self.reset_non_persistent_buffers(self.inv_freq.device)

        return self

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Map positions (N, S) → cosines and sines, each (N, 1, S, head_dim / 2) in ``dtype``."""
        angles = position_ids[:, None, :, None].float() * self.inv_freq

        cos, sin = angles.cos(), angles.sin()
        if self.scaling is not None and self.scaling.amplitude != 1.0:
            cos, sin = cos * self.scaling.amplitude, sin * self.scaling.amplitude

        return cos.to(dtype), sin.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, theta={self.theta:g}, scaling={self.scaling}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads ``x`` (N, H, S, head_dim), pairing each element of the first half with one of the second."""
    first, second = x.chunk(2, dim=-1)

    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_adjacent(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads ``x`` (N, H, S, head_dim), pairing each element of an even index with the next one."""
    even, odd = x[..., ::2], x[..., 1::2]

    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
