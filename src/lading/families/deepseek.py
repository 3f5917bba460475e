"""DeepSeek V3 (https://arxiv.org/abs/2412.19437) and R1 (https://arxiv.org/abs/2501.12948)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lading.families.config_json import ConfigReader, ConfigTable, Field, KeyGroup
from lading.families.decoder_family import (
    CHANGES_EACH_DECODER,
    NO_TOKENS,
    NO_WINDOWS,
    ROPE_KEYS,
    SILU,
    DecoderConfig,
    decoder_family,
    read_rope,
)
from lading.families.name_rules import DECODER_RULES, expert_rules
from lading.families.nn.checks import MAX_LAYERS
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.experts_spec import ExpertsSpec
from lading.families.nn.latent_spec import LatentSpec
from lading.families.nn.rope_scaling import YaRNScaling
from lading.families.yarn import YaRNScaleConfig, read_yarn, yarn_keys, yarn_scaling
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred

if TYPE_CHECKING:
    import torch

    from lading.families.nn.decoder_models import DeepSeek as DeepSeek
else:
    __getattr__ = deferred(globals(), DeepSeek="lading.families.nn.decoder_models")


def _default_yarn() -> YaRNScaleConfig:
    return YaRNScaleConfig(scale_factor=40.0, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=1.0)


@dataclass(kw_only=True)
class DeepSeekConfig(DecoderConfig):
    """The configuration of a DeepSeek model; the defaults are those of V3, with 671 billion parameters."""

    model_dim: int = 7168
    max_seq_len: int = 163_840
    vocab_size: int = 129_280
    num_layers: int = 61
    num_attn_heads: int = 128
    num_key_value_heads: int = 128
    rope_theta: float = 10_000.0

    pad_idx: int | None = None
    """The index of the symbol for padding."""

    ffn_inner_dim: int = 18_432
    """The inner width of the feed-forward networks in layers without experts."""

    query_rank: int | None = 1536
    """The width of the latent vector of queries; ``None`` if they are projected in one step."""

    key_value_rank: int = 512
    """The width of the latent vector of keys and values."""

    head_dim: int = 128
    """The width of the part of queries and keys that is not rotated."""

    rotary_dim: int = 64
    """The width of the rotated part of queries and keys."""

    value_dim: int = 128
    """The width of the values of a head."""

    attn_bias: bool = False
    """True if the projections to latent vectors, and that of the output of attention, have a bias."""

    interleaved_rope: bool = True
    """True if the rotary embedding pairs adjacent channels, rather than the halves of a head."""

    yarn_scale_config: YaRNScaleConfig | None = field(default_factory=_default_yarn)
    """The scaling of the rotary frequencies; ``None`` means no scaling."""

    num_dense_layers: int = 3
    """The number of layers, from the first, without experts."""

    num_experts: int = 256
    """The number of experts in a layer; a router chooses some for each token."""

    top_k: int = 8
    """The number of experts that are chosen for a token."""

    expert_inner_dim: int = 2048
    """The inner width of an expert."""

    num_shared_experts: int = 1
    """The number of experts that process all tokens, as one network of their width together."""

    num_groups: int = 8
    """The number of groups of experts."""

    top_k_groups: int = 4
    """The number of groups from which the experts of a token are chosen."""

    normalize_scores: bool = True
    """True if the scores of the chosen experts are divided by their sum."""

    score_scale: float = 2.5
    """The factor of these scores."""

    num_mtp_layers: int = 1
    """The number of further layers in a checkpoint, which draft further tokens; they are not part of the model."""

    norm_eps: float = 1e-6
    """The number that is added to the mean square before taking its root."""


def _spec(config: DeepSeekConfig) -> DecoderSpec:
    if config.num_dense_layers < 0 or config.num_mtp_layers < 0:
        raise ValueError(
            f"`num_dense_layers` and `num_mtp_layers` must not be negative, but are {config.num_dense_layers} and "
            f"{config.num_mtp_layers}"
        )
    if config.num_mtp_layers > MAX_LAYERS:
        raise ValueError(f"`num_mtp_layers` must be at most {MAX_LAYERS}, but is {config.num_mtp_layers}")
    latent = LatentSpec(
        query_rank=config.query_rank,
        key_value_rank=config.key_value_rank,
        head_dim=config.head_dim,
        rotary_dim=config.rotary_dim,
        value_dim=config.value_dim,
        bias=config.attn_bias,
    )
    yarn = config.yarn_scale_config
    sharpening = 1.0
    if yarn is not None and yarn.mscale_all_dim:
        sharpening = YaRNScaling.default_amplitude(yarn.scale_factor, yarn.mscale_all_dim)
    spec = DecoderSpec.of(
        config,
        head_dim=latent.query_dim,
        latent=latent,
        adjacent_rotary=config.interleaved_rope,
        attn_scale=latent.query_dim**-0.5 * sharpening * sharpening,
        rope_scaling=None if yarn is None else yarn_scaling(yarn),
    )
    layers = frozenset(range(config.num_dense_layers, config.num_layers))
    if not layers:
        return spec

    return spec.with_experts(
        ExpertsSpec(
            num_experts=config.num_experts,
            top_k=config.top_k,
            inner_dim=config.expert_inner_dim,
            layers=layers,
            shared_inner_dim=config.num_shared_experts * config.expert_inner_dim,
            scores="sigmoid",
            normalized=config.normalize_scores,
            scale=config.score_scale,
            correction_bias=True,
            num_groups=config.num_groups,
            top_k_groups=config.top_k_groups,
            wide_router=True,
        )
    )


def _require_head_dim(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers writes the width of the rotated part, and reads it.
    keys.require("head_dim", earlier["rotary_dim"])

    return {}


def _read_rope(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    theta, scaling = read_rope(keys, "yarn")
    yarn = None if scaling is None else read_yarn(scaling, earlier["max_seq_len"])

    return {"rope_theta": theta, "yarn_scale_config": yarn}


def _rope_keys(config: DeepSeekConfig) -> Mapping[str, object]:
    yarn, scaling = config.yarn_scale_config, None
    if yarn is not None:
        scaling = yarn_keys(yarn) | {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
        if yarn.amplitude is None:  # these keys say it
            del scaling["attention_factor"]

    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


CONFIG_JSON = ConfigTable(
    family="deepseek",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    config_kls=DeepSeekConfig,
    spec=_spec,
    entries=(
        SILU,
        Field("model_dim", "hidden_size", ConfigReader.count, 7168),
        Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 4096),
        Field("vocab_size", "vocab_size", ConfigReader.count, 129_280),
        Field("pad_idx", "pad_token_id", ConfigReader.index),
        Field("tied_embeddings", "tie_word_embeddings", ConfigReader.flag, False),
        Field("num_layers", "num_hidden_layers", ConfigReader.layers, 61),
        Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 128),
        Field("num_key_value_heads", "num_key_value_heads", ConfigReader.maybe_count, 128, null="num_attn_heads"),
        Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 18_432),
        Field("query_rank", "q_lora_rank", ConfigReader.maybe_count, 1536),
        Field("key_value_rank", "kv_lora_rank", ConfigReader.count, 512),
        Field("head_dim", "qk_nope_head_dim", ConfigReader.count, 128),
        Field("rotary_dim", "qk_rope_head_dim", ConfigReader.count, 64),
        KeyGroup(("head_dim",), _require_head_dim, lambda config: {}),
        Field("value_dim", "v_head_dim", ConfigReader.count, 128),
        Field("attn_bias", "attention_bias", ConfigReader.flag, False),
        Field("interleaved_rope", "rope_interleave", ConfigReader.flag, True),
        Field("num_dense_layers", "first_k_dense_replace", ConfigReader.count_or_zero, 3),
        Field("num_experts", "n_routed_experts", ConfigReader.count, 256),
        Field("top_k", "num_experts_per_tok", ConfigReader.count, 8),
        Field("expert_inner_dim", "moe_intermediate_size", ConfigReader.count, 2048),
        Field("num_shared_experts", "n_shared_experts", ConfigReader.count, 1),
        Field("num_groups", "n_group", ConfigReader.count, 8),
        Field("top_k_groups", "topk_group", ConfigReader.count, 4),
        Field("normalize_scores", "norm_topk_prob", ConfigReader.flag, True),
        Field("score_scale", "routed_scaling_factor", ConfigReader.number, 2.5),
        Field("num_mtp_layers", "num_nextn_predict_layers", ConfigReader.count_or_zero, 1),
        Field("norm_eps", "rms_norm_eps", ConfigReader.number, 1e-6),
        KeyGroup(ROPE_KEYS, _read_rope, _rope_keys),
    ),
    constants=NO_TOKENS,
    required={
        **CHANGES_EACH_DECODER,
        **NO_WINDOWS,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    ignored={
        "aux_loss_alpha": "training",
        "ep_size": "how the publisher computed the same",
        "output_router_logits": "training",
        "qk_head_dim": "the sum of the widths of its parts",
        "seq_aux": "training",
    },
)
"""The keys of ``config.json``."""


def _rules(config: DeepSeekConfig) -> Sequence[Rule]:
    further = range(config.num_layers, config.num_layers + config.num_mtp_layers)

    return (
        *(Rule(f"{prefix}layers.{i}.{{rest*}}", None) for i in further for prefix in ("model.", "")),
        *expert_rules(),
        *expert_rules(prefix=""),
        *DECODER_RULES,
    )


def _dtypes(model: DeepSeek, config: DeepSeekConfig, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    import torch

    return {name: torch.float32 for name in model.state_dict() if name.endswith(".e_score_correction_bias")}


FAMILY: Family[DeepSeek, DeepSeekConfig] = decoder_family(
    "lading.families.nn.decoder_models:DeepSeek",
    _spec,
    CONFIG_JSON,
    rules=_rules,
    published=lambda config: tuple(expert_rules()),
    dtypes=_dtypes,
)

get_deepseek_model_hub: ModelHubAccessor[DeepSeek, DeepSeekConfig] = ModelHubAccessor(
    "deepseek", FAMILY.kls, DeepSeekConfig
)
