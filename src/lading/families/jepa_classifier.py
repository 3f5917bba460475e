"""Classification by the encoder of JEPA and an attentive pooler (https://arxiv.org/abs/2404.08471)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lading.families.jepa import encoder_rules, fairseq2_layer
from lading.families.jepa_config import JepaClassifierConfig as JepaClassifierConfig
from lading.families.jepa_config import JepaEncoderConfig as JepaEncoderConfig
from lading.families.jepa_config import checked_classifier
from lading.families.name_rules import layer_rules
from lading.families.nn.shapes import Shapes, norm, projection, under
from lading.families.nn.vision_spec import vision_plan
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.models.parallel_plan import ParallelPlan
from lading.planning.rules import Rule
from lading.system.deferred import deferred, deferred_call

if TYPE_CHECKING:
    from lading.families.nn.jepa import JepaClassifier as JepaClassifier
else:
    __getattr__ = deferred(globals(), JepaClassifier="lading.families.nn.jepa")

_POOLER_LAYER = "attn_pooler.decoder_layer"


def _shapes(config: JepaClassifierConfig) -> Shapes:
    spec = checked_classifier(config)
    found = under("jepa", spec.shapes())
    found["attn_pooler.query_tokens"] = (1, config.num_queries, spec.model_dim)
    found |= under(_POOLER_LAYER, spec.layer_shapes(project=config.decoder_projection))
    if config.pool_depth > 1:
        found |= spec.stack_shapes("attn_pooler.encoder", config.pool_depth)
        found |= norm("attn_pooler.layernorm", spec.model_dim)

    return found | projection("head_proj", spec.model_dim, config.num_classes)


def _plan(config: JepaClassifierConfig) -> ParallelPlan:
    return vision_plan(
        checked_classifier(config),
        "jepa.encoder.layer.*",
        "attn_pooler.encoder.layer.*",
        _POOLER_LAYER,
        whole_attention=None if config.decoder_projection else _POOLER_LAYER,
    )


def _rules(config: JepaClassifierConfig) -> Sequence[Rule]:
    return (
        *layer_rules(_POOLER_LAYER, fairseq2_layer("cross_attn"), ours=_POOLER_LAYER),
        *layer_rules(
            "attn_pooler.encoder.layers.{n}", fairseq2_layer("self_attn"), ours="attn_pooler.encoder.layer.{n}"
        ),
        Rule("attn_pooler.encoder.layer_norm.{leaf*}", "attn_pooler.layernorm.{leaf}"),
        *encoder_rules(config.encoder_config, "jepa."),
    )


FAMILY: Family[JepaClassifier, JepaClassifierConfig] = Family(
    name="jepa_classifier",
    kls="lading.families.nn.jepa:JepaClassifier",
    config_kls=JepaClassifierConfig,
    build=deferred_call("lading.families.nn.jepa:JepaClassifier"),
    init=deferred_call("lading.families.nn.jepa:init_jepa"),
    shapes=_shapes,
    rules=_rules,
    parallel_plan=_plan,
)

get_jepa_classifier_model_hub: ModelHubAccessor[JepaClassifier, JepaClassifierConfig] = ModelHubAccessor(
    "jepa_classifier", FAMILY.kls, JepaClassifierConfig
)
