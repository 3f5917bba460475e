"""The common part of the decoder families: configuration, keys of ``config.json``, names of tensors, and the family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast, get_args

from lading.families.config_json import (
    CHANGES_EACH_MODEL,
    ConfigReader,
    ConfigTable,
    KeyGroup,
    same_for_all,
)
from lading.families.name_rules import explain_head
from lading.families.nn.checks import require_layers
from lading.families.nn.decoder_spec import DecoderSpec
from lading.models.family import Family
from lading.models.parallel_plan import ParallelPlan, Split, Stages

if TYPE_CHECKING:
    from torch import Tensor

    from lading.families.nn.decoder_lm import DecoderLM


@dataclass(kw_only=True)
class DecoderConfig:
    """The fields that the configurations of all decoders have; each family states its defaults."""

    model_dim: int
    """The width of the model."""

    max_seq_len: int
    """The longest sequence, in tokens."""

    vocab_size: int
    """The number of symbols."""

    tied_embeddings: bool = False
    """True if the output projection is the embedding table."""

    num_layers: int
    """The number of decoder layers."""

    num_attn_heads: int
    """The number of attention heads."""

    num_key_value_heads: int
    """The number of key and value heads; each serves a group of attention heads."""

    ffn_inner_dim: int
    """The inner width of the feed-forward networks."""

    rope_theta: float
    """The base of the frequencies of the rotary position embeddings."""

    dropout_p: float = 0.0
    """The dropout probability of the embeddings and of the outputs of attention and feed-forward blocks."""

    init_std: float | None = None
    """The standard deviation of the initial weights; ``None`` means ``input_dim ** -0.5`` of each projection."""


ModelT = TypeVar("ModelT", bound="DecoderLM")
ConfigT = TypeVar("ConfigT", bound=DecoderConfig)


def decoder_family(
    kls: str,
    spec: Callable[[ConfigT], DecoderSpec],
    *tables: ConfigTable[ConfigT],
    init_std_scale: Literal["none", "layer", "stack"] = "stack",
    **others: Any,
) -> Family[ModelT, ConfigT]:
    """Return the family of the models of ``kls``.

    :param kls: the place of the class, as :class:`~lading.models.family.Family` takes it.
    :param spec: the options of the model for a configuration.
    :param tables: the model types in ``config.json``; the first is for a file without a type, and for writing.
    :param init_std_scale: as :func:`~lading.families.nn.decoder_lm.init_decoder` takes it, unless the configuration has
        a field of this name.
    :param others: the fields of the family that are not those of all decoders.
    """
    by_type = {table.model_type: table for table in tables}
    wholes: Collection[str] = others.get("hf_part_of", ())

    def table_of(values: Mapping[str, object]) -> ConfigTable[ConfigT]:
        return by_type.get(str(values.get("model_type")), tables[0])

    def from_hf(values: Mapping[str, object]) -> ConfigT:
        if wholes and "text_config" in values:
            return read_text_part(values, tables[0])

        return table_of(values).read(values)

    def hf_stated(values: Mapping[str, object]) -> frozenset[str]:
        own = ConfigReader(values, tables[0].family).section("text_config").values() if wholes else None

        return table_of(values).stated(own or values)

    def init(model: ModelT, config: ConfigT, name: str, parameter: Tensor) -> None:
        from lading.families.nn.decoder_lm import init_decoder

        scale = getattr(config, "init_std_scale", init_std_scale)
        init_decoder(model, name, parameter, std=config.init_std, std_scale=scale)

    family: Family[ModelT, ConfigT] = Family(
        name=tables[0].family,
        kls=kls,
        config_kls=tables[0].config_kls,
        build=lambda config: family.model_kls(spec(config)),
        init=init,
        shapes=lambda config: spec(config).shapes(),
        parallel_plan=lambda config: decoder_plan(spec(config)),
        hf_model_types=frozenset(by_type),
        from_hf=from_hf,
        hf_stated=hf_stated,
        to_hf=tables[0].write,
        explain=explain_head,
    )

    return replace(family, **others)


def decoder_plan(spec: DecoderSpec) -> ParallelPlan:
    """Return the parallel plan of a decoder.

    Tensor parallelism (https://arxiv.org/abs/1909.08053) splits attention by heads, feed-forward networks by their
    inner width, embedding and output by symbols. Parameters are sharded layer by layer, and pipeline stages are split
    between layers.
    """
    layer = "model.layers.*"
    attention = _ATTENTION if spec.latent is None else _LATENT_ATTENTION
    divisible = {"num_attn_heads": spec.num_attn_heads}
    if spec.norm_whole:
        # A normalization over all heads needs all of them on each rank.
        attention = dict.fromkeys(attention, Split.REPLICATED)
        del divisible["num_attn_heads"]

    ffn: dict[str, Split] = {}
    if any(spec.experts_of(i) is None for i in range(spec.num_layers)):
        ffn |= _gated(spec.ffn_name)
        divisible["ffn_inner_dim"] = gcd(*{spec.ffn_inner_dim_of(i) for i in range(spec.num_layers)})
    if spec.ffn_sparsity is not None:
        ffn[f"{spec.ffn_name}.sparsity"] = Split.FEATURES
    if spec.experts is not None:
        ffn |= {
            f"{spec.ffn_name}.experts": Split.EXPERTS,
            f"{spec.ffn_name}.{spec.experts.router_name}": Split.REPLICATED,
        }
        if spec.experts.shared_inner_dim is not None:
            ffn |= _gated(f"{spec.ffn_name}.{spec.experts.shared_name}")
            divisible["shared_inner_dim"] = spec.experts.shared_inner_dim

    return ParallelPlan(
        tensor={
            "model.embed_tokens": Split.VOCABULARY,
            **{f"{layer}.self_attn.{name}": split for name, split in attention.items()},
            **{f"{layer}.{name}": split for name, split in ffn.items()},
            f"{layer}.input_layernorm": Split.REPLICATED,
            f"{layer}.post_attention_layernorm": Split.REPLICATED,
            f"{layer}.pre_feedforward_layernorm": Split.REPLICATED,
            f"{layer}.post_feedforward_layernorm": Split.REPLICATED,
            "model.norm": Split.REPLICATED,
            "lm_head": Split.LOGITS,
        },
        divisible=divisible,
        # All heads share the rotated key of latent attention.
        num_key_value_heads=spec.num_key_value_heads if spec.latent is None else 1,
        num_experts=1 if spec.experts is None else spec.experts.num_experts,
        units=(layer,),
        stages=Stages(
            layers=layer,
            num_layers=spec.num_layers,
            first=("model.embed_tokens",),
            last=("model.norm", "lm_head"),
        ),
    )


_ATTENTION: Final[Mapping[str, Split]] = {
    "q_proj": Split.COLUMN,
    "k_proj": Split.KEY_VALUE,
    "v_proj": Split.KEY_VALUE,
    "o_proj": Split.ROW,
    "q_norm": Split.HEADS,
    "k_norm": Split.HEADS,
}

_LATENT_ATTENTION: Final[Mapping[str, Split]] = {
    "q_proj": Split.COLUMN,
    "q_a_proj": Split.REPLICATED,
    "q_a_layernorm": Split.REPLICATED,
    "q_b_proj": Split.COLUMN,
    "kv_a_proj_with_mqa": Split.REPLICATED,
    "kv_a_layernorm": Split.REPLICATED,
    "kv_b_proj": Split.COLUMN,
    "shared_key": Split.KEY_VALUE,
    "o_proj": Split.ROW,
}


def _gated(name: str) -> dict[str, Split]:
    """Return the splits of a gated feed-forward network."""
    return {f"{name}.gate_proj": Split.COLUMN, f"{name}.up_proj": Split.COLUMN, f"{name}.down_proj": Split.ROW}


# --- keys of config.json ----------------------------------------------------------------------------------------------

CHANGES_EACH_DECODER: Final[Mapping[str, object]] = {
    **CHANGES_EACH_MODEL,
    "is_causal": True,
    "partial_rotary_factor": 1.0,
    "attention_chunk_size": None,
    "_rope_type_labels": None,
}
"""The keys that change the results of a decoder of transformers, with the only value that a family supports."""

NO_WINDOWS: Final[Mapping[str, object]] = {"layer_types": None, "sliding_window": None}
"""The keys with which transformers shortens its cache in generation, even without layers that have a window."""

NO_SCALING: Final[Mapping[str, str]] = {"original_max_position_embeddings": "only for scaling, which is not supported"}
"""The keys that a family without scaled rotary frequencies ignores."""

NO_TOKENS: Final[Mapping[str, object]] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""The keys that belong to the tokenizer, unless a family reads one."""

SILU: Final = same_for_all("hidden_act", "silu", "swish")
"""The activation of most decoders."""

ROPE_KEYS: Final = ("rope_theta", "rope_scaling", "rope_parameters")


def plain_rope(theta: float) -> KeyGroup:
    """Return the entry of rotary frequencies that are not scaled, the same in all layers.

    :param theta: the base where the file states none.
    """
    return KeyGroup(
        ROPE_KEYS,
        lambda reader, earlier: {"rope_theta": read_rope(reader, theta=theta)[0]},
        lambda config: {"rope_theta": config.rope_theta},
    )


PLAIN_ROPE: Final = plain_rope(10_000.0)
"""These frequencies, with the base that is the default of most models."""


def read_text_part(values: Mapping[str, object], table: ConfigTable[ConfigT]) -> ConfigT:
    """Return the configuration of the decoder in a multimodal model, whose keys are in ``text_config``.

    :raises NotSupportedError: as :meth:`ConfigTable.read`; likewise the other errors.
    """
    whole = ConfigReader(values, table.family)
    whole.refuse_quantized()
    whole.require("is_causal", True)
    whole.require("per_layer_config", None)
    config = table.read_keys(whole.section("text_config", table))
    # The class of transformers for both looks at the outer one.
    if "tie_word_embeddings" in whole:
        whole.require("tie_word_embeddings", config.tied_embeddings)

    return config


LayerType = Literal["sliding_attention", "full_attention"]
"""The kind of attention in a layer, with or without a window."""


def read_rope(
    reader: ConfigReader, scaling_type: str | None = None, *, theta: float = 10_000.0
) -> tuple[float, ConfigReader | None]:
    """Return the base of the rotary frequencies, and the keys of their scaling if there is one.

    Understands ``rope_parameters`` and what came before transformers 5: ``rope_theta`` with ``rope_scaling``.

    :param scaling_type: the one that the family supports.
    :param theta: the default base.

    :raises NotSupportedError: another type, parameters by kind of layer, or rotary embeddings of a part of each head.
    """
    section = reader.section("rope_scaling") or reader.section("rope_parameters")
    for key, value in section.values().items():
        if isinstance(value, Mapping):
            section.refuse(key, value)
    for keys in (reader, section):
        keys.require("partial_rotary_factor", 1.0)

    theta = (section if "rope_theta" in section else reader).number("rope_theta", theta)

    return theta, _scaling(section, scaling_type)


def read_rope_of_layers(
    reader: ConfigReader, *, theta: float, window_theta: float, window_theta_key: str | None, scaling_type: str | None
) -> tuple[float, ConfigReader | None, float]:
    """Return the base of the rotary frequencies, the keys of their scaling, and the base in layers with a window.

    It reads ``rope_parameters`` by type of layer, and the keys before transformers 5: ``rope_theta`` and
    ``rope_scaling`` for layers without a window.

    :param theta: the default base of layers without a window.
    :param window_theta: the default base of layers with a window.
    :param window_theta_key: the key of the latter before transformers 5; ``None`` without such a key.
    :param scaling_type: the type of scaling that the family supports; ``None`` without one.

    :raises NotSupportedError: the scaling has another type, or applies to layers with a window or to a part of a head.
    """
    parameters = reader.section("rope_parameters")
    full, window = parameters.section("full_attention"), parameters.section("sliding_attention")
    if parameters and not full and not window:
        reader.refuse("rope_parameters", parameters.values())
    full = reader.section("rope_scaling") or full
    for keys in (reader, full, window):
        keys.require("partial_rotary_factor", 1.0)

    _scaling(window, None)
    if "rope_theta" in full:
        theta = full.number("rope_theta", None)
    else:
        theta = reader.number("rope_theta", theta)
    if "rope_theta" in window:
        window_theta = window.number("rope_theta", None)
    elif window_theta_key is not None:
        window_theta = reader.number(window_theta_key, window_theta)

    return theta, _scaling(full, scaling_type), window_theta


def _scaling(section: ConfigReader, scaling_type: str | None) -> ConfigReader | None:
    type_key = "type" if section.is_null("rope_type") else "rope_type"
    known = ("default",) if scaling_type is None else ("default", scaling_type)
    kind = "default" if section.is_null(type_key) else section.choice(type_key, "default", {k: k for k in known})

    return None if kind == "default" else section


def read_layer_types(reader: ConfigReader, num_layers: int, *, every: int) -> list[LayerType]:
    """Return the type of attention of each layer.

    :param every: the interval of layers without a window, if the file states no types.

    :raises NotSupportedError: other types.
    """
    types = reader.strings("layer_types")
    if types is None:
        return default_layer_types(num_layers, every=every)
    if set(types) - set(get_args(LayerType)):
        reader.refuse("layer_types", types)

    return cast(list[LayerType], types)


def default_layer_types(num_layers: int, *, every: int, full_last: bool = False) -> list[LayerType]:
    """Return the types of layers with a window in all but the last of ``every``.

    :param full_last: True if the last layer has no window, whatever its index.

    :raises ValueError: there are more layers than modules can be made of.
    """
    require_layers(num_layers)
    types: list[LayerType] = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)]
    if full_last:
        types[-1] = "full_attention"

    return types


def full_attn_layers(types: Sequence[LayerType], num_layers: int) -> frozenset[int]:
    """Return the indices of the layers without a window.

    :raises ValueError: the number of types is not that of the layers.
    """
    if len(types) != num_layers:
        raise ValueError(f"`layer_types` must have one for each of the {num_layers} layers, but has {len(types)}")

    return frozenset(i for i, kind in enumerate(types) if kind == "full_attention")
