"""The module of wav2vec 2.0 for speech recognition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from lading.families.nn.speech import SpeechModel, init_speech
from lading.families.nn.uninitialized import Linear
from lading.families.wav2vec2_config import Wav2Vec2AsrConfig, masking_in_training, recognition_spec


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

        self.masking = masking_in_training(config)
        self.final_dropout_p = config.final_dropout_p

        self.wav2vec2 = SpeechModel(recognition_spec(config))
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


@torch.no_grad()
def init_wav2vec2_asr(model: Wav2Vec2Asr, config: Wav2Vec2AsrConfig, name: str, parameter: Tensor) -> None:
    part, _, rest = name.partition(".")
    if part == "wav2vec2":
        init_speech(model.wav2vec2, rest, parameter, std=config.encoder_config.init_std)
    elif rest == "weight":
        nn.init.xavier_uniform_(parameter)
    else:
        parameter.zero_()
