"""Frontend, masks and encoder of wav2vec 2.0 (https://arxiv.org/abs/2006.11477) as one module.

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lading.families.nn.conformer import init_conformer
from lading.families.nn.masking import Masking
from lading.families.nn.speech_encoder import SpeechEncoder, WeightNorm
from lading.families.nn.speech_frontend import ConvolutionalFeatures, FeatureProjection, FilterBankFeatures
from lading.families.nn.speech_spec import SpeechSpec
from lading.families.nn.uninitialized import Conv1d, GroupNorm, LayerNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechOutput:
    """The output of the encoder."""

    hidden: Tensor
    """The hidden states, (N, T, model_dim)."""
    inner: Tensor | None
    """The outputs of the layer that was asked for, (N, T, model_dim)."""
    features: Tensor
    """The normalized frames before projection and masking, (N, T, feature_dim)."""
    raw_features: Tensor
    """The frames before normalization, (N, T, feature_dim)."""
    num_frames: Tensor
    """The number of frames of each sequence without padding, (N), int64."""
    temporal_mask: Tensor | None
    """The mask over frames, true where masked, (N, T); ``None`` without masking."""


class SpeechModel(nn.Module):
    """Frontend, masking and encoder; their parameters are uninitialized."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.spec = spec

        self.masked_spec_embed = nn.Parameter(torch.empty(spec.model_dim)) if spec.masked else None
        self.feature_extractor: ConvolutionalFeatures | FilterBankFeatures
        if spec.fbank is not None:
            self.feature_extractor = FilterBankFeatures(spec.fbank[0], stride=spec.fbank[1])
        else:
            self.feature_extractor = ConvolutionalFeatures(spec)
        self.feature_projection = FeatureProjection(spec)
        self.encoder = SpeechEncoder(spec)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        masking: Masking | None = None,
        temporal_mask: Tensor | None = None,
        inner_layer: int | None = None,
    ) -> SpeechOutput:
        """Encode a waveform (N, S), or filter banks (N, S, C).

        :param attention_mask: (N, S); 1 is audio, 0 the padding after it.
        :param masking: draws masks over frames and their features.
        :param temporal_mask: bool, (N, T), instead of a drawn mask.
        :param inner_layer: the index of a layer whose outputs to return, too.

        :raises ValueError: the input or a mask has another shape, or the audio is too short for a frame or for a mask,
            or too long.
        """
        self._check(input_values, attention_mask)

        if attention_mask is None:
            lengths = torch.full((input_values.size(0),), input_values.size(1), device=input_values.device)
        else:
            lengths = attention_mask.to(input_values.device).long().sum(1)
        num_frames = self.feature_extractor.num_frames(lengths)

        raw_features = self.feature_extractor(input_values)
        x, features = self.feature_projection(raw_features)

        if masking is not None and temporal_mask is None:
            temporal_mask = masking.temporal(num_frames, x.size(1))
        if temporal_mask is not None:
            x = self._apply_mask(x, temporal_mask)
        if masking is not None:
            spatial_mask = masking.spatial(x.size(0), x.size(2), x.device)
            if spatial_mask is not None:
                x = x.masked_fill(spatial_mask[:, None], 0.0)

        frame_mask = None
        if attention_mask is not None:
            frame_mask = torch.arange(x.size(1), device=x.device) < num_frames[:, None]

        hidden, inner = self.encoder(x, frame_mask, inner_layer=inner_layer)

        return SpeechOutput(
            hidden=hidden,
            inner=inner,
            features=features,
            raw_features=raw_features,
            num_frames=num_frames,
            temporal_mask=temporal_mask,
        )

    def _check(self, input_values: Tensor, attention_mask: Tensor | None) -> None:
        fbank = self.spec.fbank
        if input_values.dim() != (2 if fbank is None else 3) or (
            fbank is not None and input_values.size(2) != fbank[0]
        ):
            expected = "a waveform (N, S)" if fbank is None else f"filter banks (N, S, {fbank[0]})"
            raise ValueError(f"the input must be {expected}, but is of shape {tuple(input_values.shape)}")
        if attention_mask is not None and attention_mask.shape != input_values.shape[:2]:
            raise ValueError(
                f"`attention_mask` must be of shape {tuple(input_values.shape[:2])}, but is of shape "
                f"{tuple(attention_mask.shape)}"
            )
        num_frames = int(self.feature_extractor.num_frames(torch.tensor(input_values.size(1), device="cpu")))
        if num_frames < 1:
            raise ValueError(f"the input is too short for a single frame: its length is {input_values.size(1)}")
        limit = self.spec.max_seq_len
        if limit is not None and num_frames > limit:
            raise ValueError(f"the input must have at most {limit} frames, the `max_seq_len`, but has {num_frames}")

    def _apply_mask(self, x: Tensor, temporal_mask: Tensor) -> Tensor:
        if self.masked_spec_embed is None:
            raise ValueError("the model was built without the embedding for masked frames")
        if temporal_mask.shape != x.shape[:2]:
            raise ValueError(
                f"`temporal_mask` must be of shape {tuple(x.shape[:2])}, one value per frame, but is of shape "
                f"{tuple(temporal_mask.shape)}"
            )

        return torch.where(temporal_mask[:, :, None], self.masked_spec_embed.to(x.dtype), x)


@torch.no_grad()
def init_speech(model: SpeechModel, name: str, parameter: Tensor, *, std: float) -> None:
    """Initialize ``parameter`` randomly.

    :param name: the name of the parameter in ``model``, whose own tensor is not used.
    :param std: the standard deviation of projections inside the layers.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)

    if init_conformer(module, leaf, parameter):
        return
    if isinstance(module, GroupNorm | LayerNorm):
        parameter.fill_(1.0 if leaf == "weight" else 0.0)
    elif isinstance(module, Conv1d):
        if leaf == "weight":
            nn.init.kaiming_normal_(parameter)
        else:
            init_projection(parameter, module.in_channels * module.kernel_size[0])
    elif isinstance(module, WeightNorm):
        output_dim, input_dim, kernel_size = module.original1.shape
        std = (4.0 / (kernel_size * output_dim)) ** 0.5
        if leaf == "original1":
            nn.init.normal_(parameter, std=std)
        else:
            # The expected norm of a direction drawn this way, within a percent; the two are initialized separately.
            parameter.fill_(std * (output_dim * input_dim) ** 0.5)
    elif module is model.feature_projection.projection:
        init_projection(parameter, model.spec.feature_dim)
    elif path.endswith("relative.projection"):
        init_projection(parameter, model.spec.model_dim)
    elif leaf == "bias":
        parameter.zero_()
    elif module is model:
        nn.init.uniform_(parameter)
    else:
        nn.init.normal_(parameter, std=std)


@torch.no_grad()
def init_projection(parameter: Tensor, input_dim: int) -> None:
    """Initialize the weight or bias of a projection uniformly within ``±input_dim ** -0.5``."""
    nn.init.uniform_(parameter, -(input_dim**-0.5), input_dim**-0.5)
