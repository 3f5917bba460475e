"""The modules of wav2vec 2.0 for pre-training: predictions of quantized frames, and their losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from lading.families.nn.checks import require_positive
from lading.families.nn.quantizer import GumbelQuantizer, QuantizerOutput, init_quantizer
from lading.families.nn.speech import SpeechModel, SpeechOutput, init_projection, init_speech
from lading.families.nn.uninitialized import Linear
from lading.families.wav2vec2_config import Wav2Vec2Config, masking_of
from lading.families.wav2vec2_encoder import encoder_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Wav2Vec2Output:
    """The output of a model for pre-training, for M masked frames in each sequence."""

    logits: Tensor
    """The logits (N, M, 1 + num_distractors), float32: the true candidate first, ``-inf`` for others equal to it."""
    states: Tensor
    """The projected outputs of the encoder at masked frames, (N, M, final_dim)."""
    targets: Tensor
    """The quantized frames at these positions, (N, M, final_dim)."""
    quantizer: QuantizerOutput
    temporal_mask: Tensor
    """The mask over frames, (N, T), true where masked."""
    hidden: Tensor
    """The outputs of the encoder, (N, T, model_dim)."""
    raw_features: Tensor
    """The frames before normalization, (N, T, feature_dim); training keeps their squares small."""
    num_frames: Tensor
    """The number of frames of each sequence without padding, (N), int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wav2Vec2Loss:
    """The losses of pre-training: scalars in float32, summed over the masked frames of the batch."""

    aggregate: Tensor
    """The weighted sum of the others."""
    contrastive: Tensor
    """The negative log-likelihood of the true candidate (equation 3 of the paper)."""
    diversity: Tensor
    """The share of codebook entries that are not in use (equation 4)."""
    features_penalty: Tensor
    """The mean square of frames before normalization."""


class Wav2Vec2(nn.Module):
    """A wav2vec 2.0 model for pre-training; its parameters are uninitialized."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()

        spec = encoder_spec(config.encoder_config, masked=True)

        self.masking = masking_of(config)
        self.target_dropout_p = spec.first_pass_dropout_p
        self.quantizer_encoder_grad = config.quantizer_encoder_grad
        self.num_distractors = config.num_distractors
        self.logit_temp = config.logit_temp

        require_positive(config, "final_dim")

        self.wav2vec2 = SpeechModel(spec)
        self.quantizer = GumbelQuantizer(
            spec.feature_dim,
            config.quantized_dim,
            num_codebooks=config.num_codebooks,
            num_entries=config.num_codebook_entries,
            temperature=config.codebook_sampling_temperature,
        )
        self.project_hid = Linear(spec.model_dim, config.final_dim, bias=config.final_proj_bias)
        self.project_q = Linear(config.quantized_dim, config.final_dim)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        temporal_mask: Tensor | None = None,
        distractors: Tensor | None = None,
    ) -> Wav2Vec2Output:
        """Encode a waveform (N, S), or filter banks (N, S, C), with masks in evaluation too.

        :param attention_mask: (N, S); 1 is audio, 0 the padding after it.
        :param temporal_mask: bool, (N, T), true at M frames of each row; drawn by default.
        :param distractors: int64, (N, M, L), the indices of the false candidates among the M masked frames; by default
            ``num_distractors`` random others.

        :raises ValueError: the input or a mask has another shape, or the audio is too short for a frame or for a mask.
        """
        encoded = self.wav2vec2(input_values, attention_mask, masking=self.masking, temporal_mask=temporal_mask)

        return self.contrast(encoded, encoded.hidden, distractors)

    def contrast(self, encoded: SpeechOutput, hidden: Tensor, distractors: Tensor | None = None) -> Wav2Vec2Output:
        """Tell the quantized frames at masks from distractors.

        :param encoded: the output of the encoder, with masks.
        :param hidden: the hidden states to do it from, (N, T, model_dim): those of the last layer, or of another.
        :param distractors: as in :meth:`forward`.

        :raises ValueError: the mask doesn't have the same number of frames in each row, or has fewer than two.
        """
        mask = encoded.temporal_mask
        assert mask is not None

        features = encoded.features if self.quantizer_encoder_grad else encoded.features.detach()
        features = dropout(features, self.target_dropout_p, self.training)

        quantized = self.quantizer(masked_frames(features, mask))
        # The output of a linear with bias is a view, and FSDP warns about modules that return one.
        targets = self.project_q(quantized.vectors).clone()
        states = self.project_hid(masked_frames(hidden, mask)).clone()

        if distractors is None:
            distractors = draw_distractors(targets, self.num_distractors)

        return Wav2Vec2Output(
            logits=contrastive_logits(states, targets, distractors, temperature=self.logit_temp),
            states=states,
            targets=targets,
            quantizer=quantized,
            temporal_mask=mask,
            hidden=hidden,
            raw_features=encoded.raw_features,
            num_frames=encoded.num_frames,
        )

    def loss(
        self, output: Wav2Vec2Output, *, diversity_weight: float = 0.1, features_penalty_weight: float = 10.0
    ) -> Wav2Vec2Loss:
        """Compute the losses of ``output``, by default with the weights of fairseq2's recipe.

        Divide them by the number of masked frames, ``output.logits.shape[:2].numel()``, for a mean.
        """
        logits = output.logits.flatten(0, 1)
        num_entries = self.quantizer.num_codebooks * self.quantizer.num_entries

        right = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        contrastive = nn.functional.cross_entropy(logits, right, reduction="sum")
        diversity = (num_entries - output.quantizer.prob_perplexity) / num_entries * len(logits)
        features_penalty = output.raw_features.float().square().mean() * len(logits)

        return Wav2Vec2Loss(
            aggregate=contrastive + diversity_weight * diversity + features_penalty_weight * features_penalty,
            contrastive=contrastive,
            diversity=diversity,
            features_penalty=features_penalty,
        )


def masked_frames(x: Tensor, mask: Tensor) -> Tensor:
    """Select masked frames, (N, T, D) → (N, M, D).

    :raises ValueError: the rows don't have the same number of them, or have fewer than two.
    """
    counts = mask.sum(1).tolist()
    if len(set(counts)) > 1 or counts[0] < 2:
        raise ValueError(f"a mask must have the same number of frames in each row, and two or more, but has {counts}")

    return x[mask].view(x.size(0), counts[0], x.size(2))


def draw_distractors(targets: Tensor, num_distractors: int) -> Tensor:
    """Draw other frames of each sequence with replacement, (N, M, D) → (N, M, num_distractors), int64."""
    batch_size, num_masked, _ = targets.shape

    own = torch.arange(num_masked, device=targets.device)[None, :, None]
    drawn = torch.randint(num_masked - 1, (batch_size, num_masked, num_distractors), device=targets.device)

    return drawn + (drawn >= own)


def contrastive_logits(states: Tensor, targets: Tensor, distractors: Tensor, *, temperature: float) -> Tensor:
    """Compute equation 3 of the paper: two (N, M, D) and indices (N, M, L) into M → (N, M, 1 + L), float32."""
    rows = torch.arange(targets.size(0), device=targets.device)[:, None, None]
    wrong = targets[rows, distractors]
    candidates = torch.cat((targets[:, :, None], wrong), dim=2)

    logits = torch.cosine_similarity(states[:, :, None].float(), candidates.float(), dim=-1) / temperature
    same = (wrong == targets[:, :, None]).all(-1)

    return logits.masked_fill(nn.functional.pad(same, (1, 0)), -torch.inf)


def init_wav2vec2(model: Wav2Vec2, config: Wav2Vec2Config, name: str, parameter: Tensor) -> None:
    """Initialize ``parameter`` randomly, by the part of the model that it belongs to."""
    part, _, rest = name.partition(".")
    if part == "wav2vec2":
        init_speech(model.wav2vec2, rest, parameter, std=config.encoder_config.init_std)
    elif part == "quantizer":
        init_quantizer(rest, parameter)
    else:
        init_projection(parameter, config.encoder_config.model_dim if part == "project_hid" else config.quantized_dim)
