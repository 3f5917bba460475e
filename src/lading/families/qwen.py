"""Qwen 2.5 (https://arxiv.org/abs/2412.15115) and the dense models of Qwen 3 (https://arxiv.org/abs/2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pydantic import ConfigDict

from lading.cards.config import STRICT
from lading.families.config_json import (
    DECODER_RULES,
    NO_SCALING,
    ConfigReader,
    decoder_keys,
    decoder_values,
    describing,
    explain_head,
    read_decoder_config,
    read_rope,
)
from lading.families.name_rules import fairseq2_rules
from lading.families.nn.decoder_lm import DecoderLM, init_decoder
from lading.families.nn.decoder_plan import decoder_plan
from lading.families.nn.decoder_spec import DecoderSpec
from lading.models.family import Family
from lading.models.hub import ModelHubAccessor
from lading.planning.rules import Rule


@dataclass(kw_only=True)
class QwenConfig:
    """The configuration of a Qwen model; the defaults are those of Qwen 2.5 with 7 billion parameters."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model_dim: int = 3584
    """The width of the model."""

    max_seq_len: int = 32_768
    """The longest sequence, in tokens."""

    vocab_size: int = 152_064
    """The number of symbols."""

    tied_embeddings: bool = False
    """Whether the output projection is the embedding table."""

    num_layers: int = 28
    """The number of decoder layers."""

    num_attn_heads: int = 28
    """The number of attention heads."""

    num_key_value_heads: int = 4
    """The number of heads of keys and values, each of which serves a group of attention heads."""

    head_dim: int | None = None
    """The width of an attention head; ``None`` means ``model_dim // num_attn_heads``."""

    qkv_proj_bias: bool = True
    """Whether the projections of queries, keys and values have a bias."""

    q_norm: bool = False
    """Whether queries are normalised, head by head."""

    k_norm: bool = False
    """Whether keys are normalised, head by head."""

    attn_window_len: int | None = None
    """The number of tokens, itself included, that a token attends to."""

    num_full_attn_layers: int = 0
    """The number of layers, from the first, that have no window."""

    ffn_inner_dim: int = 18_944
    """The inner width of the feed-forward networks."""

    norm_eps: float = 1e-6
    """What is added to the mean square before its root is taken."""

    rope_theta: float = 1_000_000.0
    """The base of the frequencies of the rotary position embeddings."""

    dropout_p: float = 0.0
    """The dropout probability of the embeddings and of the outputs of attention and feed-forward blocks."""

    init_std: float | None = None
    """The standard deviation of random weights; ``None`` means ``input_dim ** -0.5`` of each projection."""


class Qwen(DecoderLM):
    """A Qwen language model."""


def _spec(config: QwenConfig) -> DecoderSpec:
    return DecoderSpec(
        model_dim=config.model_dim,
        vocab_size=config.vocab_size,
        max_seq_len=config.max_seq_len,
        tied_embeddings=config.tied_embeddings,
        num_layers=config.num_layers,
        num_attn_heads=config.num_attn_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        qkv_proj_bias=config.qkv_proj_bias,
        q_norm=config.q_norm,
        k_norm=config.k_norm,
        attn_window_len=config.attn_window_len,
        num_full_attn_layers=config.num_full_attn_layers,
        ffn_inner_dim=config.ffn_inner_dim,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        dropout_p=config.dropout_p,
    )


_KEYS = decoder_keys(
    "hidden_act attention_bias head_dim sliding_window use_sliding_window max_window_layers layer_types",
    ignored=NO_SCALING,
)


def _from_hf(values: Mapping[str, object]) -> QwenConfig:
    keys = read_decoder_config(values, "qwen", _KEYS)
    rope_theta, _ = read_rope(keys)
    num_attn_heads = keys.count("num_attention_heads", 32)
    num_layers = keys.layers("num_hidden_layers", 32)
    window, num_full = _windows(keys, num_layers)

    if third := values.get("model_type") == "qwen3":
        keys.require("attention_bias", False)  # which would be on the output projection as well

    config = QwenConfig(
        model_dim=keys.count("hidden_size", 4096),
        max_seq_len=keys.count("max_position_embeddings", 32_768),
        vocab_size=keys.count("vocab_size", 151_936),
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        num_layers=num_layers,
        num_attn_heads=num_attn_heads,
        num_key_value_heads=keys.maybe_count("num_key_value_heads", 32) or num_attn_heads,
        head_dim=keys.count("head_dim", 128) if third else keys.maybe_count("head_dim", None),
        qkv_proj_bias=not third,
        q_norm=third,
        k_norm=third,
        attn_window_len=window,
        num_full_attn_layers=num_full,
        ffn_inner_dim=keys.count("intermediate_size", 22_016),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
    )

    return keys.checked(config, _spec)


def _windows(keys: ConfigReader, num_layers: int) -> tuple[int | None, int]:
    """The attention window, and the number of layers, from the first, that have none."""
    window = keys.maybe_count("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
    layer_types = keys.strings("layer_types")

    if layer_types is None:
        num_full = keys.index("max_window_layers", 28) or 0
    else:
        num_full = layer_types.count("full_attention")
        slid = ["sliding_attention"] * (num_layers - num_full)
        if layer_types != ["full_attention"] * num_full + slid or (slid and window is None):
            keys.refuse("layer_types", layer_types)

    return (None, 0) if window is None or num_full >= num_layers else (window, num_full)


def _to_hf(config: QwenConfig) -> Mapping[str, object]:
    third = config.q_norm and config.k_norm
    if third:  # of which a file that does not say it means 128
        config = replace(config, head_dim=_spec(config).attn_head_dim)
    window = config.attn_window_len
    full = config.num_layers if window is None else min(config.num_full_attn_layers, config.num_layers)
    values = decoder_values(
        "qwen3" if third else "qwen2",
        "Qwen3ForCausalLM" if third else "Qwen2ForCausalLM",
        config,
        **({"attention_bias": False} if third else {}),
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=full,
        layer_types=["full_attention"] * full + ["sliding_attention"] * (config.num_layers - full),
        rms_norm_eps=config.norm_eps,
        hidden_act="silu",
    )
    # A window that no layer has is none.
    if full == config.num_layers:
        config = replace(config, attn_window_len=None, num_full_attn_layers=0)

    return describing(values, config, family="qwen", from_hf=_from_hf, spec=_spec)


def _rules(config: QwenConfig) -> Sequence[Rule]:
    return (*fairseq2_rules(None), *DECODER_RULES)


FAMILY = Family(
    name="qwen",
    kls=Qwen,
    config_kls=QwenConfig,
    build=lambda config: Qwen(_spec(config)),
    init=lambda model, config, name, parameter: init_decoder(model, name, parameter, std=config.init_std),
    rules=_rules,
    parallel_plan=lambda config: decoder_plan(_spec(config)),
    hf_model_types=frozenset({"qwen2", "qwen3"}),
    from_hf=_from_hf,
    to_hf=_to_hf,
    explain=explain_head,
)

get_qwen_model_hub = ModelHubAccessor("qwen", Qwen, QwenConfig)
