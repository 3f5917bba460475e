"""Gemma 3 (https://arxiv.org/abs/2503.19786): the text models, and the decoders of the multimodal models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lading.families.config_json import ConfigReader, ConfigTable, Field, KeyGroup, same_for_all
from lading.families.decoder_family import (
    CHANGES_EACH_DECODER,
    NO_TOKENS,
    ROPE_KEYS,
    DecoderConfig,
    LayerType,
    decoder_family,
    default_layer_types,
    full_attn_layers,
    read_layer_types,
    read_rope_of_layers,
)
from lading.families.name_rules import DECODER_RULES, text_part_rules
from lading.families.nn.checks import require_positive
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.rope_scaling import LinearScaling
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.decoder_models import Gemma3 as Gemma3
else:
    __getattr__ = deferred(globals(), Gemma3="lading.families.nn.decoder_models")


@dataclass(kw_only=True)
class Gemma3Config(DecoderConfig):
    """The configuration of a Gemma 3 model; the defaults are those of the model with a billion parameters."""

    max_seq_len: int = 32_768
    vocab_size: int = 262_144
    tied_embeddings: bool = True
    num_layers: int = 26
    num_attn_heads: int = 4
    num_key_value_heads: int = 1
    ffn_inner_dim: int = 6912
    init_std: float | None = 0.02

    model_dim: int = 1152
    """The width of the model; embeddings are multiplied by its root."""

    pad_idx: int | None = 0
    """The index of the symbol for padding."""

    head_dim: int = 256
    """The width of an attention head."""

    attn_scale_dim: int = 256
    """The number whose root divides attention scores."""

    sliding_window: int = 512
    """The number of tokens, itself included, that a token attends to in layers with a window."""

    layer_types: list[LayerType] | None = None
    """The type of each layer; ``None`` means a window in five of six layers."""

    norm_eps: float = 1e-6
    """The number that is added to the mean square before taking its root."""

    rope_theta: float = 1_000_000.0
    """The base of the frequencies of the rotary position embeddings, in layers without a window."""

    rope_factor: float | None = None
    """The factor that stretches wavelengths in layers without a window; ``None`` means no stretching."""

    local_rope_theta: float = 10_000.0
    """The base of the frequencies in layers with a window."""


def _spec(config: Gemma3Config) -> DecoderSpec:
    require_positive(config, "model_dim", "attn_scale_dim")

    return DecoderSpec.of(
        config,
        embed_scale=config.model_dim**0.5,
        q_norm=True,
        k_norm=True,
        attn_scale=config.attn_scale_dim**-0.5,
        attn_window_len=config.sliding_window,
        full_attn_layers=full_attn_layers(_layer_types(config), config.num_layers),
        ffn_activation="gelu_tanh",
        norms="both",
        wide_norm=True,
        norm_offset=1.0,
        rope_scaling=None if config.rope_factor is None else LinearScaling(factor=config.rope_factor),
        window_rope_theta=config.local_rope_theta,
    )


def _layer_types(config: Gemma3Config) -> list[LayerType]:
    return default_layer_types(config.num_layers, every=6) if config.layer_types is None else config.layer_types


def _read_types(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    every = keys.count("sliding_window_pattern", 6)

    return {"layer_types": read_layer_types(keys, earlier["num_layers"], every=every)}


def _read_rope(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    theta, scaling, local_theta = read_rope_of_layers(
        keys,
        theta=1_000_000.0,
        window_theta=10_000.0,
        window_theta_key="rope_local_base_freq",
        scaling_type="linear",
    )
    factor = None if scaling is None else scaling.number("factor", None)

    return {"rope_theta": theta, "rope_factor": factor, "local_rope_theta": local_theta}


def _rope_keys(config: Gemma3Config) -> Mapping[str, object]:
    factor = config.rope_factor

    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if factor is None else {"rope_type": "linear", "factor": factor},
        "rope_local_base_freq": config.local_rope_theta,
    }


CONFIG_JSON = ConfigTable(
    family="gemma3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    config_kls=Gemma3Config,
    spec=_spec,
    entries=(
        same_for_all("hidden_activation", "gelu_pytorch_tanh"),
        Field("model_dim", "hidden_size", ConfigReader.count, 2304),
        Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 131_072),
        Field("vocab_size", "vocab_size", ConfigReader.count, 262_208),
        Field("pad_idx", "pad_token_id", ConfigReader.index, 0),
        Field("tied_embeddings", "tie_word_embeddings", ConfigReader.flag, True),
        Field("num_layers", "num_hidden_layers", ConfigReader.layers, 26),
        Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 8),
        Field("num_key_value_heads", "num_key_value_heads", ConfigReader.count, 4),
        Field("head_dim", "head_dim", ConfigReader.count, 256),
        Field("attn_scale_dim", "query_pre_attn_scalar", ConfigReader.count, 256),
        Field("sliding_window", "sliding_window", ConfigReader.count, 4096),
        KeyGroup(
            ("layer_types", "sliding_window_pattern"),
            _read_types,
            lambda config: {"layer_types": _layer_types(config)},
        ),
        Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 9216),
        Field("norm_eps", "rms_norm_eps", ConfigReader.number, 1e-6),
        KeyGroup((*ROPE_KEYS, "rope_local_base_freq"), _read_rope, _rope_keys),
        Field("init_std", "initializer_range", ConfigReader.number, 0.02, optional=True),
    ),
    constants=NO_TOKENS,
    required={
        **CHANGES_EACH_DECODER,
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    ignored={
        "original_max_position_embeddings": "transformers reads it in rope_parameters only",
        "_sliding_window_pattern": "what transformers made of sliding_window_pattern; layer_types say it",
        "hidden_act": "transformers reads hidden_activation",
    },
)
"""The keys of ``config.json`` of text models, and of ``text_config`` of multimodal models."""


FAMILY: Family[Gemma3, Gemma3Config] = decoder_family(
    "lading.families.nn.decoder_models:Gemma3",
    _spec,
    CONFIG_JSON,
    init_std_scale="none",
    rules=lambda config: (*text_part_rules("vision_tower", "multi_modal_projector"), *DECODER_RULES),
    hf_part_of=frozenset({"gemma3"}),
)

get_gemma3_model_hub: ModelHubAccessor[Gemma3, Gemma3Config] = ModelHubAccessor("gemma3", FAMILY.kls, Gemma3Config)
