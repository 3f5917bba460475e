"""Gemma 3n (https://ai.google.dev/gemma/docs/gemma-3n): its language model, also of the whole multimodal model.

Sources: transformers (``models/gemma3n``) for the module and the names, fairseq2 0.8.1 (``models/gemma3n``) for the
configuration and for the names in its own checkpoints. Where both differ, the model is that of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from lading.families.config_json import ConfigReader, ConfigTable, Field, KeyGroup, read_fields, same_for_all
from lading.families.decoder_family import (
    CHANGES_EACH_DECODER,
    NO_TOKENS,
    ROPE_KEYS,
    DecoderConfig,
    LayerType,
    decoder_family,
    decoder_plan,
    default_layer_types,
    full_attn_layers,
    read_layer_types,
    read_rope_of_layers,
    read_text_part,
)
from lading.families.name_rules import fairseq2_rules, text_part_rules
from lading.families.nn.checks import require_positive
from lading.families.nn.gemma3n_spec import Gemma3nSpec
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.models.parallel_plan import ParallelPlan, Split
from lading.planning.rules import Rule
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.gemma3n import Gemma3n as Gemma3n
else:
    __getattr__ = deferred(globals(), Gemma3n="lading.families.nn.gemma3n")


@dataclass(kw_only=True)
class Gemma3nAudioConfig:
    """The configuration of the audio encoder, a part of the whole model that lading does not build."""

    vocab_size: int = 128
    """The number of symbols of sounds."""

    vocab_offset: int = 262_272
    """The index of the first of them in the vocabulary of the language model."""

    input_feat_size: int = 128
    """The number of channels of a frame."""

    hidden_size: int = 1536
    """The width of the encoder."""

    rms_norm_eps: float = 1e-6
    """The number that is added to the mean square before taking its root."""

    gradient_clipping: float = 1e10
    """The bound of activations."""

    conf_num_hidden_layers: int = 12
    """The number of Conformer layers."""

    conf_num_attention_heads: int = 8
    """The number of attention heads."""

    conf_conv_kernel_size: int = 5
    """The kernel size of the convolution in a layer."""

    conf_attention_chunk_size: int = 12
    """The number of frames in a chunk of attention."""

    conf_attention_context_left: int = 13
    """The number of frames up to itself that a frame attends to."""

    conf_attention_context_right: int = 0
    """The number of frames after itself that a frame attends to."""

    conf_attention_logit_cap: float = 50.0
    """The bound of attention scores."""

    conf_reduction_factor: int = 4
    """The number of frames for which the encoder returns one."""

    conf_residual_weight: float = 0.5
    """The factor of the feed-forward networks before the residual is added."""

    sscp_conv_channel_size: tuple[int, int] = (128, 32)
    """The number of channels of the two convolutions before the layers."""

    sscp_conv_group_norm_eps: float = 1e-3
    """The number that is added to the variance in their normalizations."""

    sscp_conv_kernel_size: tuple[tuple[int, int], tuple[int, int]] = ((3, 3), (3, 3))
    """Their kernel sizes, over time and over channels."""

    sscp_conv_stride_size: tuple[tuple[int, int], tuple[int, int]] = ((2, 2), (2, 2))
    """Their strides, over time and over channels."""


@dataclass(kw_only=True)
class Gemma3nConfig(DecoderConfig):
    """The configuration of a Gemma 3n model."""

    model_dim: int = 2048
    max_seq_len: int = 32_768
    vocab_size: int = 262_400
    tied_embeddings: bool = True
    num_layers: int = 35
    num_attn_heads: int = 8
    num_key_value_heads: int = 2
    ffn_inner_dim: int = 16_384
    init_std: float | None = 0.02

    pad_idx: int | None = 0
    """The index of the symbol for padding."""

    audio_config: Gemma3nAudioConfig | None = None
    """The audio encoder of the whole model; lading ignores it."""

    num_audio_tokens: int = 188
    """The number of symbols that stand for a sound; lading ignores it."""

    head_dim: int = 256
    """The width of an attention head."""

    altup_hidden_dim: int = 16_384
    """The inner width of the feed-forward networks in layers with a window; ``ffn_inner_dim`` is that in the others."""

    ffn_inner_dims: list[int] | None = None
    """The inner width of the feed-forward network of each layer, in place of both."""

    activation_sparsity_pattern: list[float] | None = None
    """The share of the gates that are closed in each layer; ``None`` means 0.95 in the first ten of more layers."""

    sliding_window: int = 512
    """The number of tokens, itself included, that a token attends to in layers with a window."""

    layer_types: list[LayerType] | None = None
    """The type of each layer; ``None`` means a window in four of five layers, but not in the last."""

    rope_theta: float = 10_000.0
    """The base of the frequencies of the rotary position embeddings, in layers with a window."""

    rope_theta_global: float = 1_000_000.0
    """The base of the frequencies in layers without a window."""

    final_logit_soft_cap: float = 30.0
    """The bound of the logits, which they approach as a hyperbolic tangent does."""

    num_kv_shared_layers: int = 10
    """The number of layers, from the last, with the keys and values of the last layer of their type before these."""

    laurel_rank: int = 64
    """The rank of the learned residuals."""

    altup_num_inputs: int = 4
    """The number of states of each token; a layer computes one of them."""

    altup_active_idx: int = 0
    """The index of the state that layers compute."""

    altup_coef_clip: float = 120.0
    """The bound of the weights of the coefficients of states, in training."""

    altup_correct_scale: bool = True
    """True if the computed state is scaled where the embeddings per layer are added."""

    vocab_size_per_layer_input: int = 262_144
    """The number of symbols that have an embedding for each layer."""

    hidden_size_per_layer_input: int = 256
    """The width of these embeddings."""

    rms_norm_eps: float = 1e-6
    """The number that is added to the mean square before taking its root."""


def _spec(config: Gemma3nConfig) -> Gemma3nSpec:
    require_positive(config, "model_dim", "ffn_inner_dim", "altup_hidden_dim")
    types, widths = _layer_types(config), _widths(config)

    return Gemma3nSpec.of(
        config,
        embed_scale=config.model_dim**0.5,
        q_norm=True,
        k_norm=True,
        v_norm=True,
        attn_scale=1.0,
        attn_window_len=config.sliding_window,
        full_attn_layers=full_attn_layers(types, config.num_layers),
        ffn_activation="gelu_tanh",
        ffn_inner_dim=max(widths, default=1),
        ffn_inner_dims=tuple(widths),
        ffn_sparsity=tuple(_sparsity(config)),
        norms="both",
        norm_eps=config.rms_norm_eps,
        wide_norm=True,
        rope_theta=config.rope_theta_global,
        window_rope_theta=config.rope_theta,
    )


def _layer_types(config: Gemma3nConfig) -> list[LayerType]:
    if config.layer_types is not None:
        return config.layer_types

    return default_layer_types(config.num_layers, every=5, full_last=True)


def _widths(config: Gemma3nConfig) -> list[int]:
    if config.ffn_inner_dims is not None:
        return config.ffn_inner_dims
    of_type = {"sliding_attention": config.altup_hidden_dim, "full_attention": config.ffn_inner_dim}

    return [of_type[kind] for kind in _layer_types(config)]


def _sparsity(config: Gemma3nConfig) -> list[float]:
    if config.activation_sparsity_pattern is not None:
        return config.activation_sparsity_pattern

    return _default_sparsity(config.num_layers)


def _default_sparsity(num_layers: int) -> list[float]:
    sparse = 10 if num_layers > 10 else 0

    return [0.95] * sparse + [0.0] * (num_layers - sparse)


def _plan(spec: Gemma3nSpec) -> ParallelPlan:
    """Return the parallel plan of a decoder.

    Modules that only Gemma 3n has are replicated, except for the table of embeddings per layer. The plan has no
    pipeline stages, because a layer can attend to keys and values of layers far before it.
    """
    plan = decoder_plan(spec)
    of_layer = (
        "altup",
        "altup.correction_coefs",
        "altup.prediction_coefs",
        "altup.modality_router",
        "altup.router_norm",
        "laurel.linear_left",
        "laurel.linear_right",
        "laurel.post_laurel_norm",
        "per_layer_input_gate",
        "per_layer_projection",
        "post_per_layer_input_norm",
    )
    replicated = (
        "model.per_layer_model_projection",
        "model.per_layer_projection_norm",
        "model.altup_projections.*",
        "model.altup_unembed_projections.*",
        *(f"model.layers.*.{name}" for name in of_layer),
    )

    return replace(
        plan,
        tensor={
            **(plan.tensor or {}),
            _TABLE: Split.VOCABULARY,
            **dict.fromkeys(replicated, Split.REPLICATED),
        },
        units=(*(plan.units or ()), _TABLE),
        stages=None,
    )


_TABLE: Final = "model.embed_tokens_per_layer"


# --- names in checkpoints ---------------------------------------------------------------------------------------------


def _rules(config: Gemma3nConfig) -> Sequence[Rule]:
    return (
        *_rules_of_shared_layers(config),
        *text_part_rules("vision_tower", "embed_vision", "audio_tower", "embed_audio"),
        Rule("final_proj.proj.weight", "lm_head.weight"),
        *fairseq2_rules(),
        # What fairseq2 names as transformers does.
        Rule("decoder.layers.{n}.{rest*}", "model.layers.{n}.{rest}"),
        Rule("decoder.altup_{rest*}", "model.altup_{rest}"),
        Rule("decoder_frontend.{rest*}", "model.{rest}"),
        # A checkpoint of the model without its head lacks the prefix.
        Rule("language_model.{rest*}", "model.{rest}"),
        *(
            Rule(f"{name}.{{rest*}}", f"model.{name}.{{rest}}")
            for name in (
                "embed_tokens_per_layer",
                "per_layer_model_projection",
                "per_layer_projection_norm",
                "altup_projections",
                "altup_unembed_projections",
            )
        ),
    )


def _rules_of_shared_layers(config: Gemma3nConfig) -> Sequence[Rule]:
    """Return the rules for projections of keys and values that no layer uses, which published checkpoints have."""
    shared = range(max(0, config.num_layers - config.num_kv_shared_layers), config.num_layers)

    return [
        Rule(f"{prefix}layers.{layer}.self_attn.{key_or_value}_{{rest*}}", None)
        for layer in shared
        for prefix in ("", "{prefix*}.")
        for key_or_value in ("k", "v")
    ]


# --- keys of config.json ----------------------------------------------------------------------------------------------


def _read_types(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"layer_types": read_layer_types(keys, earlier["num_layers"], every=5)}


def _read_widths(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(keys.values().get("intermediate_size"), list):
        width = keys.count("intermediate_size", 16_384)
        return {"ffn_inner_dim": width, "altup_hidden_dim": width}

    widths = keys.counts("intermediate_size", ())
    widest = max(widths, default=1)
    alike = widths == [widest] * earlier["num_layers"]

    return {"ffn_inner_dim": widest, "altup_hidden_dim": widest, "ffn_inner_dims": None if alike else widths}


def _read_sparsity(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    pattern = keys.numbers("activation_sparsity_pattern")

    return {"activation_sparsity_pattern": None if pattern == _default_sparsity(earlier["num_layers"]) else pattern}


def _read_rope(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    theta, _, window_theta = read_rope_of_layers(
        keys,
        theta=1_000_000.0,
        window_theta=10_000.0,
        window_theta_key="rope_local_base_freq",
        scaling_type=None,
    )

    return {"rope_theta": window_theta, "rope_theta_global": theta}


CONFIG_JSON = ConfigTable(
    family="gemma3n",
    model_type="gemma3n_text",
    architecture="Gemma3nForCausalLM",
    config_kls=Gemma3nConfig,
    spec=_spec,
    entries=(
        same_for_all("hidden_activation", "gelu_pytorch_tanh"),
        Field("model_dim", "hidden_size", ConfigReader.count, 2048),
        Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 32_768),
        Field("vocab_size", "vocab_size", ConfigReader.count, 262_400),
        Field("pad_idx", "pad_token_id", ConfigReader.index, 0),
        Field("tied_embeddings", "tie_word_embeddings", ConfigReader.flag, True),
        Field("num_layers", "num_hidden_layers", ConfigReader.layers, 35),
        Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 8),
        Field("num_key_value_heads", "num_key_value_heads", ConfigReader.count, 2),
        Field("head_dim", "head_dim", ConfigReader.count, 256),
        Field("sliding_window", "sliding_window", ConfigReader.count, 512),
        KeyGroup(("layer_types",), _read_types, lambda config: {"layer_types": _layer_types(config)}),
        KeyGroup(("intermediate_size",), _read_widths, lambda config: {"intermediate_size": _widths(config)}),
        KeyGroup(
            ("activation_sparsity_pattern",),
            _read_sparsity,
            lambda config: {"activation_sparsity_pattern": _sparsity(config)},
        ),
        Field("rms_norm_eps", "rms_norm_eps", ConfigReader.number, 1e-6),
        Field("final_logit_soft_cap", "final_logit_softcapping", ConfigReader.number, 30.0),
        Field("num_kv_shared_layers", "num_kv_shared_layers", ConfigReader.count_or_zero, 15),
        Field("laurel_rank", "laurel_rank", ConfigReader.count, 64),
        Field("altup_num_inputs", "altup_num_inputs", ConfigReader.count, 4),
        Field("altup_active_idx", "altup_active_idx", ConfigReader.count_or_zero, 0),
        Field("altup_coef_clip", "altup_coef_clip", ConfigReader.number, 120.0),
        Field("altup_correct_scale", "altup_correct_scale", ConfigReader.flag, True),
        Field("vocab_size_per_layer_input", "vocab_size_per_layer_input", ConfigReader.count, 262_144),
        Field("hidden_size_per_layer_input", "hidden_size_per_layer_input", ConfigReader.count, 256),
        KeyGroup(
            (*ROPE_KEYS, "rope_local_base_freq"),
            _read_rope,
            lambda config: {
                "rope_theta": config.rope_theta_global,
                "rope_scaling": None,
                "rope_local_base_freq": config.rope_theta,
            },
        ),
        Field("init_std", "initializer_range", ConfigReader.number, 0.02, optional=True),
    ),
    constants=NO_TOKENS,
    required={**CHANGES_EACH_DECODER, "attention_bias": False, "use_bidirectional_attention": False},
    ignored={
        "original_max_position_embeddings": "transformers reads it in rope_parameters only",
        "hidden_act": "transformers reads hidden_activation",
        "query_pre_attn_scalar": "attention scores have no factor, as queries and keys are normalized",
        "altup_lr_multiplier": "training",
    },
)
"""The keys of ``config.json`` of language models, and of ``text_config`` of whole models."""


def _read_sizes(keys: ConfigReader, key: str, default: tuple[object, ...]) -> object:
    """Read positive integers in lists of the form of ``default``."""

    def read(value: object, like: object) -> object:
        if isinstance(like, tuple) and isinstance(value, list | tuple) and len(value) == len(like):
            return tuple(map(read, value, like))
        if isinstance(like, tuple) or type(value) is not int or value < 1:
            keys.mismatch(key, f"lists of positive integers such as {default}")

        return value

    return read(keys.values().get(key, default), default)


_AUDIO_READERS: Final[Mapping[type, Any]] = {
    int: ConfigReader.count_or_zero,
    float: ConfigReader.number,
    tuple: _read_sizes,
}

_AUDIO_KEYS: Final = [
    Field(f.name, f.name, _AUDIO_READERS[type(f.default)], f.default) for f in fields(Gemma3nAudioConfig)
]
"""The keys of ``audio_config``, which have the names of its fields."""


def _from_hf(values: Mapping[str, object]) -> Gemma3nConfig:
    if "text_config" not in values:
        return CONFIG_JSON.read(values)

    config = read_text_part(values, CONFIG_JSON)
    whole = ConfigReader(values, "gemma3n")
    if not whole.is_null("audio_config"):
        config.audio_config = Gemma3nAudioConfig(**read_fields(_AUDIO_KEYS, whole.section("audio_config")))
        config.num_audio_tokens = whole.count("audio_soft_tokens_per_image", 188)

    return config


def _hf_stated(values: Mapping[str, object]) -> frozenset[str]:
    own = ConfigReader(values, "gemma3n").section("text_config").values()
    keys = {"audio_config": "audio_config", "num_audio_tokens": "audio_soft_tokens_per_image"}

    return CONFIG_JSON.stated(own or values) | {name for name, key in keys.items() if own and key in values}


FAMILY: Family[Gemma3n, Gemma3nConfig] = decoder_family(
    "lading.families.nn.gemma3n:Gemma3n",
    _spec,
    CONFIG_JSON,
    init_std_scale="none",
    rules=_rules,
    parallel_plan=lambda config: _plan(_spec(config)),
    hf_part_of=frozenset({"gemma3n"}),
    from_hf=_from_hf,
    hf_stated=_hf_stated,
)

get_gemma3n_model_hub: ModelHubAccessor[Gemma3n, Gemma3nConfig] = ModelHubAccessor("gemma3n", FAMILY.kls, Gemma3nConfig)
