"""The configuration of w2v-BERT."""

from __future__ import annotations

from dataclasses import dataclass, field

from lading.families.nn.checks import require_positive
from lading.families.wav2vec2_config import Wav2Vec2Config
from lading.families.wav2vec2_encoder import Wav2Vec2EncoderConfig


def _wav2vec2() -> Wav2Vec2Config:
    return Wav2Vec2Config(
        encoder_config=Wav2Vec2EncoderConfig(
            model_dim=1024,
            feature_dim=160,
            use_fbank=True,
            layer_norm_features=False,
            feature_extractor_layer_descs=[],
            feature_grad_scale=0.0,
            num_fbank_channels=80,
            fbank_stride=2,
            sample_fbank_every_k=1,
            pos_encoder_type="relative",
            pos_encoder_depth=0,
            pos_conv_kernel_size=0,
            num_pos_conv_groups=0,
            use_conformer=True,
            num_encoder_layers=24,
            num_encoder_attn_heads=16,
            ffn_inner_dim=4096,
            dropout_p=0.0,
            attn_dropout_p=0.0,
            layer_drop_p=0.0,
            depthwise_conv_kernel_size=31,
        ),
        final_dim=768,
        max_temporal_mask_prob=0.65,
        quantized_dim=1024,
        num_codebooks=1,
        num_codebook_entries=1024,
        codebook_sampling_temperature=(2.0, 0.1, 0.999995),
    )


@dataclass(kw_only=True)
class W2VBertConfig:
    """The configuration; the defaults are those of the model with 600 million parameters."""

    w2v2_config: Wav2Vec2Config = field(default_factory=_wav2vec2)
    """The wav2vec 2.0 model whose first layers tell quantized frames from distractors."""

    num_bert_encoder_layers: int = 16
    """The number of layers after these, which predict the quantized frames."""

    num_target_codebooks: int = 1
    """The number of codebooks whose entries are predicted."""


def check(config: W2VBertConfig) -> None:
    """Require layers for both tasks, codebooks to predict, and no dropped layers.

    :raises ValueError: a number of layers or codebooks is not valid, or layers are dropped.
    """
    require_positive(config, "num_bert_encoder_layers", "num_target_codebooks")
    encoder = config.w2v2_config.encoder_config
    if config.num_bert_encoder_layers >= encoder.num_encoder_layers:
        raise ValueError(
            f"`num_bert_encoder_layers` must be less than the `num_encoder_layers` of {encoder.num_encoder_layers}, "
            f"but is {config.num_bert_encoder_layers}"
        )
    if config.num_target_codebooks > config.w2v2_config.num_codebooks:
        raise ValueError(
            f"`num_target_codebooks` must be at most the `num_codebooks` of {config.w2v2_config.num_codebooks}, but is "
            f"{config.num_target_codebooks}"
        )
    if encoder.layer_drop_p != 0.0:
        raise ValueError(f"`layer_drop_p` must be 0 in w2v-BERT, but is {encoder.layer_drop_p}")
