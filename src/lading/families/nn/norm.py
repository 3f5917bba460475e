"""Root mean square normalization."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from lading.families.nn.decoder_spec import DecoderSpec


def normalize(x: Tensor, eps: float) -> Tensor:
    """Divide (…, dim) by the root mean square over the last dim → the same shape in float32.

    :param eps: the number that is added to the mean square.
    """
    wide = x.float()

    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """Root mean square layer normalization (https://arxiv.org/abs/1910.07467) with an uninitialized parameter.

    The mean is computed in float32 whatever the dtype of the input. Half-precision checkpoints were trained with either
    order of casts.

    :param wide: whether the weight is applied in float32 too, instead of in the dtype of the input.
    :param offset: the number that is added to the weight.
    """

    def __init__(self, dim: int, *, eps: float, wide: bool = False, offset: float = 0.0) -> None:
        super().__init__()

        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.wide = wide
        self.offset = offset

    @classmethod
    def of(cls, spec: DecoderSpec, dim: int) -> Self:
        """Create a normalization of width ``dim`` for a decoder."""
        return cls(dim, eps=spec.norm_eps, wide=spec.wide_norm, offset=spec.norm_offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (…, dim) → the same shape and dtype."""
        wide = normalize(x, self.eps)

        weight = self.weight.float() if self.wide else self.weight
        if self.offset != 0.0:
            weight = weight + self.offset

        return (weight * (wide if self.wide else wide.to(x.dtype))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.size(-1)}, eps={self.eps:g}, wide={self.wide}, offset={self.offset:g}"
