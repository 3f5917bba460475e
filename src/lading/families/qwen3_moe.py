"""The mixtures of experts of Qwen 3 (https://arxiv.org/abs/2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lading.families.config_json import ConfigReader, ConfigTable, Field, KeyGroup
from lading.families.decoder_family import (
    CHANGES_EACH_DECODER,
    NO_SCALING,
    NO_TOKENS,
    PLAIN_ROPE,
    SILU,
    DecoderConfig,
    decoder_family,
)
from lading.families.name_rules import DECODER_RULES, expert_rules
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.experts_spec import ExpertsSpec
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.decoder_models import Qwen3MoE as Qwen3MoE
else:
    __getattr__ = deferred(globals(), Qwen3MoE="lading.families.nn.decoder_models")


@dataclass(kw_only=True)
class Qwen3MoEConfig(DecoderConfig):
    """The configuration of a Qwen 3 mixture of experts; the defaults are those with 30 billion parameters."""

    model_dim: int = 2048
    max_seq_len: int = 40_960
    vocab_size: int = 151_936
    num_layers: int = 48
    num_attn_heads: int = 32
    num_key_value_heads: int = 4
    rope_theta: float = 1_000_000.0

    head_dim: int | None = 128
    """The width of an attention head; ``None`` means ``model_dim // num_attn_heads``."""

    attn_window_len: int | None = None
    """The number of tokens, itself included, that a token attends to."""

    ffn_inner_dim: int = 6144
    """The inner width of the feed-forward networks in layers without experts."""

    num_experts: int = 128
    """The number of experts in a layer."""

    top_k: int = 8
    """The number of experts that process a token."""

    expert_inner_dim: int = 768
    """The inner width of an expert."""

    normalize_scores: bool = True
    """True if the scores of the chosen experts are divided by their sum."""

    moe_layer_step: int = 1
    """Every so many layers have experts: with 2, the second, the fourth …"""

    dense_layers: list[int] = field(default_factory=list)
    """The indices of other layers without experts."""

    norm_eps: float = 1e-6
    """The number that is added to the mean square before taking its root."""


def _spec(config: Qwen3MoEConfig) -> DecoderSpec:
    if config.moe_layer_step < 1:
        raise ValueError(f"`moe_layer_step` must be positive, but is {config.moe_layer_step}")
    dense = frozenset(config.dense_layers)
    spec = DecoderSpec.of(config, q_norm=True, k_norm=True).normalized()
    layers = frozenset(i for i in range(config.num_layers) if (i + 1) % config.moe_layer_step == 0 and i not in dense)
    if not layers:
        return spec

    return spec.with_experts(
        ExpertsSpec(
            num_experts=config.num_experts,
            top_k=config.top_k,
            inner_dim=config.expert_inner_dim,
            layers=layers,
            normalized=config.normalize_scores,
        )
    )


def _read_window(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    used = keys.flag("use_sliding_window", False)

    return {"attn_window_len": keys.maybe_count("sliding_window", 4096) if used else None}


def _window_keys(config: Qwen3MoEConfig) -> Mapping[str, object]:
    return {"use_sliding_window": config.attn_window_len is not None, "sliding_window": config.attn_window_len}


def _read_experts(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 5 writes the second name.
    key = "num_local_experts" if "num_local_experts" in keys else "num_experts"

    return {"num_experts": keys.count(key, 128)}


CONFIG_JSON = ConfigTable(
    family="qwen3_moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    config_kls=Qwen3MoEConfig,
    spec=_spec,
    entries=(
        SILU,
        Field("model_dim", "hidden_size", ConfigReader.count, 2048),
        Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 32_768),
        Field("vocab_size", "vocab_size", ConfigReader.count, 151_936),
        Field("tied_embeddings", "tie_word_embeddings", ConfigReader.flag, False),
        Field("num_layers", "num_hidden_layers", ConfigReader.layers, 24),
        Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 32),
        Field("num_key_value_heads", "num_key_value_heads", ConfigReader.maybe_count, 4, null="num_attn_heads"),
        Field("head_dim", "head_dim", ConfigReader.maybe_count, optional=True),
        KeyGroup(("use_sliding_window", "sliding_window"), _read_window, _window_keys),
        Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 6144),
        KeyGroup(
            ("num_experts", "num_local_experts"), _read_experts, lambda config: {"num_experts": config.num_experts}
        ),
        Field("top_k", "num_experts_per_tok", ConfigReader.count, 8),
        Field("expert_inner_dim", "moe_intermediate_size", ConfigReader.count, 768),
        Field("normalize_scores", "norm_topk_prob", ConfigReader.flag, False),
        Field("moe_layer_step", "decoder_sparse_step", ConfigReader.count, 1),
        Field("dense_layers", "mlp_only_layers", ConfigReader.indices),
        Field("norm_eps", "rms_norm_eps", ConfigReader.number, 1e-6),
        PLAIN_ROPE,
    ),
    constants={**NO_TOKENS, "attention_bias": False},
    required={**CHANGES_EACH_DECODER, "attention_bias": False},
    ignored={
        **NO_SCALING,
        "max_window_layers": "transformers does not read it: all layers have the window, or none",
        "output_router_logits": "training",
        "pad_token_id": "its embedding is that of any other symbol",
        "router_aux_loss_coef": "training",
    },
)
"""The keys of ``config.json``."""


def _rules(config: Qwen3MoEConfig) -> Sequence[Rule]:
    return (*expert_rules(), *expert_rules(prefix=""), *DECODER_RULES)


FAMILY: Family[Qwen3MoE, Qwen3MoEConfig] = decoder_family(
    "lading.families.nn.decoder_models:Qwen3MoE",
    _spec,
    CONFIG_JSON,
    rules=_rules,
    published=lambda config: tuple(expert_rules()),
)

get_qwen3_moe_model_hub: ModelHubAccessor[Qwen3MoE, Qwen3MoEConfig] = ModelHubAccessor(
    "qwen3_moe", FAMILY.kls, Qwen3MoEConfig
)
