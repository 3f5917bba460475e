"""The encoder of wav2vec 2.0 (https://arxiv.org/abs/2006.11477): convolutional positions and Transformer layers.

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, dropout, gelu

from lading.families.nn.attention import AttentionMask, attend, split_heads
from lading.families.nn.checks import require_dropout, require_layers, require_multiple, require_positive, require_size
from lading.families.nn.uninitialized import LayerNorm, Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechSpec:
    """The options of the speech encoder and its frontend.

    :raises ValueError: the sizes are not valid, such as a number of heads that doesn't divide ``model_dim``.
    """

    model_dim: int
    feature_dim: int
    fbank: tuple[int, int] | None
    """Filter banks instead of a waveform: the number of channels, and of adjacent filter banks per frame."""
    feature_extractor_layer_descs: Sequence[tuple[int, int, int]]
    """The output dimension, kernel size and stride of each convolution over a waveform."""
    feature_extractor_bias: bool
    feature_extractor_layer_norm_convs: bool
    """True for a layer normalization after each convolution, false for a group normalization after the first."""
    feature_grad_scale: float
    """The factor of the gradient of the convolutions in training, with which they learn more slowly."""
    project_features: bool
    pos_conv_kernel_size: int
    num_pos_conv_groups: int
    num_layers: int
    num_attn_heads: int
    ffn_inner_dim: int
    norm_first: bool
    """True if layers normalize their input and the encoder its output, false if layers normalize their output."""
    layer_norm_features: bool
    """True if frames are normalized again after positions are added."""
    norm_eps: float
    first_pass_dropout_p: float
    """The dropout probability of the projected frames."""
    dropout_p: float
    """The dropout probability of frames with positions, and of the outputs of attention and feed-forward blocks."""
    attn_dropout_p: float
    """The dropout probability of the attention weights."""
    ffn_inner_dropout_p: float
    layer_drop_p: float
    """The probability that a layer is skipped in training (https://arxiv.org/abs/1909.11556)."""
    masked: bool
    """True if the model has an embedding for masked frames."""

    def __post_init__(self) -> None:
        require_layers(self.num_layers)
        require_positive(
            self,
            "model_dim",
            "feature_dim",
            "pos_conv_kernel_size",
            "num_pos_conv_groups",
            "num_attn_heads",
            "ffn_inner_dim",
            "norm_eps",
        )
        require_multiple(self, "model_dim", "num_attn_heads", "num_pos_conv_groups")
        require_size("`model_dim` times `pos_conv_kernel_size`", self.model_dim * self.pos_conv_kernel_size)
        require_dropout(
            self, "first_pass_dropout_p", "dropout_p", "attn_dropout_p", "ffn_inner_dropout_p", "layer_drop_p"
        )
        if not 0.0 < self.feature_grad_scale <= 1.0:
            raise ValueError(f"`feature_grad_scale` must be in (0, 1], but is {self.feature_grad_scale}")
        if not self.project_features and self.feature_dim != self.model_dim:
            raise ValueError(
                f"frames of width {self.feature_dim} must be projected to a `model_dim` of {self.model_dim}"
            )

        if self.fbank is not None:
            self._check_width(self.fbank[0] * self.fbank[1], "the filter banks give")
            return
        descs = self.feature_extractor_layer_descs
        if not descs or any(min(desc) < 1 for desc in descs):
            raise ValueError(
                "the convolutions must have positive dimensions, kernels and strides, and there must be at least one, "
                f"but they are {list(descs)}"
            )
        require_size("the longest stride of a convolution", max(stride for _, _, stride in descs))
        input_dim = 1
        for output_dim, kernel_size, _ in descs:
            require_size("the dimension of a convolution", output_dim)
            require_size("the input dimension times the kernel size of a convolution", input_dim * kernel_size)
            input_dim = output_dim
        self._check_width(input_dim, "the last convolution gives")

    def _check_width(self, width: int, what: str) -> None:
        if width != self.feature_dim or width < 1:
            raise ValueError(f"`feature_dim` must be the {width} that {what}, but is {self.feature_dim}")


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


class SpeechAttention(nn.Module):
    """Bidirectional multi-head self-attention."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.head_dim = spec.model_dim // spec.num_attn_heads
        self.dropout_p = spec.attn_dropout_p

        self.k_proj = Linear(spec.model_dim, spec.model_dim)
        self.v_proj = Linear(spec.model_dim, spec.model_dim)
        self.q_proj = Linear(spec.model_dim, spec.model_dim)
        self.out_proj = Linear(spec.model_dim, spec.model_dim)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, T, model_dim) → the same shape."""
        q, k, v = (split_heads(projection(x), self.head_dim) for projection in (self.q_proj, self.k_proj, self.v_proj))
        y: Tensor = self.out_proj(attend(q, k, v, mask, dropout_p=self.dropout_p if self.training else 0.0))

        return y


class SpeechFeedForward(nn.Module):
    """Two projections with the exact GELU between them."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.inner_dropout_p = spec.ffn_inner_dropout_p

        self.intermediate_dense = Linear(spec.model_dim, spec.ffn_inner_dim)
        self.output_dense = Linear(spec.ffn_inner_dim, spec.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, model_dim) → the same shape."""
        y: Tensor = self.output_dense(dropout(gelu(self.intermediate_dense(x)), self.inner_dropout_p, self.training))

        return y


class SpeechEncoderLayer(nn.Module):
    """Attention and a feed-forward network, each normalized before, or after its residual is added."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.norm_first = spec.norm_first
        self.dropout_p = spec.dropout_p

        self.attention = SpeechAttention(spec)
        self.layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps)
        self.feed_forward = SpeechFeedForward(spec)
        self.final_layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, T, model_dim) → the same shape."""
        y = self.attention(self.layer_norm(x) if self.norm_first else x, mask)
        x = x + dropout(y, self.dropout_p, self.training)
        if not self.norm_first:
            x = self.layer_norm(x)

        y = self.feed_forward(self.final_layer_norm(x) if self.norm_first else x)
        x = x + dropout(y, self.dropout_p, self.training)
        if not self.norm_first:
            x = self.final_layer_norm(x)

        return x


class SpeechEncoder(nn.Module):
    """The positions and the stack of layers."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.norm_first = spec.norm_first
        self.dropout_p = spec.dropout_p
        self.layer_drop_p = spec.layer_drop_p

        self.pos_conv_embed = PositionalConvolution(
            spec.model_dim, kernel_size=spec.pos_conv_kernel_size, num_groups=spec.num_pos_conv_groups
        )
        # The one normalization outside layers comes first or last. No published model has both, hence the name.
        norm_both = spec.norm_first and spec.layer_norm_features
        self.input_layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps) if norm_both else None
        norm_one = spec.norm_first or spec.layer_norm_features
        self.layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps) if norm_one else None
        self.layers = nn.ModuleList(SpeechEncoderLayer(spec) for _ in range(spec.num_layers))

    def forward(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Encode (N, T, model_dim) → the same shape.

        :param frame_mask: bool, (N, T); true is a frame, false padding.
        """
        mask = AttentionMask()
        if frame_mask is not None:
            # The convolution lets adjacent frames see padding.
            x = x.masked_fill(~frame_mask[:, :, None], 0.0)
            # A row without any frame attends to its padding, because softmax over an empty row gives NaN.
            visible = frame_mask | ~frame_mask.any(1, keepdim=True)
            mask = AttentionMask(visible=visible[:, None, None])

        x = x + self.pos_conv_embed(x)
        first_norm = self.input_layer_norm if self.norm_first else self.layer_norm
        if first_norm is not None:
            x = first_norm(x)
        x = dropout(x, self.dropout_p, self.training)

        if self.training and self.layer_drop_p > 0.0:
            for layer, drawn in zip(self.layers, torch.rand(len(self.layers), device=x.device), strict=True):
                # A skipped layer runs anyway, because the ranks of a gang, which draw independently, have to gather the
                # same parameters; its gradients are zero.
                x = torch.where(drawn <= self.layer_drop_p, x, layer(x, mask))
        else:
            for layer in self.layers:
                x = layer(x, mask)

        if self.norm_first and self.layer_norm is not None:
            x = self.layer_norm(x)

        return x
