"""Rotary position embeddings in the layout of Hugging Face checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryScaling:
    """The frequency scaling of LLaMA 3.1, which stretches a context of ``original_seq_len`` tokens by ``factor``.

    Wavelengths shorter than ``original_seq_len / high_freq_factor`` stay, those longer than ``original_seq_len /
    low_freq_factor`` are stretched, those between are blended.

    :raises ValueError: the factors don't satisfy ``0 < factor`` and ``0 < low_freq_factor < high_freq_factor``.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_seq_len: int

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"`factor` of the rotary scaling must be positive, but is {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "the frequency factors of the rotary scaling must satisfy 0 < low < high, but are "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.original_seq_len < 1:
            raise ValueError(f"`original_seq_len` must be positive, but is {self.original_seq_len}")


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary position embedding (https://arxiv.org/abs/2104.09864)."""

    inv_freq: Tensor
    """(head_dim / 2), float32 whatever the dtype of the model: in half precision distant positions fall together."""

    def __init__(self, head_dim: int, *, theta: float, scaling: RotaryScaling | None = None) -> None:
        super().__init__()

        self.head_dim = head_dim
        self.theta = theta
        self.scaling = scaling

        self.register_buffer("inv_freq", torch.empty(head_dim // 2, dtype=torch.float32), persistent=False)
        self.reset_non_persistent_buffers(self.inv_freq.device)

    def reset_non_persistent_buffers(self, device: torch.device | str) -> None:
        """Compute the frequencies anew and place them on ``device``."""
        if torch.device(device).type == "meta":
            self.inv_freq = torch.empty(self.head_dim // 2, dtype=torch.float32, device="meta")
        else:
            # On the CPU first, so that all devices hold the same bits.
            self.inv_freq = self._frequencies().to(device)

    def _frequencies(self) -> Tensor:
        index = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu")
        frequencies = 1.0 / (self.theta ** (index / self.head_dim))

        scaling = self.scaling
        if scaling is None:
            return frequencies

        wavelengths = 2 * math.pi / frequencies
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        weight = (scaling.original_seq_len / wavelengths - low) / (high - low)
        blended = (1 - weight) * frequencies / scaling.factor + weight * frequencies

        scaled = torch.where(wavelengths > scaling.original_seq_len / low, frequencies / scaling.factor, blended)

        return torch.where(wavelengths < scaling.original_seq_len / high, frequencies, scaled)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        # `Module.to(dtype)` casts buffers too, and what it rounds away cannot be had back from the result.
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.inv_freq.dtype != torch.float32:
            self.reset_non_persistent_buffers(self.inv_freq.device)

        return self

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions (N, S) → cosines and sines, each (N, 1, S, head_dim / 2) in ``dtype``."""
        angles = position_ids[:, None, :, None].float() * self.inv_freq

        return angles.cos().to(dtype), angles.sin().to(dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, theta={self.theta:g}, scaling={self.scaling}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the heads ``x`` (N, H, S, head_dim); the first half of a head pairs with the second, element by element."""
    first, second = x.chunk(2, dim=-1)

    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
