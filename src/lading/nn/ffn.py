"""Feed-forward networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from lading.nn.uninitialized import Linear


class GatedFeedForward(nn.Module):
    """The SwiGLU network of https://arxiv.org/abs/2002.05202: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, model_dim: int, inner_dim: int, *, bias: bool = False) -> None:
        super().__init__()

        self.gate_proj = Linear(model_dim, inner_dim, bias=bias)
        self.up_proj = Linear(model_dim, inner_dim, bias=bias)
        self.down_proj = Linear(inner_dim, model_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, model_dim) → the same shape."""
        y: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))

        return y
