"""wav2vec 2.0 (https://arxiv.org/abs/2006.11477) for pre-training, which tells quantized frames from distractors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lading.errors import NotSupportedError
from lading.families.config_json import ConfigReader, ConfigTable, Field
from lading.families.name_rules import also_wrapped
from lading.families.nn.checks import require_positive, require_quantizer
from lading.families.nn.shapes import Shapes, projection, under
from lading.families.nn.speech_spec import speech_plan
from lading.families.wav2vec2_config import Wav2Vec2Config as Wav2Vec2Config
from lading.families.wav2vec2_config import pretraining_spec
from lading.families.wav2vec2_encoder import (
    ENCODER,
    MASKING,
    NO_ADAPTERS,
    TRAINING_ONLY,
    encoder_rules,
)
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred, deferred_call

if TYPE_CHECKING:
    from lading.families.nn.wav2vec2 import Wav2Vec2 as Wav2Vec2
    from lading.families.nn.wav2vec2 import Wav2Vec2Loss as Wav2Vec2Loss
    from lading.families.nn.wav2vec2 import Wav2Vec2Output as Wav2Vec2Output
else:
    __getattr__ = deferred(
        globals(),
        Wav2Vec2="lading.families.nn.wav2vec2",
        Wav2Vec2Output="lading.families.nn.wav2vec2",
        Wav2Vec2Loss="lading.families.nn.wav2vec2",
    )


def shapes(config: Wav2Vec2Config) -> Shapes:
    """Return the names and shapes of the parameters of a :class:`Wav2Vec2`.

    :raises ValueError: the sizes, or the masks, are not valid.
    """
    spec = pretraining_spec(config)
    require_positive(config, "final_dim")
    require_quantizer(config.quantized_dim, config.num_codebooks, config.num_codebook_entries)
    entries = config.num_codebooks * config.num_codebook_entries

    return {
        **under("wav2vec2", spec.shapes()),
        "quantizer.codevectors": (1, entries, config.quantized_dim // config.num_codebooks),
        **projection("quantizer.weight_proj", spec.feature_dim, entries),
        **projection("project_hid", spec.model_dim, config.final_dim, bias=config.final_proj_bias),
        **projection("project_q", config.quantized_dim, config.final_dim),
    }


def rules(config: Wav2Vec2Config) -> Sequence[Rule]:
    """Return the rules for the names of fairseq's and fairseq2's checkpoints."""
    return (
        # fairseq's `project_q` has the same name here; fairseq and fairseq2 share the name `final_proj`.
        Rule("final_proj.{p*}", "project_hid.{p}"),
        Rule("final_target_proj.{p*}", "project_q.{p}"),
        Rule("quantizer.vars", "quantizer.codevectors"),
        Rule("quantizer.entries", "quantizer.codevectors"),
        Rule("quantizer.entry_proj.{p*}", "quantizer.weight_proj.{p}"),
        Rule("quantizer.num_updates", None, computed=True),
        *encoder_rules(config.encoder_config, masked=True),
    )


CONFIG_JSON = ConfigTable(
    family="wav2vec2",
    model_type="wav2vec2",
    architecture="Wav2Vec2ForPreTraining",
    config_kls=Wav2Vec2Config,
    spec=pretraining_spec,
    free=TRAINING_ONLY,
    entries=(
        ENCODER,
        Field("final_dim", "proj_codevector_dim", ConfigReader.count, 256),
        Field("quantized_dim", "codevector_dim", ConfigReader.count, 256),
        Field("num_codebooks", "num_codevector_groups", ConfigReader.count, 2),
        Field("num_codebook_entries", "num_codevectors_per_group", ConfigReader.count, 320),
        Field("num_distractors", "num_negatives", ConfigReader.count, 100),
        Field("logit_temp", "contrastive_logits_temperature", ConfigReader.number, 0.1),
        *MASKING,
    ),
    constants={"apply_spec_augment": True},
    required={**NO_ADAPTERS, "apply_spec_augment": True},
    open=True,
)
"""The keys of ``config.json``, which lacks what a training script holds: temperatures, and whether the frontend learns
from both."""


def _to_hf(config: Wav2Vec2Config) -> Mapping[str, object]:
    if not config.final_proj_bias:
        raise NotSupportedError(
            "A config.json of the type 'wav2vec2' cannot describe a model for pre-training without `final_proj_bias`."
        )

    return CONFIG_JSON.write(config)


FAMILY: Family[Wav2Vec2, Wav2Vec2Config] = Family(
    name="wav2vec2",
    kls="lading.families.nn.wav2vec2:Wav2Vec2",
    config_kls=Wav2Vec2Config,
    build=deferred_call("lading.families.nn.wav2vec2:Wav2Vec2"),
    init=deferred_call("lading.families.nn.wav2vec2:init_wav2vec2"),
    shapes=shapes,
    rules=lambda config: also_wrapped(rules(config)),
    parallel_plan=lambda config: speech_plan(pretraining_spec(config), "wav2vec2"),
    hf_model_types=frozenset({"wav2vec2"}),
    hf_architectures=frozenset({"Wav2Vec2ForPreTraining"}),
    from_hf=CONFIG_JSON.read,
    hf_stated=CONFIG_JSON.stated,
    to_hf=_to_hf,
)

get_wav2vec2_model_hub: ModelHubAccessor[Wav2Vec2, Wav2Vec2Config] = ModelHubAccessor(
    "wav2vec2", FAMILY.kls, Wav2Vec2Config
)
