"""Mistral (https://arxiv.org/abs/2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lading.families.config_json import ConfigReader, ConfigTable, Field
from lading.families.decoder_family import (
    CHANGES_EACH_DECODER,
    NO_SCALING,
    NO_TOKENS,
    PLAIN_ROPE,
    SILU,
    DecoderConfig,
    decoder_family,
)
from lading.families.name_rules import rules_of_adjacent_channels
from lading.families.nn.decoder_spec import DecoderSpec
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.decoder_models import Mistral as Mistral
else:
    __getattr__ = deferred(globals(), Mistral="lading.families.nn.decoder_models")


@dataclass(kw_only=True)
class MistralConfig(DecoderConfig):
    """The configuration of a Mistral model; the defaults are those of the first one with 7 billion parameters."""

    model_dim: int = 4096
    max_seq_len: int = 8192
    vocab_size: int = 32_000
    num_layers: int = 32
    num_attn_heads: int = 32
    num_key_value_heads: int = 8
    ffn_inner_dim: int = 14_336
    rope_theta: float = 10_000.0

    pad_idx: int | None = None
    """The index of the symbol for padding."""

    attn_window_len: int | None = 4096
    """The number of tokens, itself included, that a token attends to; ``None`` means all before it."""

    head_dim: int | None = None
    """The width of an attention head; ``None`` means ``model_dim // num_attn_heads``."""

    norm_eps: float = 1e-5
    """The number that is added to the mean square before taking its root."""


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


FAMILY: Family[Mistral, MistralConfig] = decoder_family(
    "lading.families.nn.decoder_models:Mistral", DecoderSpec.of, CONFIG_JSON, rules=rules_of_adjacent_channels
)

get_mistral_model_hub: ModelHubAccessor[Mistral, MistralConfig] = ModelHubAccessor("mistral", FAMILY.kls, MistralConfig)
