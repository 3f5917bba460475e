"""Rotary position embeddings in the layout of Hugging Face checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from lading.families.nn.checks import require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class LLaMA3Scaling:
    """The frequency scaling of LLaMA 3.1, which stretches a context of some tokens by ``factor``.

    Wavelengths shorter than this context divided by the second frequency factor stay, those longer than the context
    divided by the first are stretched, and those in between are interpolated.

    :raises ValueError: the factors don't satisfy ``0 < factor`` and ``0 < first < second``.
    """

    factor: float
    frequency_factors: tuple[float, float]
    original_context_length: int

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"`factor` of the rotary scaling must be positive, but is {self.factor}")
        low, high = self.frequency_factors
        if not 0 < low < high:
            raise ValueError(
                f"the frequency factors of the rotary scaling must satisfy 0 < low < high, but are {low} and {high}"
            )
        require_positive(self, "original_context_length")

    @property
    def amplitude(self) -> float:
        """The factor of cosines and sines."""
        return 1.0

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale frequencies (head_dim / 2) → the same shape."""
        wavelengths = 2 * math.pi / frequencies
        (low, high), context = self.frequency_factors, self.original_context_length
        weight = (context / wavelengths - low) / (high - low)
        blended = (1 - weight) * frequencies / self.factor + weight * frequencies

        scaled = torch.where(wavelengths > context / low, frequencies / self.factor, blended)

        return torch.where(wavelengths < context / high, frequencies, scaled)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """The scaling that stretches all wavelengths by ``factor`` (https://arxiv.org/abs/2306.15595).

    :raises ValueError: ``factor`` is not positive.
    """

    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"`factor` of the rotary scaling must be positive, but is {self.factor}")

    @property
    def amplitude(self) -> float:
        """The factor of cosines and sines."""
        return 1.0

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale frequencies (head_dim / 2) → the same shape."""
        return frequencies / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class YaRNScaling:
    """The scaling of YaRN (https://arxiv.org/abs/2309.00071), for ``factor`` times ``original_seq_len`` tokens.

    Dimensions that rotate ``beta_fast`` times or more in the original context stay, those that rotate ``beta_slow``
    times or less are stretched, and those in between are interpolated.

    :raises ValueError: the factors don't satisfy ``1 <= factor`` and ``0 < beta_slow < beta_fast``.
    """

    factor: float
    original_seq_len: int
    beta_fast: float
    beta_slow: float
    amplitude: float
    """The factor of cosines and sines."""
    truncate: bool
    """True if the dimensions at which interpolation starts and ends are rounded to integers."""

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"the factor of the rotary scaling must be 1 or more, but is {self.factor}")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"the betas of the rotary scaling must satisfy 0 < slow < fast, but are {self.beta_slow} and "
                f"{self.beta_fast}"
            )
        require_positive(self, "original_seq_len", "amplitude")

    @staticmethod
    def default_amplitude(factor: float, mscale: float = 1.0) -> float:
        """Return the amplitude that keeps attention as sharp as in the original context (equation 22 of the paper)."""
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale frequencies (head_dim / 2) → the same shape."""
        head_dim = 2 * len(frequencies)

        def dimension(turns: float) -> float:
            return head_dim * math.log(self.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        if first == last:
            last += 0.001

        index = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
        weight = ((index - first) / (last - first)).clamp(0, 1)

        return frequencies / self.factor * weight + frequencies * (1 - weight)


Scaling: TypeAlias = LLaMA3Scaling | LinearScaling | YaRNScaling


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
