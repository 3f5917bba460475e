"""Mistral (https://arxiv.org/abs/2310.06825)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from lading.cards.config import STRICT
from lading.families.config_json import (
    CHANGES_EACH_DECODER,
    DECODER_RULES,
    NO_SCALING,
    NO_TOKENS,
    PLAIN_ROPE,
    SILU,
    ConfigReader,
    ConfigTable,
    Field,
    explain_head,
)
from lading.families.name_rules import fairseq2_rules, meta_rules
from lading.families.nn.decoder_lm import DecoderLM, init_decoder
from lading.families.nn.decoder_plan import decoder_plan
from lading.families.nn.decoder_spec import DecoderSpec
from lading.models.family import Family
from lading.models.hub import ModelHubAccessor
from lading.planning.rules import Rule


@dataclass(kw_only=True)
class MistralConfig:
    """The configuration of a Mistral model; the defaults are those of the first one with 7 billion parameters."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model_dim: int = 4096
    """The width of the model."""

    max_seq_len: int = 8192
    """The longest sequence, in tokens."""

    vocab_size: int = 32_000
    """The number of symbols."""

    pad_idx: int | None = None
    """The index of the symbol for padding."""

    tied_embeddings: bool = False
    """True if the output projection is the embedding table."""

    attn_window_len: int | None = 4096
    """The number of tokens, itself included, that a token attends to; ``None`` means all before it."""

    num_layers: int = 32
    """The number of decoder layers."""

    num_attn_heads: int = 32
    """The number of attention heads."""

    num_key_value_heads: int = 8
    """The number of key and value heads; each serves a group of attention heads."""

    head_dim: int | None = None
    """The width of an attention head; ``None`` means ``model_dim // num_attn_heads``."""

    ffn_inner_dim: int = 14_336
    """The inner width of the feed-forward networks."""

    norm_eps: float = 1e-5
    """The number that is added to the mean square before taking its root."""

    rope_theta: float = 10_000.0
    """The base of the frequencies of the rotary position embeddings."""

    dropout_p: float = 0.0
    """The dropout probability of the embeddings and of the outputs of attention and feed-forward blocks."""

    init_std: float | None = None
    """The standard deviation of the initial weights; ``None`` means ``input_dim ** -0.5`` of each projection."""


class Mistral(DecoderLM):
    """A Mistral language model."""


CONFIG_JSON = ConfigTable(
    family="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    config_kls=MistralConfig,
    spec=DecoderSpec.of,
    entries=(
        SILU,
        Field("model_dim", "hidden_size", ConfigReader.count, 4096),
        Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 131_072),
        Field("vocab_size", "vocab_size", ConfigReader.count, 32_000),
        Field("pad_idx", "pad_token_id", ConfigReader.index),
        Field("tied_embeddings", "tie_word_embeddings", ConfigReader.flag, False),
        Field("attn_window_len", "sliding_window", ConfigReader.maybe_count, 4096),
        Field("num_layers", "num_hidden_layers", ConfigReader.layers, 32),
        Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 32),
        Field("num_key_value_heads", "num_key_value_heads", ConfigReader.maybe_count, 8, null="num_attn_heads"),
        Field("head_dim", "head_dim", ConfigReader.maybe_count, optional=True),
        Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 14_336),
        Field("norm_eps", "rms_norm_eps", ConfigReader.number, 1e-6),
        PLAIN_ROPE,
    ),
    constants=NO_TOKENS,
    required={**CHANGES_EACH_DECODER, "layer_types": None},
    ignored=NO_SCALING,
)
"""The keys of ``config.json``."""


def _rules(config: MistralConfig) -> Sequence[Rule]:
    head_dim = config.head_dim or config.model_dim // config.num_attn_heads

    return (*meta_rules(head_dim), *fairseq2_rules(head_dim), *DECODER_RULES)


FAMILY = Family(
    name="mistral",
    kls=Mistral,
    config_kls=MistralConfig,
    build=lambda config: Mistral(DecoderSpec.of(config)),
    init=lambda model, config, name, parameter: init_decoder(model, name, parameter, std=config.init_std),
    rules=_rules,
    parallel_plan=lambda config: decoder_plan(DecoderSpec.of(config)),
    hf_model_types=frozenset({"mistral"}),
    from_hf=CONFIG_JSON.read,
    to_hf=CONFIG_JSON.write,
    explain=explain_head,
)

get_mistral_model_hub = ModelHubAccessor("mistral", Mistral, MistralConfig)
