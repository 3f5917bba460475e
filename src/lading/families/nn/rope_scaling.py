"""The scalings of rotary frequencies, by which a model reads longer contexts than that of its first training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from lading.families.nn.checks import require_positive

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LLaMA3Scaling:
    """The frequency scaling of LLaMA 3.1, which stretches a context of some tokens by ``factor``.

    Wavelengths shorter than this context divided by the second frequency factor stay, those longer than the context
    divided by the first are stretched, and those in between are interpolated.

    :raises ValueError: the factors don't satisfy ``0 < factor`` and ``0 < first <= second``.
    """

    factor: float
    frequency_factors: tuple[float, float]
    original_context_length: int

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"`factor` of the rotary scaling must be positive, but is {self.factor}")
        low, high = self.frequency_factors
        if not 0 < low <= high:
            raise ValueError(
                f"the frequency factors of the rotary scaling must satisfy 0 < low <= high, but are {low} and {high}"
            )
        require_positive(self, "original_context_length")

    @property
    def amplitude(self) -> float:
        """The factor of cosines and sines."""
        return 1.0

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale frequencies (head_dim / 2) → the same shape."""
        import torch

        wavelengths = 2 * math.pi / frequencies
        (low, high), context = self.frequency_factors, self.original_context_length
        if low == high:
            return torch.where(wavelengths > context / low, frequencies / self.factor, frequencies)

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
        import torch

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
