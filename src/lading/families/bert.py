"""BERT (https://arxiv.org/abs/1810.04805), and the sentence encoders based on it (https://arxiv.org/abs/1908.10084).

The names of parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, normalize

from lading.cards.config import StrictConfig
from lading.errors import NotSupportedError
from lading.families.config_json import CHANGES_EACH_MODEL, ConfigReader, ConfigTable, Field
from lading.families.name_rules import HEAD
from lading.families.nn.attention import AttentionMask, attend, split_heads
from lading.families.nn.checks import (
    require_dropout,
    require_layers,
    require_multiple,
    require_positive,
    require_symbol,
)
from lading.families.nn.uninitialized import Embedding, LayerNorm, Linear
from lading.models.family import Family
from lading.models.hub import ModelHubAccessor
from lading.models.parallel_plan import ParallelPlan, Split
from lading.planning.rules import Rule


@dataclass(kw_only=True)
class BertConfig(StrictConfig):
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


def _checked(config: BertConfig) -> BertConfig:
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


class _Embeddings(nn.Module):
    """The normalized sum of the embeddings of words, positions and token types."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        self.dropout_p = config.dropout_p

        self.word_embeddings = Embedding(config.vocab_size, config.model_dim, padding_idx=config.pad_idx)
        self.position_embeddings = Embedding(config.max_seq_len, config.model_dim)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.model_dim)
        self.LayerNorm = LayerNorm(config.model_dim, eps=config.norm_eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Embed three index tensors (N or 1, S) → (N, S, model_dim)."""
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = self.LayerNorm(x + self.position_embeddings(position_ids))

        return dropout(x, self.dropout_p, self.training)


class _SelfAttention(nn.Module):
    """Multi-head attention without its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        self.head_dim = config.model_dim // config.num_attn_heads
        self.dropout_p = config.attn_dropout_p

        self.query = Linear(config.model_dim, config.model_dim)
        self.key = Linear(config.model_dim, config.model_dim)
        self.value = Linear(config.model_dim, config.model_dim)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        q, k, v = (split_heads(projection(x), self.head_dim) for projection in (self.query, self.key, self.value))

        return attend(q, k, v, mask, dropout_p=self.dropout_p if self.training else 0.0)


class _BlockOutput(nn.Module):
    """The end of a block: a projection, the residual and the normalization."""

    def __init__(self, input_dim: int, config: BertConfig) -> None:
        super().__init__()

        self.dropout_p = config.dropout_p

        self.dense = Linear(input_dim, config.model_dim)
        self.LayerNorm = LayerNorm(config.model_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map (N, S, input_dim) and the residual (N, S, model_dim) → (N, S, model_dim)."""
        y: Tensor = self.LayerNorm(dropout(self.dense(x), self.dropout_p, self.training) + residual)

        return y


class _AttentionBlock(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        self.self = _SelfAttention(config)
        self.output = _BlockOutput(config.model_dim, config)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        y: Tensor = self.output(self.self(x, mask), x)

        return y


class _Intermediate(nn.Module):
    """The first half of the feed-forward network."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        self.approximate = "tanh" if config.ffn_activation == "gelu_tanh" else "none"

        self.dense = Linear(config.model_dim, config.ffn_inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, model_dim) → (N, S, ffn_inner_dim)."""
        return gelu(self.dense(x), approximate=self.approximate)


class _Layer(nn.Module):
    """Attention and a feed-forward network, each with a residual and then normalized."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        self.attention = _AttentionBlock(config)
        self.intermediate = _Intermediate(config)
        self.output = _BlockOutput(config.ffn_inner_dim, config)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        x = self.attention(x, mask)
        y: Tensor = self.output(self.intermediate(x), x)

        return y


class _Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        for layer in self.layer:
            x = layer(x, mask)

        return x


class _Pooler(nn.Module):
    """A projection of the first token, trained with the next-sentence objective."""

    def __init__(self, model_dim: int) -> None:
        super().__init__()

        self.dense = Linear(model_dim, model_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, model_dim) → (N, model_dim)."""
        return torch.tanh(self.dense(x[:, 0]))


class Bert(nn.Module):
    """A BERT encoder; its parameters are uninitialized."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        _checked(config)

        self.max_seq_len = config.max_seq_len
        self.pooling = config.pooling
        self.normalize = config.normalize

        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.pooler = _Pooler(config.model_dim) if config.pooler else None

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Map token ids (N, S), int64 → the hidden states of the last layer (N, S, model_dim).

        :param attention_mask: (N, S); 1 is a token, 0 padding.
        :param token_type_ids: (N, S); by default 0.
        :param position_ids: (N or 1, S); by default from 0 upward.

        :raises ValueError: there are more tokens than ``max_seq_len``, or the attention mask has another shape.
        """
        if input_ids.size(1) > self.max_seq_len:
            raise ValueError(
                f"the model's `max_seq_len` is {self.max_seq_len}, but the sequence has {input_ids.size(1)} tokens"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must be of the shape of `input_ids`, {tuple(input_ids.shape)}, but is of shape "
                f"{tuple(attention_mask.shape)}"
            )

        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device)[None]

        x = self.embeddings(input_ids, token_type_ids, position_ids)
        visible = None if attention_mask is None else attention_mask.to(x.device, torch.bool)[:, None, None]
        y: Tensor = self.encoder(x, AttentionMask(visible=visible))

        return y

    def pooled_output(self, hidden: Tensor) -> Tensor:
        """Project hidden states (N, S, model_dim) → (N, model_dim), as trained on pairs of sentences.

        :raises NotSupportedError: the model has no pooler.
        """
        if self.pooler is None:
            raise NotSupportedError(
                "This model has no pooler. Load it with a configuration whose `pooler` is true, if its checkpoint has "
                "one."
            )
        y: Tensor = self.pooler(hidden)

        return y

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Embed sentences, token ids (N, S) → (N, model_dim), by the ``pooling`` of the configuration.

        The mode of the module does not change: call ``eval()`` first to disable dropout.

        :raises NotSupportedError: the ``pooling`` of the configuration is ``none``.
        """
        if self.pooling == "none":
            raise NotSupportedError(
                "This model has no embeddings of sentences. Load it with a configuration whose `pooling` is 'mean' or "
                "'cls', as in its training."
            )

        hidden = self(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)

        if self.pooling == "cls":
            embedding = hidden[:, 0]
        elif attention_mask is None:
            embedding = hidden.mean(1)
        else:
            weights = attention_mask.to(hidden)[:, :, None]
            embedding = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)

        return normalize(embedding, dim=-1) if self.normalize else embedding


def _plan(config: BertConfig) -> ParallelPlan:
    """Split attention by heads, feed-forward networks by their inner width, and the embedding of words by symbols."""
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
        divisible={"num_attn_heads": config.num_attn_heads, "ffn_inner_dim": config.ffn_inner_dim},
        units=("encoder.layer.*", "pooler"),
    )


@torch.no_grad()
def _init(model: Bert, config: BertConfig, name: str, parameter: Tensor) -> None:
    """Draw weights from a normal distribution; biases and the embedding of padding become zero, norms one."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)

    if leaf == "bias":
        parameter.zero_()
    elif isinstance(module, nn.LayerNorm):
        parameter.fill_(1.0)
    else:
        nn.init.normal_(parameter, std=config.init_std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            parameter[module.padding_idx].zero_()


def _rules(config: BertConfig) -> Sequence[Rule]:
    rules = [
        Rule("cls.{rest*}", None),  # the heads of pre-training
    ]
    for prefix in ("bert.", ""):
        rules += [
            Rule(f"{prefix}embeddings.position_ids", None),  # saved by old versions of transformers
            # The names in the first release, converted from TensorFlow.
            Rule(f"{prefix}{{rest*}}LayerNorm.gamma", "{rest}LayerNorm.weight"),
            Rule(f"{prefix}{{rest*}}LayerNorm.beta", "{rest}LayerNorm.bias"),
        ]
        if not config.pooler:
            rules.append(Rule(f"{prefix}pooler.{{rest*}}", None))

    return (*rules, Rule("bert.{rest*}", "{rest}"))


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


CONFIG_JSON = ConfigTable(
    family="bert",
    model_type="bert",
    architecture="BertModel",
    config_kls=BertConfig,
    spec=_checked,
    free=("pooling", "normalize", "pooler"),
    entries=(
        Field("model_dim", "hidden_size", ConfigReader.count, 768),
        Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 512),
        Field("vocab_size", "vocab_size", ConfigReader.count, 30_522),
        Field("type_vocab_size", "type_vocab_size", ConfigReader.count, 2),
        Field("pad_idx", "pad_token_id", ConfigReader.index, 0),
        Field("num_layers", "num_hidden_layers", ConfigReader.layers, 12),
        Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 12),
        Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 3072),
        Field(
            "ffn_activation",
            "hidden_act",
            lambda keys, key, default: keys.choice(key, default, _ACTIVATIONS),
            "gelu",
            write=lambda config: {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.ffn_activation],
        ),
        Field("norm_eps", "layer_norm_eps", ConfigReader.number, 1e-12),
        Field("dropout_p", "hidden_dropout_prob", ConfigReader.number, 0.1),
        Field("attn_dropout_p", "attention_probs_dropout_prob", ConfigReader.number, 0.1),
        Field("init_std", "initializer_range", ConfigReader.number, 0.02),
    ),
    required={
        **CHANGES_EACH_MODEL,
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    },
    ignored={
        "tie_word_embeddings": "only for the head of masked language modeling, which is not loaded",
        "is_causal": "only a decoder reads it",
        "gradient_checkpointing": "training",
        "directionality": "historical; each published file has it",
        "pooler_fc_size": "of the first release; transformers does not read it",
        "pooler_num_attention_heads": "of the first release; transformers does not read it",
        "pooler_num_fc_layers": "of the first release; transformers does not read it",
        "pooler_size_per_head": "of the first release; transformers does not read it",
        "pooler_type": "of the first release; transformers does not read it",
    },
)
"""The keys of ``config.json``, which does not say how sentences are embedded: files of sentence-transformers do."""


def _explain(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Return advice for a checkpoint without a pooler, or with the head of a task."""
    if unexpected and all(HEAD.fullmatch(name) for name in unexpected):
        return (
            "The checkpoint has the head of a task. Load it with `get_hg_model_hub().load_model(…)`, or set "
            "`model_family: hg` in its card."
        )
    if not unexpected and missing and all(name.startswith("pooler.") for name in missing):
        return (
            "The checkpoint has no pooler. Set `pooler: false` in the `model_config` of the card, or load it with "
            "`load_custom_model` and such a configuration, or with its transformers class by "
            "`get_hg_model_hub().load_model(…)`."
        )

    return None


FAMILY = Family(
    name="bert",
    kls=Bert,
    config_kls=BertConfig,
    build=Bert,
    init=_init,
    rules=_rules,
    parallel_plan=_plan,
    hf_model_types=frozenset({"bert"}),
    from_hf=CONFIG_JSON.read,
    to_hf=CONFIG_JSON.write,
    explain=_explain,
)

get_bert_model_hub = ModelHubAccessor("bert", Bert, BertConfig)
