"""Llama 4 (https://ai.meta.com/blog/llama-4-multimodal-intelligence): the decoders of its models, which read text.

Attention alternates between layers with rotary embeddings, in which a token attends to its chunk, and layers without,
in which it attends to all tokens before (https://arxiv.org/abs/2501.18795). Most or half of the feed-forward networks
are mixtures of experts: one that all tokens share, and one that a router chooses for each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lading.families.config_json import ConfigReader, ConfigTable, Field, KeyGroup
from lading.families.decoder_family import CHANGES_EACH_DECODER, NO_TOKENS, SILU, decoder_family
from lading.families.llama import LLaMAConfig, llama_rope, llama_spec
from lading.families.name_rules import fairseq2_rules, layer_rules, meta_rules, text_part_rules
from lading.families.nn.checks import require_layers, require_positive
from lading.families.nn.decoder_spec import AttentionTemperature, DecoderSpec
from lading.families.nn.experts_spec import ExpertsSpec
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.decoder_models import Llama4 as Llama4
else:
    __getattr__ = deferred(globals(), Llama4="lading.families.nn.decoder_models")


@dataclass(kw_only=True)
class Llama4ExpertsConfig:
    """The configuration of the experts of a Llama 4 model."""

    num_experts: int = 16
    """The number of experts that the router chooses from."""

    use_shared_expert: bool = True
    """True if another expert processes all tokens."""

    capacity_factor: float = 1.0
    """The number of chosen experts in the divisor of the inner width; see :meth:`Llama4Config.expert_inner_dim`."""

    auto_scale: bool = True
    """Ignored, as in fairseq2: the inner width is always divided."""

    top_k: int = 1
    """The number of experts that the router chooses for a token."""

    interleave_moe_layer_step: int = 1
    """The interval of layers with experts: 1 means all layers, 2 the second, the fourth …"""

    inner_dim: int | None = None
    """The inner width of an expert; ``None`` means that it follows from that of feed-forward networks."""


@dataclass(kw_only=True)
class Llama4Config(LLaMAConfig):
    """The configuration of a Llama 4 model; the defaults are those of fairseq2, and of no published model."""

    experts: Llama4ExpertsConfig = field(default_factory=Llama4ExpertsConfig)
    """The experts in place of feed-forward networks."""

    attention_chunk_size: int = 8192
    """The number of tokens in a chunk, beyond which tokens do not attend in layers with rotary embeddings; 0 means no
    chunks."""

    use_qk_norm: bool = False
    """True if queries and keys are normalized, without a weight, in layers with rotary embeddings."""

    nope_layer_interval: int | None = None
    """The interval of layers without rotary embeddings and chunks: 4 means the fourth, the eighth …; ``None`` means
    that all layers have both."""

    attn_temperature_tuning: bool = True
    """True if attention scores grow with the position of a token in layers without rotary embeddings. fairseq2 lacks
    it; nothing grows for the first ``attn_temperature_floor - 1`` tokens."""

    attn_temperature_scale: float = 0.1
    """The factor of the logarithm by which scores grow."""

    attn_temperature_floor: int = 8192
    """The number of tokens after which scores grow by another step."""

    def expert_inner_dim(self) -> int:
        """Return the inner width of an expert: by default that of a feed-forward network, divided by the number of
        experts that process a token before it is rounded up.

        :raises ValueError: no expert would process a token, or as :meth:`gated_inner_dim`.
        """
        experts = self.experts
        if experts.inner_dim is not None:
            return experts.inner_dim
        divisor = experts.capacity_factor + bool(experts.use_shared_expert)
        if not divisor > 0:
            raise ValueError(
                f"`capacity_factor` must be positive without a shared expert, but is {experts.capacity_factor}"
            )

        return self.gated_inner_dim(divisor)


def _spec(config: Llama4Config) -> DecoderSpec:
    require_layers(config.num_layers)
    experts, inner_dim = config.experts, config.expert_inner_dim()
    require_positive(experts, "interleave_moe_layer_step")
    if config.nope_layer_interval is not None:
        require_positive(config, "nope_layer_interval")
    if config.attention_chunk_size < 0:
        raise ValueError(f"`attention_chunk_size` must not be negative, but is {config.attention_chunk_size}")

    unrotated = frozenset(_each(config.nope_layer_interval, config.num_layers))
    temperature = AttentionTemperature(scale=config.attn_temperature_scale, step=config.attn_temperature_floor)
    spec = llama_spec(
        config,
        attn_window_len=config.attention_chunk_size or None,
        chunked_attn=True,
        full_attn_layers=unrotated,
        unrotated_layers=unrotated,
        adjacent_rotary=True,
        wide_rotary=True,
        norm_rotated=config.use_qk_norm,
        attn_temperature=temperature if config.attn_temperature_tuning and unrotated else None,
        experts=None,
        ffn_name="feed_forward",
    ).normalized()
    layers = frozenset(_each(experts.interleave_moe_layer_step, config.num_layers))
    if not layers:
        return spec

    mixture = ExpertsSpec(
        num_experts=experts.num_experts,
        top_k=experts.top_k,
        inner_dim=inner_dim,
        layers=layers,
        shared_inner_dim=inner_dim if experts.use_shared_expert else None,
        scores="sigmoid",
        weighs_inputs=True,
        transposed=True,
        router_name="router",
        shared_name="shared_expert",
    )

    return spec.with_experts(mixture)


def _each(step: int | None, num_layers: int) -> range:
    """Return the indices of layers in intervals of ``step``; ``None`` means no layers."""
    return range(0) if step is None else range(step - 1, num_layers, step)


# --- keys of config.json ----------------------------------------------------------------------------------------------


def _step_of(layers: Sequence[int], num_layers: int) -> int | None:
    """Return the step for which :func:`_each` returns ``layers``, or ``None`` if no step does."""
    step = layers[0] + 1 if layers else num_layers + 1

    return step if list(layers) == list(_each(step, num_layers)) else None


def _read_experts(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    num_layers, layers = earlier["num_layers"], keys.indices("moe_layers")
    step = _step_of(sorted({layer for layer in layers if layer < num_layers}), num_layers)
    if keys.is_null("moe_layers"):
        step = keys.count("interleave_moe_layer_step", 1)
    if step is None:
        keys.refuse("moe_layers", layers)
    if step > num_layers:  # as in a model without experts, whose file states none
        return {"experts": Llama4ExpertsConfig(interleave_moe_layer_step=step)}

    return {
        "experts": Llama4ExpertsConfig(
            num_experts=keys.count("num_local_experts", 16),
            top_k=keys.count("num_experts_per_tok", 1),
            interleave_moe_layer_step=step,
            inner_dim=keys.count("intermediate_size", 8192),
        )
    }


def _expert_keys(config: Llama4Config) -> Mapping[str, object]:
    experts = config.experts

    return {
        "intermediate_size": config.expert_inner_dim(),
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "interleave_moe_layer_step": experts.interleave_moe_layer_step,
        "moe_layers": list(_each(experts.interleave_moe_layer_step, config.num_layers)),
    }


_CHUNKED, _FULL = "chunked_attention", "full_attention"


def _read_attention(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    num_layers = earlier["num_layers"]
    interval: int | None = keys.count("no_rope_layer_interval", 4)
    if rotated := keys.indices("no_rope_layers"):
        if len(rotated) < num_layers:
            keys.mismatch("no_rope_layers", f"a list of a number for each of the {num_layers} layers")
        interval = _step_of([i for i in range(num_layers) if not rotated[i]], num_layers)
        if interval is None:
            keys.refuse("no_rope_layers", rotated)
    unrotated = _each(interval, num_layers)

    kinds = keys.strings("layer_types")
    size = keys.maybe_count("attention_chunk_size", 8192) or 0
    if kinds == [_FULL] * num_layers:
        size = 0
    elif kinds is not None and kinds != [_FULL if i in unrotated else _CHUNKED for i in range(num_layers)]:
        keys.refuse("layer_types", kinds)

    return {"nope_layer_interval": interval if unrotated else None, "attention_chunk_size": size}


def _attention_keys(config: Llama4Config) -> Mapping[str, object]:
    unrotated = _each(config.nope_layer_interval, config.num_layers)
    size, kinds = config.attention_chunk_size, [_FULL] * config.num_layers
    if size:
        kinds = [_FULL if i in unrotated else _CHUNKED for i in range(config.num_layers)]

    return {
        "no_rope_layers": [int(i not in unrotated) for i in range(config.num_layers)],
        "layer_types": kinds,
        "attention_chunk_size": size or 8192,
    }


def _read_switch(keys: ConfigReader, key: str, default: bool) -> bool:
    """Read a boolean, or a count, as the published files state it."""
    if isinstance(keys.values().get(key, default), bool):
        return keys.flag(key, default)

    return keys.count_or_zero(key, 1) > 0


CONFIG_JSON = ConfigTable(
    family="llama4",
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    config_kls=Llama4Config,
    spec=_spec,
    entries=(
        SILU,
        Field("model_dim", "hidden_size", ConfigReader.count, 5120),
        Field("max_seq_len", "max_position_embeddings", ConfigReader.count, 131_072),
        Field("vocab_size", "vocab_size", ConfigReader.count, 202_048),
        Field("pad_idx", "pad_token_id", ConfigReader.index, None),
        Field("tied_embeddings", "tie_word_embeddings", ConfigReader.flag, False),
        Field("num_layers", "num_hidden_layers", ConfigReader.layers, 48),
        Field("num_attn_heads", "num_attention_heads", ConfigReader.count, 40),
        Field("num_key_value_heads", "num_key_value_heads", ConfigReader.maybe_count, 8, null="num_attn_heads"),
        Field("head_dim", "head_dim", ConfigReader.maybe_count, 128, write=lambda config: _spec(config).attn_head_dim),
        # Both biases are one key; a configuration with one of them is refused when it is written.
        Field("output_proj_bias", "attention_bias", ConfigReader.flag, False),
        Field("qkv_proj_bias", "attention_bias", ConfigReader.flag, False),
        Field("ffn_inner_dim", "intermediate_size_mlp", ConfigReader.count, 16_384, write=LLaMAConfig.gated_inner_dim),
        KeyGroup(
            (
                "intermediate_size",
                "num_local_experts",
                "num_experts_per_tok",
                "interleave_moe_layer_step",
                "moe_layers",
            ),
            _read_experts,
            _expert_keys,
        ),
        Field("norm_eps", "rms_norm_eps", ConfigReader.number, 1e-5),
        llama_rope(500_000.0),
        KeyGroup(
            ("no_rope_layers", "no_rope_layer_interval", "layer_types", "attention_chunk_size"),
            _read_attention,
            _attention_keys,
        ),
        Field("use_qk_norm", "use_qk_norm", ConfigReader.flag, True),
        Field("attn_temperature_tuning", "attn_temperature_tuning", _read_switch, True),
        Field("attn_temperature_scale", "attn_scale", ConfigReader.number, 0.1),
        Field("attn_temperature_floor", "floor_scale", ConfigReader.count, 8192),
    ),
    fixed={"ffn_inner_dim_scale": 1.0, "ffn_inner_dim_multiple_of": 1},
    constants=NO_TOKENS,
    required={key: value for key, value in CHANGES_EACH_DECODER.items() if key != "attention_chunk_size"},
    ignored={
        "output_router_logits": "the form of what a forward returns",
        "router_aux_loss_coef": "training",
        "router_jitter_noise": "training",
    },
)
"""The keys of ``config.json`` of text models, and of ``text_config`` of multimodal models."""


# --- names of tensors -------------------------------------------------------------------------------------------------

_META = {
    "feed_forward.norm": "post_attention_layernorm",
    "feed_forward.w_in_shared_FD": "feed_forward.shared_expert.gate_proj",
    "feed_forward.w_swiglu_FD": "feed_forward.shared_expert.up_proj",
    "feed_forward.w_out_shared_DF": "feed_forward.shared_expert.down_proj",
}
"""Meta's names of the modules of a layer that its earlier models lack → their names in lading."""

_FAIRSEQ2 = {
    "ffn.shared_expert.gate_proj": "feed_forward.shared_expert.gate_proj",
    "ffn.shared_expert.inner_proj": "feed_forward.shared_expert.up_proj",
    "ffn.shared_expert.output_proj": "feed_forward.shared_expert.down_proj",
}
"""fairseq2's names of the modules of a layer that other decoders lack."""


def _rules(config: Llama4Config) -> Sequence[Rule]:
    """Return the rules for the names of multimodal models, of Meta and of fairseq2.

    In all of them, rotary embeddings turn neighboring channels.

    Sources: https://github.com/meta-llama/llama-models (``models/llama4``) and fairseq2 0.8.1 (its
    ``models/llama4/interop.py`` and modules) for the names; transformers
    (``models/llama4/convert_llama4_weights_to_hf.py``) for what Meta's ranks hold.
    """
    spec = _spec(config)
    queries, keys = spec.num_attn_heads * spec.attn_head_dim, spec.num_key_value_heads * spec.attn_head_dim
    inner, target = spec.ffn_inner_dim, "model.layers.{n}."
    attention, ffn = "layers.{n}.attention.wqkv", "layers.{n}.feed_forward.mlp"

    return (
        *text_part_rules("vision_model", "multi_modal_projector"),
        # What the model computes, and what training counted.
        Rule("{prefix*}._extra_state", None, computed=True),
        Rule("{prefix*}.expert_activation_DE", None, computed=True),
        Rule("{prefix*}_stats_3E", None, computed=True),
        Rule("vision_embeddings.{rest*}", None),
        Rule("vision_projection.{rest*}", None),
        Rule(f"{attention}.weight", f"{target}self_attn.q_proj.weight", cut=(0, 0, queries)),
        Rule(f"{attention}.weight", f"{target}self_attn.k_proj.weight", cut=(0, queries, keys)),
        Rule(f"{attention}.weight", f"{target}self_attn.v_proj.weight", cut=(0, queries + keys, keys)),
        Rule(f"{attention}.layer_norm_weight", f"{target}input_layernorm.weight"),
        Rule(f"{ffn}.layer_norm_weight", f"{target}post_attention_layernorm.weight"),
        Rule(f"{ffn}.fc1_weight", f"{target}feed_forward.gate_proj.weight", cut=(0, 0, inner)),
        Rule(f"{ffn}.fc1_weight", f"{target}feed_forward.up_proj.weight", cut=(0, inner, inner)),
        Rule(f"{ffn}.fc2_weight", f"{target}feed_forward.down_proj.weight"),
        *_mixture_rules(
            "layers.{n}.feed_forward",
            "router_DE",
            ("experts.moe_w_in_eD_F", "experts.moe_w_swiglu_eD_F", "experts.moe_w_out_eF_D"),
            config.experts.num_experts,
        ),
        *layer_rules("layers.{n}", _META),
        *meta_rules(ffn="feed_forward"),
        *_mixture_rules(
            "decoder.layers.{n}.ffn",
            "router",
            ("experts.gate_proj", "experts.inner_proj", "experts.output_proj"),
            config.experts.num_experts,
        ),
        *layer_rules("decoder.layers.{n}", _FAIRSEQ2),
        *fairseq2_rules(ffn="feed_forward"),
    )


def _mixture_rules(layer: str, router: str, experts: tuple[str, str, str], num_experts: int) -> Sequence[Rule]:
    """Return the rules for a router that is stored as inputs × outputs, and for experts below one another.

    :param layer: the name of the feed-forward network of a layer, with ``{n}`` for its index.
    :param experts: the names of the projections of gates, of inputs and of outputs.
    """
    gate, up, down = (f"{layer}.{name}" for name in experts)
    target = "model.layers.{n}.feed_forward."

    return (
        Rule(f"{layer}.{router}", f"{target}router.weight", transpose=True),
        Rule(gate, f"{target}experts.gate_up_proj", concat=(2, 0), unfold=num_experts),
        Rule(up, f"{target}experts.gate_up_proj", concat=(2, 1), unfold=num_experts),
        Rule(down, f"{target}experts.down_proj", unfold=num_experts),
    )


FAMILY: Family[Llama4, Llama4Config] = decoder_family(
    "lading.families.nn.decoder_models:Llama4",
    _spec,
    CONFIG_JSON,
    rules=_rules,
    hf_part_of=frozenset({"llama4"}),
)

get_llama4_model_hub: ModelHubAccessor[Llama4, Llama4Config] = ModelHubAccessor("llama4", FAMILY.kls, Llama4Config)
