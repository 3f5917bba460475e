"""Qwen 2.5 (https://arxiv.org/abs/2412.15115) and the dense models of Qwen 3 (https://arxiv.org/abs/2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lading.families.config_json import ConfigReader, ConfigTable, Entries, Field, KeyGroup
from lading.families.decoder_family import (
    CHANGES_EACH_DECODER,
    NO_SCALING,
    NO_TOKENS,
    PLAIN_ROPE,
    SILU,
    DecoderConfig,
    decoder_family,
)
from lading.families.name_rules import fairseq2_rules
from lading.families.nn.checks import require_layers
from lading.families.nn.decoder_spec import DecoderSpec
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.decoder_models import Qwen as Qwen
else:
    __getattr__ = deferred(globals(), Qwen="lading.families.nn.decoder_models")


@dataclass(kw_only=True)
class QwenConfig(DecoderConfig):
    """The configuration of a Qwen model; the defaults are those of Qwen 2.5 with 7 billion parameters."""

    model_dim: int = 3584
    max_seq_len: int = 32_768
    vocab_size: int = 152_064
    num_layers: int = 28
    num_attn_heads: int = 28
    num_key_value_heads: int = 4
    ffn_inner_dim: int = 18_944
    rope_theta: float = 1_000_000.0

    head_dim: int | None = None
    """The width of an attention head; ``None`` means ``model_dim // num_attn_heads``."""

    qkv_proj_bias: bool = True
    """True if the projections of queries, keys and values have a bias."""

    q_norm: bool = False
    """True if queries are normalized per head."""

    k_norm: bool = False
    """True if keys are normalized per head."""

    attn_window_len: int | None = None
    """The number of tokens, itself included, that a token attends to."""

    num_full_attn_layers: int = 0
    """The number of layers, from the first, without a window."""

    norm_eps: float = 1e-6
    """The number that is added to the mean square before taking its root."""


def _spec(config: QwenConfig) -> DecoderSpec:
    require_layers(config.num_layers)

    return DecoderSpec.of(
        config, full_attn_layers=frozenset(range(min(config.num_full_attn_layers, config.num_layers)))
    )


def _read_window(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    window = keys.maybe_count("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
    layer_types = keys.strings("layer_types")

    if layer_types is None:
        num_full = keys.index("max_window_layers", 28) or 0
    else:
        num_full = layer_types.count("full_attention")
        slid = ["sliding_attention"] * (earlier["num_layers"] - num_full)
        if layer_types != ["full_attention"] * num_full + slid or (slid and window is None):
            keys.refuse("layer_types", layer_types)
    if window is None or num_full >= earlier["num_layers"]:
        window, num_full = None, 0

    return {"attn_window_len": window, "num_full_attn_layers": num_full}


def _window_keys(config: QwenConfig) -> Mapping[str, object]:
    window = config.attn_window_len
    full = config.num_layers if window is None else min(config.num_full_attn_layers, config.num_layers)

    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": full,
        "layer_types": ["full_attention"] * full + ["sliding_attention"] * (config.num_layers - full),
    }


_ENTRIES: Entries = (
    SILU,
    Field("model_dim", "hidden_size", ConfigReader.count, 4096),
    Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 32_768),
    Field("vocab_size", "vocab_size", ConfigReader.count, 151_936),
    Field("tied_embeddings", "tie_word_embeddings", ConfigReader.flag, False),
    Field("num_layers", "num_hidden_layers", ConfigReader.layers, 32),
    Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 32),
    Field("num_key_value_heads", "num_key_value_heads", ConfigReader.maybe_count, 32, null="num_attn_heads"),
    KeyGroup(("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), _read_window, _window_keys),
    Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 22_016),
    Field("norm_eps", "rms_norm_eps", ConfigReader.number, 1e-6),
    PLAIN_ROPE,
)

QWEN_2_JSON = ConfigTable(
    family="qwen",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    config_kls=QwenConfig,
    spec=lambda config: _spec(config).normalized(),
    entries=(*_ENTRIES, Field("head_dim", "head_dim", ConfigReader.maybe_count, optional=True)),
    fixed={"qkv_proj_bias": True, "q_norm": False, "k_norm": False},
    constants=NO_TOKENS,
    required=CHANGES_EACH_DECODER,
    ignored={
        **NO_SCALING,
        "attention_bias": "transformers does not read it: these models have biases",
        "pad_token_id": "its embedding is that of any other symbol",
    },
)
"""The keys of ``config.json`` of Qwen 2.5."""

QWEN_3_JSON = replace(
    QWEN_2_JSON,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    entries=(
        *_ENTRIES,
        Field("head_dim", "head_dim", ConfigReader.count, 128, write=lambda config: _spec(config).attn_head_dim),
    ),
    fixed={"qkv_proj_bias": False, "q_norm": True, "k_norm": True},
    constants={**NO_TOKENS, "attention_bias": False},
    # It would be on the output projection, too.
    required={**CHANGES_EACH_DECODER, "attention_bias": False},
)
"""The keys of ``config.json`` of Qwen 3."""


def _to_hf(config: QwenConfig) -> Mapping[str, object]:
    return (QWEN_3_JSON if config.q_norm and config.k_norm else QWEN_2_JSON).write(config)


FAMILY: Family[Qwen, QwenConfig] = decoder_family(
    "lading.families.nn.decoder_models:Qwen",
    _spec,
    QWEN_2_JSON,
    QWEN_3_JSON,
    to_hf=_to_hf,
    rules=lambda config: fairseq2_rules(),
)

get_qwen_model_hub: ModelHubAccessor[Qwen, QwenConfig] = ModelHubAccessor("qwen", FAMILY.kls, QwenConfig)
