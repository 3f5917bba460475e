"""BERT (https://arxiv.org/abs/1810.04805), and the sentence encoders based on it (https://arxiv.org/abs/1908.10084)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn.functional import normalize

from lading.cards.config import STRICT
from lading.errors import NotSupportedError
from lading.families.config_json import CHANGES_EACH_MODEL, HEAD, ConfigReader, ConfigTable, Field
from lading.families.nn.attention import AttentionMask
from lading.families.nn.encoder import Encoder, EncoderEmbeddings, EncoderSpec, Pooler, encoder_plan, init_encoder
from lading.models.family import Family
from lading.models.hub import ModelHubAccessor
from lading.planning.rules import Rule


@dataclass(kw_only=True)
class BertConfig:
    """The configuration of a BERT model; the defaults are those of the uncased base model."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

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


class Bert(nn.Module):
    """A BERT encoder; its parameters are uninitialized."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        spec = _spec(config)

        self.max_seq_len = config.max_seq_len
        self.pooling = config.pooling
        self.normalize = config.normalize

        self.embeddings = EncoderEmbeddings(spec)
        self.encoder = Encoder(spec)
        self.pooler = Pooler(spec.model_dim) if config.pooler else None

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


def _spec(config: BertConfig) -> EncoderSpec:
    return EncoderSpec(
        model_dim=config.model_dim,
        max_seq_len=config.max_seq_len,
        vocab_size=config.vocab_size,
        type_vocab_size=config.type_vocab_size,
        pad_idx=config.pad_idx,
        num_layers=config.num_layers,
        num_attn_heads=config.num_attn_heads,
        ffn_inner_dim=config.ffn_inner_dim,
        ffn_activation=config.ffn_activation,
        norm_eps=config.norm_eps,
        dropout_p=config.dropout_p,
        attn_dropout_p=config.attn_dropout_p,
    )


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
    spec=_spec,
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
    init=lambda model, config, name, parameter: init_encoder(model, name, parameter, std=config.init_std),
    rules=_rules,
    parallel_plan=lambda config: encoder_plan(_spec(config)),
    hf_model_types=frozenset({"bert"}),
    from_hf=CONFIG_JSON.read,
    to_hf=CONFIG_JSON.write,
    explain=_explain,
)

get_bert_model_hub = ModelHubAccessor("bert", Bert, BertConfig)
