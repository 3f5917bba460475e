"""The configurations of wav2vec 2.0 for pre-training and for speech recognition."""

from __future__ import annotations

from dataclasses import dataclass, field

from lading.families.nn.checks import require_dropout, require_positive, shared_fields
from lading.families.nn.masking import Masking, MaskingConfig
from lading.families.nn.speech_spec import SpeechSpec
from lading.families.wav2vec2_encoder import Wav2Vec2EncoderConfig, encoder_spec


@dataclass(kw_only=True)
class Wav2Vec2Config(MaskingConfig):
    """The configuration of a model for pre-training; the defaults are those of the base model."""

    encoder_config: Wav2Vec2EncoderConfig = field(default_factory=Wav2Vec2EncoderConfig)
    """The encoder."""

    final_dim: int = 256
    """The width in which the outputs of the encoder and quantized frames are compared."""

    final_proj_bias: bool = True
    """True if the projection of the outputs of the encoder to that width has a bias."""

    quantizer_encoder_grad: bool = True
    """True if the frontend also learns through the quantizer."""

    quantized_dim: int = 256
    """The width of a quantized frame."""

    num_codebooks: int = 2
    """The number of codebooks; each gives a part of a quantized frame."""

    num_codebook_entries: int = 320
    """The number of entries of each codebook."""

    codebook_sampling_temperature: tuple[float, float, float] = (2.0, 0.5, 0.999995)
    """The temperature of the first update, the lowest one, and the factor between two updates."""

    num_distractors: int = 100
    """The number of wrong candidates for each masked frame."""

    logit_temp: float = 0.1
    """The temperature by which similarities are divided."""


def masking_of(config: Wav2Vec2Config) -> Masking:
    """Return the masks of pre-training.

    :raises ValueError: there are none.
    """
    if not config.max_temporal_mask_prob > 0.0:
        raise ValueError(
            "pre-training needs masked frames: `max_temporal_mask_prob` must be positive, but is "
            f"{config.max_temporal_mask_prob}"
        )

    return Masking(**shared_fields(Masking, config))


def pretraining_spec(config: Wav2Vec2Config) -> SpeechSpec:
    """Return the options of the encoder.

    :raises ValueError: the sizes, or the masks, are not valid.
    """
    masking_of(config)

    return encoder_spec(config.encoder_config, masked=True)


@dataclass(kw_only=True)
class Wav2Vec2AsrConfig(MaskingConfig):
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


def masking_in_training(config: Wav2Vec2AsrConfig) -> Masking | None:
    """Return the masks of training, if there are any."""
    return Masking(**shared_fields(Masking, config)) if config.use_masking else None


def recognition_spec(config: Wav2Vec2AsrConfig) -> SpeechSpec:
    """Return the options of the encoder.

    :raises ValueError: the sizes, or the masks, are not valid.
    """
    masking_in_training(config)
    require_positive(config, "target_vocab_size")
    require_dropout(config, "final_dropout_p")

    return encoder_spec(config.encoder_config, masked=config.use_masking)
