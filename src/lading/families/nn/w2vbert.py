"""The module of w2v-BERT: contrast and masked prediction on one encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lading.families.nn.speech import init_projection
from lading.families.nn.uninitialized import Linear
from lading.families.nn.wav2vec2 import Wav2Vec2, Wav2Vec2Loss, Wav2Vec2Output, init_wav2vec2, masked_frames
from lading.families.w2vbert_config import W2VBertConfig, check


@dataclass(frozen=True, slots=True, kw_only=True)
class W2VBertOutput:
    """The output of a model for pre-training, for M masked frames in each sequence."""

    w2v2: Wav2Vec2Output
    """The output of contrast, from the layers before those of masked prediction."""
    logits: Tensor
    """The logits of the entries of the codebooks, (N, M, num_codebook_entries, num_target_codebooks)."""
    targets: Tensor
    """The entries to predict, (N, M, num_target_codebooks), int64."""
    hidden: Tensor
    """The outputs of the encoder, (N, T, model_dim)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class W2VBertLoss:
    """The losses of pre-training: scalars in float32, summed over the masked frames of the batch."""

    aggregate: Tensor
    """The weighted sum of the others."""
    bert: Tensor
    """The cross-entropy of masked prediction."""
    w2v2: Wav2Vec2Loss


class W2VBert(nn.Module):
    """A w2v-BERT model for pre-training; its parameters are uninitialized."""

    def __init__(self, config: W2VBertConfig) -> None:
        super().__init__()

        check(config)

        encoder = config.w2v2_config.encoder_config
        self.contrast_layer = encoder.num_encoder_layers - config.num_bert_encoder_layers - 1
        self.num_target_codebooks = config.num_target_codebooks

        self.w2v2_model = Wav2Vec2(config.w2v2_config)
        self.final_bert_proj = Linear(
            encoder.model_dim, config.w2v2_config.num_codebook_entries * config.num_target_codebooks
        )

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        temporal_mask: Tensor | None = None,
        distractors: Tensor | None = None,
    ) -> W2VBertOutput:
        """Encode filter banks (N, S, C), or a waveform (N, S), with masks in evaluation too.

        :param attention_mask: (N, S); 1 is audio, 0 the padding after it.
        :param temporal_mask: bool, (N, T), true at M frames of each row; drawn by default.
        :param distractors: int64, (N, M, L), the indices of the false candidates among the M masked frames; by default
            ``num_distractors`` random others.

        :raises ValueError: the input or a mask has another shape, or the audio is too short for a frame or for a mask,
            or too long.
        """
        model = self.w2v2_model
        encoded = model.wav2vec2(
            input_values,
            attention_mask,
            masking=model.masking,
            temporal_mask=temporal_mask,
            inner_layer=self.contrast_layer,
        )
        w2v2 = model.contrast(encoded, encoded.inner, distractors)
        logits = self.final_bert_proj(masked_frames(encoded.hidden, encoded.temporal_mask))

        return W2VBertOutput(
            w2v2=w2v2,
            # The output of a linear with bias is a view, and FSDP warns about modules that return one.
            logits=logits.unflatten(-1, (-1, self.num_target_codebooks)).clone(),
            targets=w2v2.quantizer.entries[..., : self.num_target_codebooks],
            hidden=encoded.hidden,
        )

    def loss(
        self,
        output: W2VBertOutput,
        *,
        bert_weight: float = 1.0,
        bert_label_smoothing: float = 0.0,
        w2v2_weight: float = 1.0,
        diversity_weight: float = 0.1,
        features_penalty_weight: float = 10.0,
    ) -> W2VBertLoss:
        """Compute the losses of ``output``, by default with the weights of fairseq2's recipe."""
        bert = cross_entropy(
            output.logits.float().flatten(0, 1),
            output.targets.flatten(0, 1),
            reduction="sum",
            label_smoothing=bert_label_smoothing,
        )
        w2v2 = self.w2v2_model.loss(
            output.w2v2, diversity_weight=diversity_weight, features_penalty_weight=features_penalty_weight
        )

        return W2VBertLoss(aggregate=bert_weight * bert + w2v2_weight * w2v2.aggregate, bert=bert, w2v2=w2v2)


@torch.no_grad()
def init_w2vbert(model: W2VBert, config: W2VBertConfig, name: str, parameter: Tensor) -> None:
    """Initialize ``parameter`` randomly, by the part of the model that it belongs to."""
    part, _, rest = name.partition(".")
    if part == "w2v2_model":
        init_wav2vec2(model.w2v2_model, config.w2v2_config, rest, parameter)
    else:
        init_projection(parameter, config.w2v2_config.encoder_config.model_dim)
