"""OLMo 2 (https://arxiv.org/abs/2501.00656) and 3 (https://arxiv.org/abs/2512.13961)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lading.errors import NotSupportedError
from lading.families.config_json import ConfigReader, ConfigTable, Entries, Field, KeyGroup
from lading.families.decoder_family import (
    CHANGES_EACH_DECODER,
    NO_SCALING,
    NO_WINDOWS,
    PLAIN_ROPE,
    ROPE_KEYS,
    SILU,
    DecoderConfig,
    LayerType,
    decoder_family,
    default_layer_types,
    full_attn_layers,
    read_layer_types,
    read_rope_of_layers,
)
from lading.families.name_rules import fairseq2_rules
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.yarn import YaRNScaleConfig as YaRNScaleConfig
from lading.families.yarn import read_yarn, yarn_keys, yarn_scaling
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.decoder_models import OLMO as OLMO
else:
    __getattr__ = deferred(globals(), OLMO="lading.families.nn.decoder_models")


@dataclass(kw_only=True)
class OLMOConfig(DecoderConfig):
    """The configuration of an OLMo model; the defaults are those of OLMo 2 with a billion parameters."""

    model_dim: int = 2048
    max_seq_len: int = 4096
    vocab_size: int = 100_352
    num_layers: int = 16
    num_attn_heads: int = 16
    num_key_value_heads: int = 16
    ffn_inner_dim: int = 8192
    rope_theta: float = 500_000.0

    pad_idx: int | None = 100_277
    """The index of the symbol for padding."""

    bos_token_id: int | None = None
    """The index of the symbol that begins a sequence; lading ignores it."""

    eos_token_id: int | None = 100_257
    """The index of the symbol that ends a sequence; lading ignores it."""

    rms_norm_eps: float = 1e-6
    """The number that is added to the mean square before taking its root."""

    init_std_scale: Literal["none", "layer", "stack"] = "layer"
    """The divisor of it in layers: none, from the depth of the layer, or from that of the stack."""

    shard_embed_dim: bool = True
    """Ignored: embeddings are split by symbols."""

    sliding_window: int | None = None
    """The number of tokens, itself included, that a token attends to in layers with a window (OLMo 3)."""

    layer_types: list[LayerType] | None = None
    """The type of each layer; ``None`` means a window in three of four layers, but not in the last."""

    yarn_scale_config: YaRNScaleConfig | None = None
    """The scaling of the rotary frequencies; ``None`` means no scaling."""

    yarn_in_all_layers: bool = False
    """True to scale them in layers with a window too, as fairseq2 0.8.1 does and the published models do not."""


def _spec(config: OLMOConfig) -> DecoderSpec:
    yarn = config.yarn_scale_config
    local = yarn is not None and config.sliding_window is not None and not config.yarn_in_all_layers

    return DecoderSpec.of(
        config,
        q_norm=True,
        k_norm=True,
        norm_whole=True,
        attn_window_len=config.sliding_window,
        full_attn_layers=full_attn_layers(_layer_types(config), config.num_layers),
        norms="after",
        wide_norm=True,
        norm_eps=config.rms_norm_eps,
        rope_scaling=None if yarn is None else yarn_scaling(yarn),
        window_rope_theta=config.rope_theta if local else None,
        wide_rotary=True,
    )


def _layer_types(config: OLMOConfig) -> list[LayerType]:
    if config.layer_types is not None:
        return config.layer_types

    return default_layer_types(config.num_layers, every=4, full_last=True)


def _require_head_dim(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    keys.require("head_dim", earlier["model_dim"] // earlier["num_attn_heads"])

    return {}


_ENTRIES: Entries = (
    SILU,
    Field("model_dim", "hidden_size", ConfigReader.count, 4096),
    Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 2048),
    Field("vocab_size", "vocab_size", ConfigReader.count, 50_304),
    Field("pad_idx", "pad_token_id", ConfigReader.index, 1),
    Field("bos_token_id", "bos_token_id", ConfigReader.index),
    # It is not read: there may be several.
    KeyGroup((), lambda keys, earlier: {"eos_token_id": None}, lambda config: {"eos_token_id": config.eos_token_id}),
    Field("tied_embeddings", "tie_word_embeddings", ConfigReader.flag, False),
    Field("num_layers", "num_hidden_layers", ConfigReader.layers, 32),
    Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 32),
    Field("num_key_value_heads", "num_key_value_heads", ConfigReader.maybe_count, null="num_attn_heads"),
    KeyGroup(("head_dim",), _require_head_dim, lambda config: {}),
    Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 11_008),
    Field("rms_norm_eps", "rms_norm_eps", ConfigReader.number, 1e-5),
)

OLMO_2_JSON = ConfigTable(
    family="olmo",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    config_kls=OLMOConfig,
    spec=lambda config: _spec(config).normalized(),
    entries=(*_ENTRIES, PLAIN_ROPE),
    constants={"attention_bias": False},
    required={**CHANGES_EACH_DECODER, **NO_WINDOWS, "attention_bias": False},
    ignored=NO_SCALING,
)
"""The keys of ``config.json`` of OLMo 2."""


def _read_windows(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    window = keys.maybe_count("sliding_window", 4096)
    layer_types = read_layer_types(keys, earlier["num_layers"], every=4)
    if window is None and "sliding_attention" in layer_types:
        keys.refuse("sliding_window", None)

    return {"sliding_window": window, "layer_types": layer_types}


def _window_keys(config: OLMOConfig) -> Mapping[str, object]:
    window = config.sliding_window

    return {
        "sliding_window": window or config.max_seq_len,  # it must be one, if no layer's
        "layer_types": ["full_attention"] * config.num_layers if window is None else _layer_types(config),
    }


def _read_rope(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    theta, scaling, window_theta = read_rope_of_layers(
        keys, theta=500_000.0, window_theta=500_000.0, window_theta_key=None, scaling_type="yarn"
    )
    if window_theta != theta:
        key = "rope_theta" if keys.is_null("rope_parameters") else "rope_parameters"
        keys.refuse(key, keys.values().get(key))
    yarn = None if scaling is None else read_yarn(scaling, earlier["max_seq_len"])

    return {"rope_theta": theta, "yarn_scale_config": yarn}


def _rope_keys(config: OLMOConfig) -> Mapping[str, object]:
    plain = {"rope_type": "default", "rope_theta": config.rope_theta}
    yarn = config.yarn_scale_config
    full = plain if yarn is None else plain | yarn_keys(yarn)

    return {"rope_parameters": {"full_attention": full, "sliding_attention": plain}}


OLMO_3_JSON = replace(
    OLMO_2_JSON,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    entries=(
        *_ENTRIES,
        KeyGroup(("sliding_window", "layer_types"), _read_windows, _window_keys),
        KeyGroup(ROPE_KEYS, _read_rope, _rope_keys),
    ),
    required={**CHANGES_EACH_DECODER, "attention_bias": False},
    ignored={"original_max_position_embeddings": "transformers reads it in rope_parameters only"},
)
"""The keys of ``config.json`` of OLMo 3."""


def _to_hf(config: OLMOConfig) -> Mapping[str, object]:
    third = config.sliding_window is not None or config.yarn_scale_config is not None

    return (OLMO_3_JSON if third else OLMO_2_JSON).write(config)


def _rules(config: OLMOConfig, names: Sequence[str]) -> Sequence[Rule]:
    # fairseq2 0.8.1 scales the frequencies of all layers, and that is what its trainer saved was trained with.
    scaled_apart = config.yarn_scale_config and config.sliding_window and not config.yarn_in_all_layers
    if scaled_apart and (name := next((name for name in names if name.startswith("decoder.layers.")), None)):
        raise NotSupportedError(
            f"The checkpoint holds {name!r}, a name of fairseq2, whose OLMo 3 scales rotary frequencies in all layers; "
            "the configuration scales them in layers without a window only. Set `yarn_in_all_layers: true` in the "
            "`model_config` of the card, or in the configuration that you pass."
        )

    return fairseq2_rules(norms_after=True)


FAMILY: Family[OLMO, OLMOConfig] = decoder_family(
    "lading.families.nn.decoder_models:OLMO", _spec, OLMO_2_JSON, OLMO_3_JSON, to_hf=_to_hf, rules_of_names=_rules
)

get_olmo_model_hub: ModelHubAccessor[OLMO, OLMOConfig] = ModelHubAccessor("olmo", FAMILY.kls, OLMOConfig)
