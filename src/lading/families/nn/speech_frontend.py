"""From sound to the frames that an encoder of speech reads (https://arxiv.org/abs/2006.11477, section 2).

The names of parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, group_norm, layer_norm

from lading.families.nn.uninitialized import Conv1d, GroupNorm, LayerNorm, Linear

CONV_NORM_EPS = 1e-5
"""Of the normalisations between convolutions, whatever that of the encoder."""


class ConvolutionLayer(nn.Module):
    """A convolution, its normalisation if there is one, and the activation.

    :param norm: ``group`` takes each channel over time, ``layer`` each time step over channels.
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
        """(N, input_dim, S) → (N, output_dim, S_out)."""
        x = self.conv(x)

        norm = self.layer_norm
        if norm is not None:
            # In float32, as the sums go over up to a minute of samples.
            wide, weight, bias = x.float(), norm.weight.float(), norm.bias.float()
            if isinstance(norm, GroupNorm):
                y = group_norm(wide, norm.num_groups, weight, bias, norm.eps)
            else:
                y = layer_norm(wide.transpose(1, 2), norm.normalized_shape, weight, bias, norm.eps).transpose(1, 2)
            x = y.to(x.dtype)

        return gelu(x)


class ConvolutionalFeatures(nn.Module):
    """Frames from a waveform: a stack of convolutions.

    :param layer_descs: output dimension, kernel size and stride of each layer.
    :param layer_norm: whether all layers have a layer normalisation; otherwise the first has a group normalisation.
    :param grad_scale: what the gradient is multiplied by in training, so that these layers learn more slowly.
    """

    def __init__(
        self, layer_descs: Sequence[tuple[int, int, int]], *, bias: bool, layer_norm: bool, grad_scale: float
    ) -> None:
        super().__init__()

        self.layer_descs = tuple(layer_descs)
        self.grad_scale = grad_scale

        self.conv_layers = nn.ModuleList()
        input_dim = 1
        for i, desc in enumerate(self.layer_descs):
            norm = "layer" if layer_norm else "group" if i == 0 else None
            self.conv_layers.append(ConvolutionLayer(input_dim, desc, bias=bias, norm=norm))
            input_dim = desc[0]

    def forward(self, x: Tensor) -> Tensor:
        """Samples (N, S) → frames (N, T, feature_dim)."""
        x = x[:, None]
        for layer in self.conv_layers:
            x = layer(x)

        if self.training and self.grad_scale != 1.0 and x.requires_grad:
            scale = self.grad_scale
            x.register_hook(lambda grad: grad * scale)  # type: ignore[no-untyped-call]

        return x.transpose(1, 2).contiguous()

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Numbers of samples → numbers of frames, none for what is shorter than the first."""
        for _, kernel_size, stride in self.layer_descs:
            lengths = torch.div(lengths - kernel_size, stride, rounding_mode="floor") + 1

        return lengths.clamp(min=0)


class FilterBankFeatures(nn.Module):
    """Frames from log-mel filter banks: each ``stride`` neighbours together."""

    def __init__(self, num_channels: int, *, stride: int) -> None:
        super().__init__()

        self.num_channels = num_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, num_channels) → frames (N, S // stride, num_channels * stride)."""
        whole = x.size(1) - x.size(1) % self.stride

        return x[:, :whole].reshape(x.size(0), whole // self.stride, -1)

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Numbers of filter bank frames → numbers of frames."""
        return torch.div(lengths, self.stride, rounding_mode="floor")


class FeatureProjection(nn.Module):
    """Normalises frames, and projects them to the width of the encoder."""

    def __init__(self, feature_dim: int, model_dim: int, *, project: bool, norm_eps: float, dropout_p: float) -> None:
        super().__init__()

        self.dropout_p = dropout_p

        self.layer_norm = LayerNorm(feature_dim, eps=norm_eps)
        self.projection = Linear(feature_dim, model_dim) if project else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, feature_dim) → (N, T, model_dim), and the normalised frames (N, T, feature_dim)."""
        normalised: Tensor = self.layer_norm(x)
        y = normalised if self.projection is None else self.projection(normalised)

        return dropout(y, self.dropout_p, self.training), normalised
