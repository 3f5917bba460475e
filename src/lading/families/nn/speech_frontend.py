"""The frontend of a speech encoder, from audio to frames (https://arxiv.org/abs/2006.11477, section 2).

The names of parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, group_norm, layer_norm

from lading.families.nn.speech_spec import SpeechSpec
from lading.families.nn.uninitialized import Conv1d, GroupNorm, LayerNorm, Linear

CONV_NORM_EPS = 1e-5
"""The epsilon of the normalizations between convolutions, whatever that of the encoder."""


class ConvolutionLayer(nn.Module):
    """A convolution, an optional normalization, and the activation.

    :param norm: ``group`` normalizes each channel over time, ``layer`` each time step over channels.
    """

    def __init__(self, input_dim: int, desc: tuple[int, int, int], *, bias: bool, norm: str | None) -> None:
        super().__init__()

        output_dim, kernel_size, stride = desc

        self.conv = Conv1d(input_dim, output_dim, kernel_size, stride=stride, bias=bias)
        self.layer_norm: GroupNorm | LayerNorm | None
        if norm == "group":
            self.layer_norm = GroupNorm(output_dim, output_dim, eps=CONV_NORM_EPS)
        elif norm == "layer":
            self.layer_norm = LayerNorm(output_dim, eps=CONV_NORM_EPS)
        else:
            self.layer_norm = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, input_dim, S) → (N, output_dim, S_out)."""
        x = self.conv(x)

        norm = self.layer_norm
        if norm is not None:
            # In float32, because the sums are over up to a minute of samples.
            wide, weight, bias = x.float(), norm.weight.float(), norm.bias.float()
            if isinstance(norm, GroupNorm):
                y = group_norm(wide, norm.num_groups, weight, bias, norm.eps)
            else:
                y = layer_norm(wide.transpose(1, 2), norm.normalized_shape, weight, bias, norm.eps).transpose(1, 2)
            x = y.to(x.dtype)

        return gelu(x)


class ConvolutionalFeatures(nn.Module):
    """Frames from a waveform, by a stack of convolutions."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.layer_descs = tuple(spec.feature_extractor_layer_descs)
        self.grad_scale = spec.feature_grad_scale

        self.conv_layers = nn.ModuleList()
        input_dim = 1
        for i, desc in enumerate(self.layer_descs):
            norm = "layer" if spec.feature_extractor_layer_norm_convs else "group" if i == 0 else None
            self.conv_layers.append(ConvolutionLayer(input_dim, desc, bias=spec.feature_extractor_bias, norm=norm))
            input_dim = desc[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map samples (N, S) → frames (N, T, feature_dim)."""
        x = x[:, None]
        for layer in self.conv_layers:
            x = layer(x)

        if self.training and self.grad_scale != 1.0 and x.requires_grad:
            scale = self.grad_scale
            x.register_hook(lambda grad: grad * scale)  # type: ignore[no-untyped-call]

        return x.transpose(1, 2).contiguous()

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Map numbers of samples → numbers of frames, zero for fewer samples than one frame needs."""
        for _, kernel_size, stride in self.layer_descs:
            lengths = torch.div(lengths - kernel_size, stride, rounding_mode="floor") + 1

        return lengths.clamp(min=0)


class FilterBankFeatures(nn.Module):
    """Frames from log-mel filter banks, ``stride`` adjacent ones per frame."""

    def __init__(self, num_channels: int, *, stride: int) -> None:
        super().__init__()

        self.num_channels = num_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, num_channels) → frames (N, S // stride, num_channels * stride)."""
        whole = x.size(1) - x.size(1) % self.stride

        return x[:, :whole].reshape(x.size(0), whole // self.stride, -1)

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Map numbers of filter banks → numbers of frames."""
        return torch.div(lengths, self.stride, rounding_mode="floor")


class FeatureProjection(nn.Module):
    """A normalization of frames and a projection to the width of the encoder."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.dropout_p = spec.first_pass_dropout_p

        self.layer_norm = LayerNorm(spec.feature_dim, eps=spec.norm_eps)
        self.projection = Linear(spec.feature_dim, spec.model_dim) if spec.project_features else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, T, feature_dim) → (N, T, model_dim) and the normalized frames (N, T, feature_dim)."""
        normalized: Tensor = self.layer_norm(x)
        y = normalized if self.projection is None else self.projection(normalized)

        return dropout(y, self.dropout_p, self.training), normalized
