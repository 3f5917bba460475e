"""Feed-forward networks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from lading.families.nn.uninitialized import Linear


class GatedFeedForward(nn.Module):
    """A gated feed-forward network (https://arxiv.org/abs/2002.05202): ``down(activation(gate(x)) * up(x))``."""

    def __init__(
        self, model_dim: int, inner_dim: int, *, bias: bool = False, activation: Literal["silu", "gelu_tanh"] = "silu"
    ) -> None:
        super().__init__()

        self.activation = activation

        self.gate_proj = Linear(model_dim, inner_dim, bias=bias)
        self.up_proj = Linear(model_dim, inner_dim, bias=bias)
        self.down_proj = Linear(inner_dim, model_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, model_dim) → the same shape."""
        gate = self.gate_proj(x)
        gate = silu(gate) if self.activation == "silu" else gelu(gate, approximate="tanh")
        y: Tensor = self.down_proj(gate * self.up_proj(x))

        return y
