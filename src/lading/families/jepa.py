"""I-JEPA (https://arxiv.org/abs/2301.08243) and V-JEPA (https://arxiv.org/abs/2404.08471): their encoders, which are
vision transformers over images and videos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lading.errors import NotSupportedError
from lading.families.config_json import (
    CHANGES_EACH_MODEL,
    ConfigReader,
    ConfigTable,
    Entries,
    Field,
    KeyGroup,
    keys_of,
    read_fields,
    same_for_all,
)
from lading.families.jepa_config import JepaConfig as JepaConfig
from lading.families.jepa_config import JepaEncoderConfig as JepaEncoderConfig
from lading.families.jepa_config import encoder_spec
from lading.families.name_rules import layer_rules
from lading.families.nn.shapes import Shapes
from lading.families.nn.vision_spec import VisionSpec, vision_plan
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred, deferred_call

if TYPE_CHECKING:
    from lading.families.nn.jepa import Jepa as Jepa
else:
    __getattr__ = deferred(globals(), Jepa="lading.families.nn.jepa")


def _spec(config: JepaConfig) -> VisionSpec:
    return encoder_spec(config.encoder_config)


def _shapes(config: JepaConfig) -> Shapes:
    return _spec(config).shapes()


# --- checkpoints -----------------------------------------------------------------------------------------------------

_TRANSFORMERS_5 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}
"""The names of the modules of a layer in transformers 5, which its files have, too, if asked for → those in lading."""

_META = {
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
"""Meta's names of these modules, without the projection of queries, keys and values, which are one there."""

_META_PREFIXES = ("module.backbone.", "module.", "backbone.", "")
"""V-JEPA's training wraps the model in two modules, I-JEPA's in one."""


def fairseq2_layer(attention: str) -> dict[str, str]:
    """Return fairseq2's names of the modules of a layer, and those in lading.

    :param attention: fairseq2's name of the attention.
    """
    return {
        f"{attention}.q_proj": "attention.attention.query",
        f"{attention}.k_proj": "attention.attention.key",
        f"{attention}.v_proj": "attention.attention.value",
        f"{attention}.output_proj": "attention.output.dense",
        f"{attention}_layer_norm": "layernorm_before",
        "ffn.inner_proj": "intermediate.dense",
        "ffn.output_proj": "output.dense",
        "ffn_layer_norm": "layernorm_after",
    }


def encoder_rules(config: JepaEncoderConfig, prefix: str = "") -> Iterator[Rule]:
    """Yield the rules for the encoder in checkpoints of Meta, of fairseq2, and in other ones of transformers.

    :param prefix: the prefix of the encoder's names in the model.
    """
    layer, dim = f"{prefix}encoder.layer.{{n}}", config.model_dim
    projection = f"{prefix}embeddings.patch_embeddings.projection.{{leaf}}"
    positions = f"{prefix}embeddings.position_embeddings" if config.learned_positions else None

    for wrapped in _META_PREFIXES:
        yield Rule(f"{wrapped}pos_embed", positions, computed=positions is None)
        yield Rule(f"{wrapped}patch_embed.proj.{{leaf*}}", projection)
        yield Rule(f"{wrapped}norm.{{leaf*}}", f"{prefix}layernorm.{{leaf}}")
        yield from layer_rules(f"{wrapped}blocks.{{n}}", _META, ours=layer)
        for i, name in enumerate(("query", "key", "value")):
            yield Rule(
                f"{wrapped}blocks.{{n}}.attn.qkv.{{leaf*}}",
                f"{layer}.attention.attention.{name}.{{leaf}}",
                cut=(0, i * dim, dim),
            )

    # fairseq2's converter of Meta's checkpoints omits the prefix that its module has.
    for name in ("patch_feature_extractor", "feature_extractor"):
        yield Rule(f"encoder_frontend.{name}.conv.{{leaf*}}", projection)
    yield Rule("encoder.layer_norm.{leaf*}", f"{prefix}layernorm.{{leaf}}")
    yield from layer_rules("encoder.layers.{n}", fairseq2_layer("self_attn"), ours=layer)

    for wrapped in ("ijepa.", ""):
        yield from layer_rules(f"{wrapped}layers.{{n}}", _TRANSFORMERS_5, ours=layer)
        yield Rule(f"{wrapped}embeddings.mask_token", None)  # for pre-training
        if positions is None:
            yield Rule(f"{wrapped}embeddings.position_embeddings", None, computed=True)


def _rules(config: JepaConfig) -> Sequence[Rule]:
    return (
        *encoder_rules(config.encoder_config),
        Rule("classifier.{rest*}", None),
        Rule("ijepa.{rest*}", "{rest}"),
    )


# --- config.json -----------------------------------------------------------------------------------------------------


def _read_inner_dim(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    inner, dim = keys.count("intermediate_size", 3072), earlier["model_dim"]
    ratio = inner / dim

    # The width is rounded down, and must not be by a rounded ratio.
    return {"ffn_inner_dim_ratio": ratio if int(dim * ratio) == inner else math.nextafter(ratio, math.inf)}


def _sizes(name: str) -> Any:
    def write(config: JepaEncoderConfig) -> object:
        height, width = getattr(config, name)

        return height if height == width else [height, width]

    return write


_ENTRIES: Entries = (
    same_for_all("hidden_act", "gelu", "gelu_python"),
    Field("model_dim", "hidden_size", ConfigReader.count, 768),
    Field("num_input_channels", "num_channels", ConfigReader.count, 3),
    Field("input_dims", "image_size", ConfigReader.pair, 224, write=_sizes("input_dims")),
    Field("patch_dims", "patch_size", ConfigReader.pair, 16, write=_sizes("patch_dims")),
    Field("num_encoder_layers", "num_hidden_layers", ConfigReader.layers, 12),
    Field("num_encoder_attn_heads", "num_attention_heads", ConfigReader.count, 12),
    Field("qkv_bias", "qkv_bias", ConfigReader.flag, True),
    Field("attn_dropout_p", "attention_probs_dropout_prob", ConfigReader.number, 0.0),
    KeyGroup(("intermediate_size",), _read_inner_dim, lambda config: {"intermediate_size": config.ffn_inner_dim()}),
    Field("init_std", "initializer_range", ConfigReader.number, 0.02),
    Field("dropout_p", "hidden_dropout_prob", ConfigReader.number, 0.0),
    Field("norm_eps", "layer_norm_eps", ConfigReader.number, 1e-12),
)

CONFIG_JSON = ConfigTable(
    family="jepa",
    model_type="ijepa",
    architecture="IJepaModel",
    config_kls=JepaConfig,
    spec=_spec,
    free=("droppath_p", "uniform_power"),
    entries=(
        KeyGroup(
            tuple(key for entry in _ENTRIES for key in entry.keys),
            lambda keys, earlier: {
                "encoder_config": JepaEncoderConfig(learned_positions=True, **read_fields(_ENTRIES, keys))
            },
            lambda config: keys_of(_ENTRIES, config.encoder_config),
        ),
    ),
    required={**CHANGES_EACH_MODEL, "head_dim": None},
    ignored={
        "pooler_act": "only a pooler reads it, which the class does not build",
        "pooler_output_size": "only a pooler reads it, which the class does not build",
    },
)
"""The keys of ``config.json``. V-JEPA 2 is another model, with rotary positions, and V-JEPA has no such file."""


def _to_hf(config: JepaConfig) -> Mapping[str, object]:
    if len(config.encoder_config.patch_dims) != 2 or not config.encoder_config.learned_positions:
        found = config.encoder_config
        raise NotSupportedError(
            "A config.json of the type 'ijepa' describes models of images with `learned_positions`, but `patch_dims` "
            f"is {list(found.patch_dims)} and `learned_positions` is {found.learned_positions}. Write the "
            "checkpoint in lading's own names with `lading convert`."
        )

    return CONFIG_JSON.write(config)


FAMILY: Family[Jepa, JepaConfig] = Family(
    name="jepa",
    kls="lading.families.nn.jepa:Jepa",
    config_kls=JepaConfig,
    build=deferred_call("lading.families.nn.jepa:Jepa"),
    init=deferred_call("lading.families.nn.jepa:init_jepa"),
    shapes=_shapes,
    rules=_rules,
    parallel_plan=lambda config: vision_plan(_spec(config), "encoder.layer.*"),
    hf_model_types=frozenset({"ijepa"}),
    hf_architectures=frozenset({"IJepaModel"}),
    from_hf=CONFIG_JSON.read,
    hf_stated=CONFIG_JSON.stated,
    to_hf=_to_hf,
)

get_jepa_model_hub: ModelHubAccessor[Jepa, JepaConfig] = ModelHubAccessor("jepa", FAMILY.kls, JepaConfig)
