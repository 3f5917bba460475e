"""Products in the dtype of half-precision training."""

from __future__ import annotations

from torch import Tensor


def scaled(x: Tensor, factor: float) -> Tensor:
    """Multiply by ``factor``, rounded to the dtype of ``x`` as in the training of half-precision checkpoints.

    A product with a number would not round it, and a tensor on the CPU would break the graph of ``torch.compile``.
    """
    return x * x.new_full((), factor)
