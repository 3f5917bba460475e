"""wav2vec 2.0 (https://arxiv.org/abs/2006.11477) for speech recognition with CTC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from lading.cards.config import StrictConfig
from lading.families.config_json import ConfigReader, ConfigTable, Field, KeyGroup
from lading.families.nn.checks import require_dropout, require_positive, shared_fields
from lading.families.nn.masking import Masking, MaskingConfig
from lading.families.nn.speech import SpeechModel, init_speech, speech_plan
from lading.families.nn.speech_encoder import SpeechSpec
from lading.families.nn.uninitialized import Linear
from lading.families.wav2vec2_encoder import (
    ENCODER,
    MASKING,
    NO_ADAPTERS,
    TRAINING_ONLY,
    Wav2Vec2EncoderConfig,
    encoder_rules,
    encoder_spec,
)
from lading.models.family import Family
from lading.models.hub import ModelHubAccessor
from lading.planning.rules import Rule


@dataclass(kw_only=True)
class Wav2Vec2AsrConfig(MaskingConfig, StrictConfig):
    """The configuration for speech recognition; the defaults are those of the base model, trained on 10 hours."""

    encoder_config: Wav2Vec2EncoderConfig = field(
        default_factory=lambda: Wav2Vec2EncoderConfig(
            feature_grad_scale=1.0, dropout_p=0.0, attn_dropout_p=0.0, ffn_inner_dropout_p=0.1
        )
    )
    """The encoder."""

    target_vocab_size: int = 32
    """The number of symbols."""

    final_dropout_p: float = 0.0
    """The dropout probability of the outputs of the encoder."""

    use_masking: bool = True
    """True if frames and features are masked in training."""

    spatial_mask_span_len: int = 64
    """The length of a masked span, in features."""

    max_spatial_mask_prob: float = 0.55
    """The share of features that masked spans would cover if none overlapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wav2Vec2AsrOutput:
    """The output of speech recognition."""

    logits: Tensor
    """The logits of the symbols in each frame, (N, T, target_vocab_size)."""
    num_frames: Tensor
    """The frames of each sequence without padding, (N), int64, for :func:`torch.nn.functional.ctc_loss`."""


class Wav2Vec2Asr(nn.Module):
    """A wav2vec 2.0 encoder with a projection to symbols; its parameters are uninitialized."""

    def __init__(self, config: Wav2Vec2AsrConfig) -> None:
        super().__init__()

        self.masking = Masking(**shared_fields(Masking, config)) if config.use_masking else None
        self.final_dropout_p = config.final_dropout_p

        self.wav2vec2 = SpeechModel(_spec(config))
        self.lm_head = Linear(config.encoder_config.model_dim, config.target_vocab_size)

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Wav2Vec2AsrOutput:
        """Recognize a waveform (N, S) at 16 kHz with mean 0 and variance 1, or filter banks (N, S, C).

        :param attention_mask: (N, S); 1 is audio, 0 the padding after it. Models with a group normalization between
            convolutions were trained without a mask: they see padding, which must be zero.

        :raises ValueError: the input or a mask has another shape, or the audio is too short for a frame or for the
            masks in training.
        """
        encoded = self.wav2vec2(input_values, attention_mask, masking=self.masking if self.training else None)
        logits = self.lm_head(dropout(encoded.hidden, self.final_dropout_p, self.training))

        # The output of a linear with bias is a view, and FSDP warns about modules that return one.
        return Wav2Vec2AsrOutput(logits=logits.clone(), num_frames=encoded.num_frames)


def _spec(config: Wav2Vec2AsrConfig) -> SpeechSpec:
    require_positive(config, "target_vocab_size")
    require_dropout(config, "final_dropout_p")

    return encoder_spec(config.encoder_config, masked=config.use_masking)


@torch.no_grad()
def _init(model: Wav2Vec2Asr, config: Wav2Vec2AsrConfig, name: str, parameter: Tensor) -> None:
    part, _, rest = name.partition(".")
    if part == "wav2vec2":
        init_speech(model.wav2vec2, rest, parameter, std=config.encoder_config.init_std)
    elif rest == "weight":
        nn.init.xavier_uniform_(parameter)
    else:
        parameter.zero_()


def _rules(config: Wav2Vec2AsrConfig) -> Sequence[Rule]:
    prefix = "w2v_encoder.w2v_model."

    return (
        Rule("w2v_encoder.proj.{p*}", "lm_head.{p}"),  # fairseq
        Rule("final_proj.{p*}", "lm_head.{p}"),  # fairseq2
        # Parameters for pre-training only.
        *(Rule(f"{prefix}{head}.{{p*}}", None) for head in ("quantizer", "project_q", "final_proj")),
        *encoder_rules(config.encoder_config, masked=config.use_masking, fairseq_prefix=prefix),
    )


def _masking_keys(config: Wav2Vec2AsrConfig) -> Mapping[str, object]:
    masks = config.use_masking

    return {"apply_spec_augment": masks} | ({} if masks else {"mask_time_prob": 0.0, "mask_feature_prob": 0.0})


CONFIG_JSON = ConfigTable(
    family="wav2vec2_asr",
    model_type="wav2vec2",
    architecture="Wav2Vec2ForCTC",
    config_kls=Wav2Vec2AsrConfig,
    spec=_spec,
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


FAMILY = Family(
    name="wav2vec2_asr",
    kls=Wav2Vec2Asr,
    config_kls=Wav2Vec2AsrConfig,
    build=Wav2Vec2Asr,
    init=_init,
    rules=_rules,
    parallel_plan=lambda config: speech_plan(_spec(config), "wav2vec2"),
    hf_model_types=frozenset({"wav2vec2"}),
    hf_architectures=frozenset({"Wav2Vec2ForCTC"}),
    from_hf=CONFIG_JSON.read,
    to_hf=CONFIG_JSON.write,
)

get_wav2vec2_asr_model_hub = ModelHubAccessor("wav2vec2_asr", Wav2Vec2Asr, Wav2Vec2AsrConfig)
