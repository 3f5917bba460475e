"""Qwen 2.5 (https://arxiv.org/abs/2412.15115) and the dense models of Qwen 3 (https://arxiv.org/abs/2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
    Entries,
    Field,
    KeyGroup,
    explain_head,
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
    """True if the output projection is the embedding table."""

    num_layers: int = 28
    """The number of decoder layers."""

    num_attn_heads: int = 28
    """The number of attention heads."""

    num_key_value_heads: int = 4
    """The number of key and value heads; each serves a group of attention heads."""

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

    ffn_inner_dim: int = 18_944
    """The inner width of the feed-forward networks."""

    norm_eps: float = 1e-6
    """The number that is added to the mean square before taking its root."""

    rope_theta: float = 1_000_000.0
    """The base of the frequencies of the rotary position embeddings."""

    dropout_p: float = 0.0
    """The dropout probability of the embeddings and of the outputs of attention and feed-forward blocks."""

    init_std: float | None = None
    """The standard deviation of the initial weights; ``None`` means ``input_dim ** -0.5`` of each projection."""


class Qwen(DecoderLM):
    """A Qwen language model."""


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
    KeyGroup(
        ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        _read_window,
        _window_keys,
    ),
    Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 22_016),
    Field("norm_eps", "rms_norm_eps", ConfigReader.number, 1e-6),
    PLAIN_ROPE,
)

QWEN_2_JSON = ConfigTable(
    family="qwen",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    config_kls=QwenConfig,
    spec=DecoderSpec.of,
    normalized_spec=lambda config: DecoderSpec.of(config).normalized(),
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
        Field(
            "head_dim", "head_dim", ConfigReader.count, 128, write=lambda config: DecoderSpec.of(config).attn_head_dim
        ),
    ),
    fixed={"qkv_proj_bias": False, "q_norm": True, "k_norm": True},
    constants={**NO_TOKENS, "attention_bias": False},
    # It would be on the output projection, too.
    required={**CHANGES_EACH_DECODER, "attention_bias": False},
)
"""The keys of ``config.json`` of Qwen 3."""


def _from_hf(values: Mapping[str, object]) -> QwenConfig:
    return (QWEN_3_JSON if values.get("model_type") == "qwen3" else QWEN_2_JSON).read(values)


def _to_hf(config: QwenConfig) -> Mapping[str, object]:
    return (QWEN_3_JSON if config.q_norm and config.k_norm else QWEN_2_JSON).write(config)


def _rules(config: QwenConfig) -> Sequence[Rule]:
    return (*fairseq2_rules(None), *DECODER_RULES)


FAMILY = Family(
    name="qwen",
    kls=Qwen,
    config_kls=QwenConfig,
    build=lambda config: Qwen(DecoderSpec.of(config)),
    init=lambda model, config, name, parameter: init_decoder(model, name, parameter, std=config.init_std),
    rules=_rules,
    parallel_plan=lambda config: decoder_plan(DecoderSpec.of(config)),
    hf_model_types=frozenset({"qwen2", "qwen3"}),
    from_hf=_from_hf,
    to_hf=_to_hf,
    explain=explain_head,
)

get_qwen_model_hub = ModelHubAccessor("qwen", Qwen, QwenConfig)
