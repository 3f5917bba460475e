"""Feed-forward networks."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from lading.families.nn.decoder_spec import Activation, DecoderSpec
from lading.families.nn.rounding import scaled
from lading.families.nn.uninitialized import Linear


class GatedFeedForward(nn.Module):
    """A gated feed-forward network (https://arxiv.org/abs/2002.05202): ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, spec: DecoderSpec, inner_dim: int | None = None, *, sparsity: float = 0.0) -> None:
        """:param inner_dim: the inner width; ``None`` means ``spec.ffn_inner_dim``.
        :param sparsity: the share of the gates that :class:`GaussianTopK` closes.
        """
        super().__init__()

        self.activation = spec.ffn_activation
        self.sparsity = GaussianTopK(sparsity) if sparsity > 0 else None

        inner = spec.ffn_inner_dim if inner_dim is None else inner_dim
        self.gate_proj = Linear(spec.model_dim, inner, bias=spec.ffn_bias)
        self.up_proj = Linear(spec.model_dim, inner, bias=spec.ffn_bias)
        self.down_proj = Linear(inner, spec.model_dim, bias=spec.ffn_bias)

    @classmethod
    def of(cls, spec: DecoderSpec, layer: int) -> Self:
        """Create the network of layer ``layer`` of a decoder."""
        return cls(spec, spec.ffn_inner_dim_of(layer), sparsity=spec.ffn_sparsity_of(layer))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, model_dim) → the same shape."""
        gate = self.gate_proj(x)
        if self.sparsity is not None:
            gate = self.sparsity(gate)
        y: Tensor = self.down_proj(activate(gate, self.activation) * self.up_proj(x))

        return y


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply the activation of this name to each element."""
    return silu(x) if activation == "silu" else gelu(x, approximate="tanh")


class GaussianTopK(nn.Module):
    """The statistical top-k of Spark Transformer (https://arxiv.org/abs/2506.06644), which needs no sorting.

    Elements below a quantile of the normal distribution with their mean and deviation become zero; it is subtracted
    from the others.

    :param share: the share of the elements that become zero, if they are distributed normally.
    """

    def __init__(self, share: float) -> None:
        super().__init__()

        self.share = share
        # In float32, whose result for 0.95 differs from the exact one in the seventh digit.
        quantile = torch.erfinv(2 * torch.tensor(share, dtype=torch.float32, device="cpu") - 1) * 2**0.5
        self.quantile = quantile.item()

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, dim) → the same shape; the distribution is that over the last dim."""
        wide = x.float()
        mean = wide.mean(-1, keepdim=True)
        # In two sums of small tensors, which also ranks that hold parts of ``x`` can add up.
        deviation = (wide - mean).square().mean(-1, keepdim=True).sqrt()

        return relu(x - (mean.to(x.dtype) + scaled(deviation.to(x.dtype), self.quantile)))

    def extra_repr(self) -> str:
        return f"{self.share:g}"
