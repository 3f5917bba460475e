"""Conformer layers (https://arxiv.org/abs/2005.08100).

The names of parameters are those of Hugging Face checkpoints of such encoders, except inside attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, glu, silu

from lading.families.nn.attention import AttentionMask
from lading.families.nn.relative_positions import PositionBias
from lading.families.nn.speech_layers import Positions, SpeechAttention, SpeechFeedForward
from lading.families.nn.speech_spec import LayerSpec
from lading.families.nn.uninitialized import BatchNorm1d, Conv1d, LayerNorm


class _Convolution(Conv1d):
    """A convolution without a bias that keeps the length of a sequence."""

    def __init__(self, input_dim: int, output_dim: int, kernel_size: int = 1, *, groups: int = 1) -> None:
        super().__init__(input_dim, output_dim, kernel_size, padding="same", groups=groups, bias=False)


class ConformerConvolution(nn.Module):
    """A gated convolution over channels, one over time for each channel, and another over channels."""

    def __init__(self, dim: int, *, kernel_size: int, norm_eps: float) -> None:
        super().__init__()

        self.layer_norm = LayerNorm(dim, eps=norm_eps)
        self.pointwise_conv1 = _Convolution(dim, 2 * dim)
        self.depthwise_conv = _Convolution(dim, dim, kernel_size, groups=dim)
        self.batch_norm = BatchNorm1d(dim)
        self.pointwise_conv2 = _Convolution(dim, dim)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Normalize and convolve (N, T, dim) → the same shape."""
        x = self.layer_norm(x)
        if mask.visible is not None:
            # The convolution over time lets adjacent frames see padding.
            x = x.masked_fill(~mask.visible[:, 0, 0, :, None], 0.0)

        x = glu(self.pointwise_conv1(x.transpose(1, 2)), dim=1)
        x = silu(self.batch_norm(self.depthwise_conv(x)))
        y: Tensor = self.pointwise_conv2(x).transpose(1, 2)

        return y


class ConformerLayer(nn.Module):
    """Half a feed-forward network, attention, a convolution, and the other half, each normalized before."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()

        kernel_size = spec.depthwise_conv_kernel_size
        assert kernel_size is not None
        dim, eps = spec.model_dim, spec.norm_eps

        self.dropout_p = spec.dropout_p

        self.ffn1_layer_norm = LayerNorm(dim, eps=eps)
        self.ffn1 = SpeechFeedForward(spec, silu)
        self.self_attn_layer_norm = LayerNorm(dim, eps=eps)
        self.self_attn = SpeechAttention(spec)
        self.conv_module = ConformerConvolution(dim, kernel_size=kernel_size, norm_eps=eps)
        self.ffn2_layer_norm = LayerNorm(dim, eps=eps)
        self.ffn2 = SpeechFeedForward(spec, silu)
        self.final_layer_norm = LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, mask: AttentionMask, positions: Positions) -> Tensor:
        """Map (N, T, model_dim) → the same shape."""
        x = x + self._dropout(0.5 * self.ffn1(self.ffn1_layer_norm(x)))
        x = x + self._dropout(self.self_attn(self.self_attn_layer_norm(x), mask, positions))
        x = x + self._dropout(self.conv_module(x, mask))
        x = x + self._dropout(0.5 * self.ffn2(self.ffn2_layer_norm(x)))
        y: Tensor = self.final_layer_norm(x)

        return y

    def _dropout(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout_p, self.training)


@torch.no_grad()
def init_conformer(module: nn.Module, leaf: str, tensor: Tensor) -> bool:
    """Initialize ``tensor`` randomly if it belongs to a module that only Conformer layers and relative positions have.

    :param leaf: the name of the parameter or buffer in ``module``, whose own tensor is not used.

    :returns: whether it does.
    """
    if isinstance(module, BatchNorm1d):
        tensor.fill_(1.0 if leaf in ("weight", "running_var") else 0.0)
    elif isinstance(module, _Convolution):
        bound = (module.in_channels // module.groups * module.kernel_size[0]) ** -0.5
        nn.init.uniform_(tensor, -bound, bound)
    elif isinstance(module, PositionBias):
        nn.init.xavier_normal_(tensor)
    else:
        return False

    return True
