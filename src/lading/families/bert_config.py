"""The configuration of BERT models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lading.families.nn.checks import (
    require_dropout,
    require_layers,
    require_multiple,
    require_positive,
    require_symbol,
)


@dataclass(kw_only=True)
class BertConfig:
    """The configuration of a BERT model; the defaults are those of the uncased base model."""

    model_dim: int = 768
    """The width of the model."""

    max_seq_len: int = 512
    """The longest sequence, in tokens."""

    vocab_size: int = 30_522
    """The number of symbols."""

    type_vocab_size: int = 2
    """The number of token types, which distinguish the sentences of a pair."""

    pad_idx: int | None = 0
    """The index of the symbol for padding."""

    num_layers: int = 12
    """The number of encoder layers."""

    num_attn_heads: int = 12
    """The number of attention heads."""

    ffn_inner_dim: int = 3072
    """The inner width of the feed-forward networks."""

    ffn_activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """The activation of the feed-forward networks: the exact GELU, or its approximation with a hyperbolic tangent."""

    norm_eps: float = 1e-12
    """The number that is added to the variance before taking its root."""

    dropout_p: float = 0.1
    """The dropout probability of the embeddings and of the outputs of attention and feed-forward blocks."""

    attn_dropout_p: float = 0.1
    """The dropout probability of the attention weights."""

    init_std: float = 0.02
    """The standard deviation of the initial weights."""

    pooling: Literal["cls", "mean", "none"] = "mean"
    """The source of the embedding of a sentence: its first token, the mean of its tokens, or none."""

    normalize: bool = True
    """True if the embedding of a sentence is scaled to unit length."""

    pooler: bool = True
    """True if the model has the projection of the first token that was trained on pairs of sentences."""


def checked(config: BertConfig) -> BertConfig:
    """Return the configuration.

    :raises ValueError: its sizes are not valid, such as a number of heads that doesn't divide ``model_dim``.
    """
    require_layers(config.num_layers)
    require_positive(config, "model_dim", "max_seq_len", "vocab_size", "type_vocab_size", "num_attn_heads")
    require_positive(config, "ffn_inner_dim", "norm_eps")
    require_multiple(config, "model_dim", "num_attn_heads")
    if config.ffn_activation not in ("gelu", "gelu_tanh"):
        raise ValueError(f"`ffn_activation` must be 'gelu' or 'gelu_tanh', but is {config.ffn_activation!r}")
    require_symbol(config.pad_idx, config.vocab_size)
    require_dropout(config, "dropout_p", "attn_dropout_p")

    return config
