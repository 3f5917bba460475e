"""The encoder of wav2vec 2.0 (https://arxiv.org/abs/2006.11477): positions and a stack of layers.

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, dropout, gelu, layer_norm

from lading.families.nn.attention import bidirectional_mask
from lading.families.nn.conformer import ConformerLayer
from lading.families.nn.relative_positions import embed_distances
from lading.families.nn.rope import RotaryEmbedding
from lading.families.nn.speech_layers import Positions, SpeechEncoderLayer
from lading.families.nn.speech_spec import SpeechSpec
from lading.families.nn.uninitialized import Conv1d, LayerNorm


class WeightNorm(nn.Module):
    """The weight of a convolution as a direction and, for each position of the kernel, a norm.

    It is weight normalization (https://arxiv.org/abs/1602.07868) with the parameter names of torch's parametrization.
    torch's computes norms in its constructor, which is impossible on the meta device, and its modules do not pickle.
    """

    def __init__(self, output_dim: int, input_dim: int, kernel_size: int) -> None:
        super().__init__()

        self.original0 = nn.Parameter(torch.empty(1, 1, kernel_size))
        self.original1 = nn.Parameter(torch.empty(output_dim, input_dim, kernel_size))

    def forward(self) -> Tensor:
        """Compute the weight, (output_dim, input_dim, kernel_size)."""
        return self.original1 * (self.original0 / self.norm())

    def norm(self) -> Tensor:
        """Compute the norm of the direction, (1, 1, kernel_size)."""
        norm: Tensor = torch.linalg.vector_norm(self.original1, dim=(0, 1), keepdim=True)

        return norm


class WeightNormConv1d(nn.Module):
    """A grouped convolution with a normalized weight that keeps the length of a sequence."""

    def __init__(self, dim: int, kernel_size: int, *, groups: int) -> None:
        super().__init__()

        self.kernel_size = kernel_size
        self.groups = groups

        self.bias = nn.Parameter(torch.empty(dim))
        self.parametrizations = nn.ModuleDict({"weight": WeightNorm(dim, dim // groups, kernel_size)})

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, dim, T) → the same shape; the window of each step starts half a kernel before it."""
        weight = self.parametrizations["weight"]()
        y = conv1d(x, weight, self.bias, padding=self.kernel_size // 2, groups=self.groups)

        # A kernel of even size gives one window too many.
        return y[:, :, : x.size(2)]


class PositionalConvolution(nn.Module):
    """Relative positions, computed by a convolution over many frames."""

    def __init__(self, model_dim: int, *, kernel_size: int, num_groups: int) -> None:
        super().__init__()

        self.conv = WeightNormConv1d(model_dim, kernel_size, groups=num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the positions to add to (N, T, model_dim), of the same shape."""
        return gelu(self.conv(x.transpose(1, 2))).transpose(1, 2)


class _PositionalLayer(nn.Module):
    """A convolution, a normalization without parameters, and the activation."""

    def __init__(self, model_dim: int, *, kernel_size: int, num_groups: int) -> None:
        super().__init__()

        self.conv = Conv1d(model_dim, model_dim, kernel_size, padding="same", groups=num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, model_dim) → the same shape."""
        y = self.conv(x.transpose(1, 2)).transpose(1, 2)

        return gelu(layer_norm(y, (y.size(2),)))


class StackedPositionalConvolution(nn.Module):
    """Relative positions, computed by several convolutions over fewer frames each."""

    def __init__(self, model_dim: int, *, kernel_size: int, num_groups: int, depth: int) -> None:
        super().__init__()

        self.layers = nn.ModuleList(
            _PositionalLayer(model_dim, kernel_size=kernel_size, num_groups=num_groups) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the positions to add to (N, T, model_dim), of the same shape."""
        for layer in self.layers:
            x = layer(x)

        return x


class SpeechEncoder(nn.Module):
    """The positions and the stack of layers."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.norm_first = spec.norm_first
        self.dropout_p = spec.dropout_p
        self.layer_drop_p = spec.layer_drop_p
        self.relative = spec.pos_encoder_type == "relative"

        self.pos_conv_embed: PositionalConvolution | StackedPositionalConvolution | None = None
        if spec.pos_encoder_type == "conv":
            kernel_size, num_groups = spec.pos_conv_layer_kernel_size, spec.num_pos_conv_groups
            if spec.pos_encoder_depth == 1:
                self.pos_conv_embed = PositionalConvolution(
                    spec.model_dim, kernel_size=kernel_size, num_groups=num_groups
                )
            else:
                self.pos_conv_embed = StackedPositionalConvolution(
                    spec.model_dim, kernel_size=kernel_size, num_groups=num_groups, depth=spec.pos_encoder_depth
                )
        rotary = spec.pos_encoder_type == "rotary"
        self.rotary = RotaryEmbedding(spec.head_dim, theta=10_000.0) if rotary else None
        # The one normalization outside layers comes first or last. No published model has both, hence the name.
        norm_both = spec.norm_first and spec.layer_norm_features
        self.input_layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps) if norm_both else None
        norm_one = spec.norm_first or spec.layer_norm_features
        self.layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps) if norm_one else None
        layer_kls = SpeechEncoderLayer if spec.depthwise_conv_kernel_size is None else ConformerLayer
        self.layers = nn.ModuleList(layer_kls(spec) for _ in range(spec.num_layers))

    def forward(
        self, x: Tensor, frame_mask: Tensor | None, *, inner_layer: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode (N, T, model_dim) → the same shape, and the output of the layer with the index ``inner_layer``.

        :param frame_mask: bool, (N, T); true is a frame, false padding.
        """
        mask = bidirectional_mask(frame_mask)
        if frame_mask is not None:
            # The convolution lets adjacent frames see padding.
            x = x.masked_fill(~frame_mask[:, :, None], 0.0)

        if self.pos_conv_embed is not None:
            x = x + self.pos_conv_embed(x)
        first_norm = self.input_layer_norm if self.norm_first else self.layer_norm
        if first_norm is not None:
            x = first_norm(x)
        x = dropout(x, self.dropout_p, self.training)

        positions = self._positions(x)
        inner = None
        drops = self.training and self.layer_drop_p > 0.0
        drawn = torch.rand(len(self.layers), device=x.device) if drops else None
        for i, layer in enumerate(self.layers):
            y = layer(x, mask, positions)
            # A skipped layer runs anyway, because the ranks of a gang, which draw independently, have to gather the
            # same parameters; its gradients are zero.
            x = y if drawn is None else torch.where(drawn[i] <= self.layer_drop_p, x, y)
            if i == inner_layer:
                inner = x

        if self.norm_first and self.layer_norm is not None:
            x = self.layer_norm(x)

        return x, inner

    def _positions(self, x: Tensor) -> Positions:
        _, length, dim = x.shape
        if self.relative:
            return Positions(distances=embed_distances(length, dim, device=x.device, dtype=x.dtype))
        if self.rotary is not None:
            return Positions(rotary=self.rotary(torch.arange(length, device=x.device)[None], torch.float32))

        return Positions()
