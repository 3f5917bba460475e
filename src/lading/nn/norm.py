"""Root mean square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square layer normalisation (https://arxiv.org/abs/1910.07467), its parameter uninitialised.

    The mean is taken in float32 whatever the dtype of the input, and the weight is applied in the dtype of the input:
    checkpoints in half precision were trained with this order of casts.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()

        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → the same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)

        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.size(-1)}, eps={self.eps:g}"
