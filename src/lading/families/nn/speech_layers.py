"""The Transformer layers of wav2vec 2.0 (https://arxiv.org/abs/2006.11477), and the parts that Conformer layers share.

The names of parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import dropout, gelu

from lading.families.nn.attention import AttentionMask, MultiHeadAttention, attend, split_heads
from lading.families.nn.relative_positions import RelativePositions
from lading.families.nn.rope import rotate
from lading.families.nn.speech_spec import LayerSpec
from lading.families.nn.uninitialized import LayerNorm, Linear


class Positions(NamedTuple):
    """The positions that attention computes with, if any."""

    distances: Tensor | None = None
    """The embeddings of the distances between frames, (2 T - 1, model_dim)."""
    rotary: tuple[Tensor, Tensor] | None = None
    """The cosines and sines of the angles of frames, each (1, 1, T, head_dim / 2)."""


class SpeechAttention(MultiHeadAttention):
    """Attention of frames to one another, by their positions if these were not added to them."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec.model_dim, spec.num_attn_heads, dropout_p=spec.attn_dropout_p)

        relative = spec.pos_encoder_type == "relative"
        self.relative = RelativePositions(spec.num_attn_heads, spec.head_dim) if relative else None

    def forward(self, x: Tensor, mask: AttentionMask, positions: Positions) -> Tensor:  # type: ignore[override]
        """Map (N, T, model_dim) → the same shape."""
        k, v = self.keys_and_values(x)
        q = split_heads(self.q_proj(x), self.head_dim)

        if positions.rotary is not None:
            # With angles in float32, the rotation is in float32 as well.
            q, k = rotate(q, *positions.rotary).to(q.dtype), rotate(k, *positions.rotary).to(k.dtype)
        if self.relative is not None and positions.distances is not None:
            q, bias = self.relative(q, positions.distances)
            if mask.visible is not None:
                bias = bias.masked_fill(~mask.visible, -float("inf"))
            mask = AttentionMask(bias=bias)

        y: Tensor = self.out_proj(attend(q, k, v, mask, dropout_p=self.dropout_p if self.training else 0.0))

        return y


class SpeechFeedForward(nn.Module):
    """Two projections with an activation between them, by default the exact GELU."""

    def __init__(self, spec: LayerSpec, activation: Callable[[Tensor], Tensor] = gelu) -> None:
        super().__init__()

        self.activation = activation
        self.inner_dropout_p = spec.ffn_inner_dropout_p

        self.intermediate_dense = Linear(spec.model_dim, spec.ffn_inner_dim)
        self.output_dense = Linear(spec.ffn_inner_dim, spec.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, model_dim) → the same shape."""
        inner = self.activation(self.intermediate_dense(x))
        y: Tensor = self.output_dense(dropout(inner, self.inner_dropout_p, self.training))

        return y


class SpeechEncoderLayer(nn.Module):
    """Attention and a feed-forward network, each normalized before, or after its residual is added."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()

        self.norm_first = spec.norm_first
        self.dropout_p = spec.dropout_p

        self.attention = SpeechAttention(spec)
        self.layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps)
        self.feed_forward = SpeechFeedForward(spec)
        self.final_layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps)

    def forward(self, x: Tensor, mask: AttentionMask, positions: Positions) -> Tensor:
        """Map (N, T, model_dim) → the same shape."""
        y = self.attention(self.layer_norm(x) if self.norm_first else x, mask, positions)
        x = x + dropout(y, self.dropout_p, self.training)
        if not self.norm_first:
            x = self.layer_norm(x)

        y = self.feed_forward(self.final_layer_norm(x) if self.norm_first else x)
        x = x + dropout(y, self.dropout_p, self.training)
        if not self.norm_first:
            x = self.final_layer_norm(x)

        return x
