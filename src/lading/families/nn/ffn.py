"""Feed-forward networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.uninitialized import Linear


class GatedFeedForward(nn.Module):
    """A gated feed-forward network (https://arxiv.org/abs/2002.05202): ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()

        self.activation = spec.ffn_activation

        self.gate_proj = Linear(spec.model_dim, spec.ffn_inner_dim, bias=spec.ffn_bias)
        self.up_proj = Linear(spec.model_dim, spec.ffn_inner_dim, bias=spec.ffn_bias)
        self.down_proj = Linear(spec.ffn_inner_dim, spec.model_dim, bias=spec.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, model_dim) → the same shape."""
        gate = self.gate_proj(x)
        gate = silu(gate) if self.activation == "silu" else gelu(gate, approximate="tanh")
        y: Tensor = self.down_proj(gate * self.up_proj(x))

        return y
