"""Mistral (https://arxiv.org/abs/2310.06825)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from lading.cards.config import STRICT
from lading.families.config_json import (
    DECODER_RULES,
    NO_SCALING,
    decoder_keys,
    decoder_values,
    describing,
    explain_head,
    read_decoder_config,
    read_rope,
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
    """Whether the output projection is the embedding table."""

    attn_window_len: int | None = 4096
    """The number of tokens, itself included, that a token attends to; ``None`` means all before it."""

    num_layers: int = 32
    """The number of decoder layers."""

    num_attn_heads: int = 32
    """The number of attention heads."""

    num_key_value_heads: int = 8
    """The number of heads of keys and values, each of which serves a group of attention heads."""

    head_dim: int | None = None
    """The width of an attention head; ``None`` means ``model_dim // num_attn_heads``."""

    ffn_inner_dim: int = 14_336
    """The inner width of the feed-forward networks."""

    norm_eps: float = 1e-5
    """What is added to the mean square before its root is taken."""

    rope_theta: float = 10_000.0
    """The base of the frequencies of the rotary position embeddings."""

    dropout_p: float = 0.0
    """The dropout probability of the embeddings and of the outputs of attention and feed-forward blocks."""

    init_std: float | None = None
    """The standard deviation of random weights; ``None`` means ``input_dim ** -0.5`` of each projection."""


class Mistral(DecoderLM):
    """A Mistral language model."""


def _spec(config: MistralConfig) -> DecoderSpec:
    return DecoderSpec(
        model_dim=config.model_dim,
        vocab_size=config.vocab_size,
        max_seq_len=config.max_seq_len,
        pad_idx=config.pad_idx,
        tied_embeddings=config.tied_embeddings,
        num_layers=config.num_layers,
        num_attn_heads=config.num_attn_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        attn_window_len=config.attn_window_len,
        ffn_inner_dim=config.ffn_inner_dim,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        dropout_p=config.dropout_p,
    )


_KEYS = decoder_keys("hidden_act head_dim sliding_window", required={"layer_types": None}, ignored=NO_SCALING)


def _from_hf(values: Mapping[str, object]) -> MistralConfig:
    keys = read_decoder_config(values, "mistral", _KEYS)
    rope_theta, _ = read_rope(keys)
    num_attn_heads = keys.count("num_attention_heads", 32)

    config = MistralConfig(
        model_dim=keys.count("hidden_size", 4096),
        max_seq_len=keys.count("max_position_embeddings", 131_072),
        vocab_size=keys.count("vocab_size", 32_000),
        pad_idx=keys.index("pad_token_id", None),
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        attn_window_len=keys.maybe_count("sliding_window", 4096),
        num_layers=keys.layers("num_hidden_layers", 32),
        num_attn_heads=num_attn_heads,
        num_key_value_heads=keys.maybe_count("num_key_value_heads", 8) or num_attn_heads,
        head_dim=keys.maybe_count("head_dim", None),
        ffn_inner_dim=keys.count("intermediate_size", 14_336),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
    )

    return keys.checked(config, _spec)


def _to_hf(config: MistralConfig) -> Mapping[str, object]:
    values = decoder_values(
        "mistral",
        "MistralForCausalLM",
        config,
        pad_token_id=config.pad_idx,
        sliding_window=config.attn_window_len,
        rms_norm_eps=config.norm_eps,
        hidden_act="silu",
    )

    return describing(values, config, family="mistral", from_hf=_from_hf, spec=_spec)


def _rules(config: MistralConfig) -> Sequence[Rule]:
    head_dim = config.head_dim or config.model_dim // config.num_attn_heads

    return (*meta_rules(head_dim), *fairseq2_rules(head_dim), *DECODER_RULES)


FAMILY = Family(
    name="mistral",
    kls=Mistral,
    config_kls=MistralConfig,
    build=lambda config: Mistral(_spec(config)),
    init=lambda model, config, name, parameter: init_decoder(model, name, parameter, std=config.init_std),
    rules=_rules,
    parallel_plan=lambda config: decoder_plan(_spec(config)),
    hf_model_types=frozenset({"mistral"}),
    from_hf=_from_hf,
    to_hf=_to_hf,
    explain=explain_head,
)

get_mistral_model_hub = ModelHubAccessor("mistral", Mistral, MistralConfig)
