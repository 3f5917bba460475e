"""The parts of a layer that BERT and vision transformers share, without normalizations and residuals.

The names of parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.functional import gelu

from lading.families.nn.attention import AttentionMask, attend, split_heads
from lading.families.nn.uninitialized import Linear


class AttentionHeads(nn.Module):
    """Bidirectional multi-head attention without its output projection."""

    def __init__(self, model_dim: int, num_heads: int, *, bias: bool = True, dropout_p: float = 0.0) -> None:
        super().__init__()

        self.head_dim = model_dim // num_heads
        self.dropout_p = dropout_p

        self.query = Linear(model_dim, model_dim, bias=bias)
        self.key = Linear(model_dim, model_dim, bias=bias)
        self.value = Linear(model_dim, model_dim, bias=bias)

    def forward(self, x: Tensor, mask: AttentionMask, memory: Tensor | None = None) -> Tensor:
        """Map (N, S, model_dim) → the same shape.

        :param memory: the sequence to attend to, (N, K, model_dim); ``None`` means ``x`` itself.
        """
        memory = x if memory is None else memory
        q, k, v = (
            split_heads(projection(y), self.head_dim)
            for projection, y in ((self.query, x), (self.key, memory), (self.value, memory))
        )

        return attend(q, k, v, mask, dropout_p=self.dropout_p if self.training else 0.0)


class Intermediate(nn.Module):
    """The first half of a feed-forward network: a projection and GELU."""

    def __init__(self, model_dim: int, inner_dim: int, *, tanh: bool = False) -> None:
        super().__init__()

        self.approximate = "tanh" if tanh else "none"

        self.dense = Linear(model_dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, model_dim) → (N, S, inner_dim)."""
        return gelu(self.dense(x), approximate=self.approximate)


class LayerStack(nn.Module):
    """A stack of layers."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()

        self.layer = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        for layer in self.layer:
            x = layer(x, mask)

        return x
