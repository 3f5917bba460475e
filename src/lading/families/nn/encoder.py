"""The bidirectional encoder of BERT (https://arxiv.org/abs/1810.04805), normalized after each block.

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu

from lading.families.nn.attention import AttentionMask, attend, split_heads
from lading.families.nn.checks import (
    require_dropout,
    require_layers,
    require_multiple,
    require_positive,
    require_symbol,
)
from lading.families.nn.uninitialized import Embedding, LayerNorm, Linear
from lading.models.parallel_plan import ParallelPlan, Split


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """The options of the encoder.

    :raises ValueError: the sizes are not valid, such as a number of heads that doesn't divide ``model_dim``.
    """

    model_dim: int
    max_seq_len: int
    vocab_size: int
    type_vocab_size: int
    pad_idx: int | None
    num_layers: int
    num_attn_heads: int
    ffn_inner_dim: int
    ffn_activation: Literal["gelu", "gelu_tanh"]
    norm_eps: float
    dropout_p: float
    """The dropout probability of the embeddings and of the outputs of attention and feed-forward blocks."""
    attn_dropout_p: float
    """The dropout probability of the attention weights."""

    def __post_init__(self) -> None:
        require_layers(self.num_layers)
        require_positive(
            self,
            "model_dim",
            "max_seq_len",
            "vocab_size",
            "type_vocab_size",
            "num_attn_heads",
            "ffn_inner_dim",
            "norm_eps",
        )
        require_multiple(self, "model_dim", "num_attn_heads")
        if self.ffn_activation not in ("gelu", "gelu_tanh"):
            raise ValueError(f"`ffn_activation` must be 'gelu' or 'gelu_tanh', but is {self.ffn_activation!r}")
        require_symbol(self.pad_idx, self.vocab_size)
        require_dropout(self, "dropout_p", "attn_dropout_p")


class EncoderEmbeddings(nn.Module):
    """The normalized sum of the embeddings of words, positions and token types."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()

        self.dropout_p = spec.dropout_p

        self.word_embeddings = Embedding(spec.vocab_size, spec.model_dim, padding_idx=spec.pad_idx)
        self.position_embeddings = Embedding(spec.max_seq_len, spec.model_dim)
        self.token_type_embeddings = Embedding(spec.type_vocab_size, spec.model_dim)
        self.LayerNorm = LayerNorm(spec.model_dim, eps=spec.norm_eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Embed three index tensors (N or 1, S) → (N, S, model_dim)."""
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = self.LayerNorm(x + self.position_embeddings(position_ids))

        return dropout(x, self.dropout_p, self.training)


class SelfAttention(nn.Module):
    """Multi-head attention without its output projection."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()

        self.head_dim = spec.model_dim // spec.num_attn_heads
        self.dropout_p = spec.attn_dropout_p

        self.query = Linear(spec.model_dim, spec.model_dim)
        self.key = Linear(spec.model_dim, spec.model_dim)
        self.value = Linear(spec.model_dim, spec.model_dim)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        q, k, v = (split_heads(projection(x), self.head_dim) for projection in (self.query, self.key, self.value))

        return attend(q, k, v, mask, dropout_p=self.dropout_p if self.training else 0.0)


class BlockOutput(nn.Module):
    """The end of a block: a projection, the residual and the normalization."""

    def __init__(self, input_dim: int, spec: EncoderSpec) -> None:
        super().__init__()

        self.dropout_p = spec.dropout_p

        self.dense = Linear(input_dim, spec.model_dim)
        self.LayerNorm = LayerNorm(spec.model_dim, eps=spec.norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map (N, S, input_dim) and the residual (N, S, model_dim) → (N, S, model_dim)."""
        y: Tensor = self.LayerNorm(dropout(self.dense(x), self.dropout_p, self.training) + residual)

        return y


class AttentionBlock(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()

        self.self = SelfAttention(spec)
        self.output = BlockOutput(spec.model_dim, spec)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        y: Tensor = self.output(self.self(x, mask), x)

        return y


class Intermediate(nn.Module):
    """The first half of the feed-forward network."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()

        self.approximate = "tanh" if spec.ffn_activation == "gelu_tanh" else "none"

        self.dense = Linear(spec.model_dim, spec.ffn_inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, model_dim) → (N, S, ffn_inner_dim)."""
        return gelu(self.dense(x), approximate=self.approximate)


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network, each with a residual and then normalized."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()

        self.attention = AttentionBlock(spec)
        self.intermediate = Intermediate(spec)
        self.output = BlockOutput(spec.ffn_inner_dim, spec)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        x = self.attention(x, mask)
        y: Tensor = self.output(self.intermediate(x), x)

        return y


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()

        self.layer = nn.ModuleList(EncoderLayer(spec) for _ in range(spec.num_layers))

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        for layer in self.layer:
            x = layer(x, mask)

        return x


class Pooler(nn.Module):
    """A projection of the first token, trained with the next-sentence objective."""

    def __init__(self, model_dim: int) -> None:
        super().__init__()

        self.dense = Linear(model_dim, model_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, model_dim) → (N, model_dim)."""
        return torch.tanh(self.dense(x[:, 0]))


def encoder_plan(spec: EncoderSpec) -> ParallelPlan:
    """Return the parallel plan of an encoder with its embeddings (``embeddings``, ``encoder``, ``pooler``).

    It splits attention by heads, feed-forward networks by their inner width, and the embedding of words by symbols.
    """
    return ParallelPlan(
        tensor={
            "embeddings.word_embeddings": Split.VOCABULARY,
            "embeddings.position_embeddings": Split.REPLICATED,
            "embeddings.token_type_embeddings": Split.REPLICATED,
            "embeddings.LayerNorm": Split.REPLICATED,
            "encoder.layer.*.attention.self.query": Split.COLUMN,
            "encoder.layer.*.attention.self.key": Split.COLUMN,
            "encoder.layer.*.attention.self.value": Split.COLUMN,
            "encoder.layer.*.attention.output.dense": Split.ROW,
            "encoder.layer.*.attention.output.LayerNorm": Split.REPLICATED,
            "encoder.layer.*.intermediate.dense": Split.COLUMN,
            "encoder.layer.*.output.dense": Split.ROW,
            "encoder.layer.*.output.LayerNorm": Split.REPLICATED,
            "pooler.dense": Split.REPLICATED,
        },
        divisible={"num_attn_heads": spec.num_attn_heads, "ffn_inner_dim": spec.ffn_inner_dim},
        units=("encoder.layer.*", "pooler"),
    )


@torch.no_grad()
def init_encoder(model: nn.Module, name: str, parameter: Tensor, *, std: float) -> None:
    """Initialize ``parameter`` randomly: weights from a normal distribution.

    Biases and the embedding of padding become zero, norms one.

    :param name: the name of the parameter in ``model``, whose own tensor is not used.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)

    if leaf == "bias":
        parameter.zero_()
    elif isinstance(module, nn.LayerNorm):
        parameter.fill_(1.0)
    else:
        nn.init.normal_(parameter, std=std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            parameter[module.padding_idx].zero_()
