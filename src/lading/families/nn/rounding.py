"""Products in the dtype of half-precision training."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(x: Tensor, factor: float) -> Tensor:
    """Multiply by ``factor``, rounded to the dtype of ``x`` as in the training of half-precision checkpoints."""
    return x * torch.tensor(factor, dtype=x.dtype, device="cpu").item()
