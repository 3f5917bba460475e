"""Feed-forward networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from lading.families.nn.decoder_spec import Activation, DecoderSpec
from lading.families.nn.uninitialized import Linear


class GatedFeedForward(nn.Module):
    """A gated feed-forward network (https://arxiv.org/abs/2002.05202): ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, spec: DecoderSpec, inner_dim: int | None = None) -> None:
        """:param inner_dim: the inner width; ``None`` means ``spec.ffn_inner_dim``."""
        super().__init__()

        self.activation = spec.ffn_activation

        inner = spec.ffn_inner_dim if inner_dim is None else inner_dim
        self.gate_proj = Linear(spec.model_dim, inner, bias=spec.ffn_bias)
        self.up_proj = Linear(spec.model_dim, inner, bias=spec.ffn_bias)
        self.down_proj = Linear(inner, spec.model_dim, bias=spec.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, model_dim) → the same shape."""
        y: Tensor = self.down_proj(activate(self.gate_proj(x), self.activation) * self.up_proj(x))

        return y


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply the activation of this name to each element."""
    return silu(x) if activation == "silu" else gelu(x, approximate="tanh")
