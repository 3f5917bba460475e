"""wav2vec 2.0 (https://arxiv.org/abs/2006.11477) for speech recognition with CTC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lading.families.config_json import ConfigReader, ConfigTable, Field, KeyGroup
from lading.families.name_rules import also_wrapped
from lading.families.nn.shapes import Shapes, projection, under
from lading.families.nn.speech_spec import speech_plan
from lading.families.wav2vec2_config import Wav2Vec2AsrConfig as Wav2Vec2AsrConfig
from lading.families.wav2vec2_config import recognition_spec
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
    from lading.families.nn.wav2vec2_asr import Wav2Vec2Asr as Wav2Vec2Asr
    from lading.families.nn.wav2vec2_asr import Wav2Vec2AsrOutput as Wav2Vec2AsrOutput
else:
    __getattr__ = deferred(
        globals(),
        Wav2Vec2Asr="lading.families.nn.wav2vec2_asr",
        Wav2Vec2AsrOutput="lading.families.nn.wav2vec2_asr",
    )


def _shapes(config: Wav2Vec2AsrConfig) -> Shapes:
    spec = recognition_spec(config)

    return under("wav2vec2", spec.shapes()) | projection("lm_head", spec.model_dim, config.target_vocab_size)


def _rules(config: Wav2Vec2AsrConfig) -> Sequence[Rule]:
    prefix = "w2v_encoder.w2v_model."

    return also_wrapped(
        (
            Rule("w2v_encoder.proj.{p*}", "lm_head.{p}"),  # fairseq
            Rule("final_proj.{p*}", "lm_head.{p}"),  # fairseq2
            # Parameters for pre-training only.
            *(Rule(f"{prefix}{head}.{{p*}}", None) for head in ("quantizer", "project_q", "final_proj")),
            *encoder_rules(config.encoder_config, masked=config.use_masking, fairseq_prefix=prefix),
        )
    )


def _masking_keys(config: Wav2Vec2AsrConfig) -> Mapping[str, object]:
    masks = config.use_masking

    return {"apply_spec_augment": masks} | ({} if masks else {"mask_time_prob": 0.0, "mask_feature_prob": 0.0})


CONFIG_JSON = ConfigTable(
    family="wav2vec2_asr",
    model_type="wav2vec2",
    architecture="Wav2Vec2ForCTC",
    config_kls=Wav2Vec2AsrConfig,
    spec=recognition_spec,
    free=TRAINING_ONLY,
    entries=(
        ENCODER,
        Field("target_vocab_size", "vocab_size", ConfigReader.count, 32),
        Field("final_dropout_p", "final_dropout", ConfigReader.number, 0.1),
        *MASKING,
        # Masking is a matter of training, and left off: the commonest of these checkpoints, such as
        # facebook/wav2vec2-base-960h, lack the embedding of masked frames although their file speaks of it.
        KeyGroup((), lambda keys, earlier: {"use_masking": False}, _masking_keys),
    ),
    required=NO_ADAPTERS,
    open=True,
)
"""The keys of ``config.json``; those of a model without the embedding that stands for masked frames mask none."""


FAMILY: Family[Wav2Vec2Asr, Wav2Vec2AsrConfig] = Family(
    name="wav2vec2_asr",
    kls="lading.families.nn.wav2vec2_asr:Wav2Vec2Asr",
    config_kls=Wav2Vec2AsrConfig,
    build=deferred_call("lading.families.nn.wav2vec2_asr:Wav2Vec2Asr"),
    init=deferred_call("lading.families.nn.wav2vec2_asr:init_wav2vec2_asr"),
    shapes=_shapes,
    rules=_rules,
    parallel_plan=lambda config: speech_plan(recognition_spec(config), "wav2vec2"),
    hf_model_types=frozenset({"wav2vec2"}),
    hf_architectures=frozenset({"Wav2Vec2ForCTC"}),
    from_hf=CONFIG_JSON.read,
    hf_stated=CONFIG_JSON.stated,
    to_hf=CONFIG_JSON.write,
)

get_wav2vec2_asr_model_hub: ModelHubAccessor[Wav2Vec2Asr, Wav2Vec2AsrConfig] = ModelHubAccessor(
    "wav2vec2_asr", FAMILY.kls, Wav2Vec2AsrConfig
)
