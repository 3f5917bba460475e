"""The encoder of wav2vec 2.0 (https://arxiv.org/abs/2006.11477): convolutional positions and Transformer layers.

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, dropout, gelu

from lading.nn.attention import AttentionMask, attend
from lading.nn.masking import Masking
from lading.nn.sharding import ParallelPlan, Split
from lading.nn.speech_frontend import ConvolutionalFeatures, FeatureProjection, FilterBankFeatures
from lading.nn.uninitialized import Conv1d, GroupNorm, LayerNorm, Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechSpec:
    """All switches of the encoder of speech and its frontend.

    :raises ValueError: sizes that make no encoder, such as heads that don't divide the model.
    """

    model_dim: int
    feature_dim: int
    fbank: tuple[int, int] | None
    """Filter banks in place of a waveform: their number of channels, and how many neighbours make a frame."""
    conv_layer_descs: Sequence[tuple[int, int, int]]
    """Of a waveform: output dimension, kernel size and stride of each convolution."""
    conv_bias: bool
    conv_layer_norm: bool
    """Whether each convolution is followed by a layer normalisation; if not, the first by a group normalisation."""
    feature_grad_scale: float
    project_features: bool
    pos_conv_kernel_size: int
    num_pos_conv_groups: int
    num_layers: int
    num_attn_heads: int
    ffn_inner_dim: int
    norm_first: bool
    """Whether layers normalise their input, and the encoder its output, instead of layers their output."""
    norm_features: bool
    """Whether frames are normalised again once they have positions."""
    norm_eps: float
    feature_dropout_p: float
    """Of the projected frames."""
    dropout_p: float
    """Of frames with positions, and of the outputs of attention and feed-forward blocks."""
    attn_dropout_p: float
    """Of the attention weights."""
    ffn_inner_dropout_p: float
    layer_drop_p: float
    """The probability with which a layer is left out in training (https://arxiv.org/abs/1909.11556)."""
    masked: bool
    """Whether the model has an embedding to put in place of masked frames."""

    def __post_init__(self) -> None:
        for name in (
            "model_dim",
            "feature_dim",
            "pos_conv_kernel_size",
            "num_pos_conv_groups",
            "num_layers",
            "num_attn_heads",
            "ffn_inner_dim",
            "norm_eps",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, but is {getattr(self, name)}")

        for name in ("num_attn_heads", "num_pos_conv_groups"):
            if self.model_dim % getattr(self, name) != 0:
                raise ValueError(
                    f"`model_dim` must be a multiple of `{name}`, but they are {self.model_dim} and "
                    f"{getattr(self, name)}"
                )
        for name in ("feature_dropout_p", "dropout_p", "attn_dropout_p", "ffn_inner_dropout_p", "layer_drop_p"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must be in [0, 1), but is {getattr(self, name)}")
        if not 0.0 < self.feature_grad_scale <= 1.0:
            raise ValueError(f"`feature_grad_scale` must be in (0, 1], but is {self.feature_grad_scale}")
        if not self.project_features and self.feature_dim != self.model_dim:
            raise ValueError(
                f"frames of width {self.feature_dim} must be projected to a `model_dim` of {self.model_dim}"
            )

        if self.fbank is not None:
            self._check_width(self.fbank[0] * self.fbank[1], "the filter banks give")
            return
        if not self.conv_layer_descs or any(min(desc) < 1 for desc in self.conv_layer_descs):
            raise ValueError(
                "the convolutions must have positive dimensions, kernels and strides, and there must be one at least, "
                f"but they are {list(self.conv_layer_descs)}"
            )
        self._check_width(self.conv_layer_descs[-1][0], "the last convolution gives")

    def _check_width(self, width: int, what: str) -> None:
        if width != self.feature_dim or width < 1:
            raise ValueError(f"`feature_dim` must be the {width} that {what}, but is {self.feature_dim}")


class WeightNorm(nn.Module):
    """The weight of a convolution as a direction and, for each place of the kernel, a length.

    This is weight normalisation (https://arxiv.org/abs/1602.07868) under the names of torch's parametrization. That one
    computes norms when it is made, which a module without memory cannot, and modules that have it do not pickle.
    """

    def __init__(self, output_dim: int, input_dim: int, kernel_size: int) -> None:
        super().__init__()

        self.original0 = nn.Parameter(torch.empty(1, 1, kernel_size))
        self.original1 = nn.Parameter(torch.empty(output_dim, input_dim, kernel_size))

    def forward(self) -> Tensor:
        """The weight, (output_dim, input_dim, kernel_size)."""
        return self.original1 * (self.original0 / self.norm())

    def norm(self) -> Tensor:
        """That of the direction, (1, 1, kernel_size)."""
        norm: Tensor = torch.linalg.vector_norm(self.original1, dim=(0, 1), keepdim=True)

        return norm


class WeightNormConv1d(nn.Module):
    """A convolution in groups, of normalised weight, that keeps the length of a sequence."""

    def __init__(self, dim: int, kernel_size: int, *, groups: int) -> None:
        super().__init__()

        self.kernel_size = kernel_size
        self.groups = groups

        self.bias = nn.Parameter(torch.empty(dim))
        self.parametrizations = nn.ModuleDict({"weight": WeightNorm(dim, dim // groups, kernel_size)})

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim, T) → the same shape; the window of each place begins half a kernel before it."""
        weight = self.parametrizations["weight"]()
        y = conv1d(x, weight, self.bias, padding=self.kernel_size // 2, groups=self.groups)

        # There is one window too many where they are of even size.
        return y[:, :, : x.size(2)]


class PositionalConvolution(nn.Module):
    """Relative positions, as a convolution over many frames."""

    def __init__(self, model_dim: int, *, kernel_size: int, num_groups: int) -> None:
        super().__init__()

        self.conv = WeightNormConv1d(model_dim, kernel_size, groups=num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, model_dim) → what is to be added to it, of the same shape."""
        return gelu(self.conv(x.transpose(1, 2))).transpose(1, 2)


class SpeechAttention(nn.Module):
    """Multi-head self-attention in both directions."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.head_dim = spec.model_dim // spec.num_attn_heads
        self.dropout_p = spec.attn_dropout_p

        self.k_proj = Linear(spec.model_dim, spec.model_dim)
        self.v_proj = Linear(spec.model_dim, spec.model_dim)
        self.q_proj = Linear(spec.model_dim, spec.model_dim)
        self.out_proj = Linear(spec.model_dim, spec.model_dim)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """(N, T, model_dim) → the same shape."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y: Tensor = self.out_proj(attend(q, k, v, mask, dropout_p=self.dropout_p if self.training else 0.0))

        return y


class SpeechFeedForward(nn.Module):
    """Two projections, and the exact GELU between them."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.inner_dropout_p = spec.ffn_inner_dropout_p

        self.intermediate_dense = Linear(spec.model_dim, spec.ffn_inner_dim)
        self.output_dense = Linear(spec.ffn_inner_dim, spec.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, model_dim) → the same shape."""
        y: Tensor = self.output_dense(dropout(gelu(self.intermediate_dense(x)), self.inner_dropout_p, self.training))

        return y


class SpeechEncoderLayer(nn.Module):
    """Attention and a feed-forward network, each normalised before, or with its residual after."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.norm_first = spec.norm_first
        self.dropout_p = spec.dropout_p

        self.attention = SpeechAttention(spec)
        self.layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps)
        self.feed_forward = SpeechFeedForward(spec)
        self.final_layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """(N, T, model_dim) → the same shape."""
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
    """Positions and the stack of layers."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.norm_first = spec.norm_first
        self.dropout_p = spec.dropout_p
        self.layer_drop_p = spec.layer_drop_p

        self.pos_conv_embed = PositionalConvolution(
            spec.model_dim, kernel_size=spec.pos_conv_kernel_size, num_groups=spec.num_pos_conv_groups
        )
        # The one normalisation outside layers comes first or last. No published model has both, hence the name.
        norm_both = spec.norm_first and spec.norm_features
        self.input_layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps) if norm_both else None
        norm_one = spec.norm_first or spec.norm_features
        self.layer_norm = LayerNorm(spec.model_dim, eps=spec.norm_eps) if norm_one else None
        self.layers = nn.ModuleList(SpeechEncoderLayer(spec) for _ in range(spec.num_layers))

    def forward(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        """(N, T, model_dim) → the same shape.

        :param frame_mask: bool, (N, T); true is a frame, false padding.
        """
        mask = AttentionMask()
        if frame_mask is not None:
            # Neighbours see padding through the convolution.
            x = x.masked_fill(~frame_mask[:, :, None], 0.0)
            # A row without any frame sees its padding: to see nothing is a division of zero by zero.
            visible = frame_mask | ~frame_mask.any(1, keepdim=True)
            mask = AttentionMask(visible=visible[:, None, None])

        x = x + self.pos_conv_embed(x)
        first_norm = self.input_layer_norm if self.norm_first else self.layer_norm
        if first_norm is not None:
            x = first_norm(x)
        x = dropout(x, self.dropout_p, self.training)

        if self.training and self.layer_drop_p > 0.0:
            for layer, drawn in zip(self.layers, torch.rand(len(self.layers), device=x.device), strict=True):
                # A layer that is left out runs all the same, as the ranks of a gang, which draw each for itself, have
                # to gather the same parameters; it then has gradients, and these are zero.
                x = torch.where(drawn <= self.layer_drop_p, x, layer(x, mask))
        else:
            for layer in self.layers:
                x = layer(x, mask)

        if self.norm_first and self.layer_norm is not None:
            x = self.layer_norm(x)

        return x


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechOutput:
    """What the encoder makes of sound."""

    hidden: Tensor
    """(N, T, model_dim)."""
    features: Tensor
    """Normalised frames before projection and masking, (N, T, feature_dim)."""
    raw_features: Tensor
    """Frames before normalisation, (N, T, feature_dim)."""
    num_frames: Tensor
    """Of each sequence without padding, (N), int64."""
    temporal_mask: Tensor | None
    """True where a frame was masked, (N, T); ``None`` if none was."""


class SpeechModel(nn.Module):
    """Frontend, masking and encoder; parameters are uninitialised."""

    def __init__(self, spec: SpeechSpec) -> None:
        super().__init__()

        self.spec = spec

        self.masked_spec_embed = nn.Parameter(torch.empty(spec.model_dim)) if spec.masked else None
        self.feature_extractor: ConvolutionalFeatures | FilterBankFeatures
        if spec.fbank is not None:
            self.feature_extractor = FilterBankFeatures(spec.fbank[0], stride=spec.fbank[1])
        else:
            self.feature_extractor = ConvolutionalFeatures(
                spec.conv_layer_descs,
                bias=spec.conv_bias,
                layer_norm=spec.conv_layer_norm,
                grad_scale=spec.feature_grad_scale,
            )
        self.feature_projection = FeatureProjection(
            spec.feature_dim,
            spec.model_dim,
            project=spec.project_features,
            norm_eps=spec.norm_eps,
            dropout_p=spec.feature_dropout_p,
        )
        self.encoder = SpeechEncoder(spec)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        masking: Masking | None = None,
        temporal_mask: Tensor | None = None,
    ) -> SpeechOutput:
        """A waveform (N, S), or filter banks (N, S, C).

        :param attention_mask: (N, S); 1 is sound, 0 the padding after it.
        :param masking: draws masks over frames and their features.
        :param temporal_mask: bool, (N, T); in place of one that is drawn.

        :raises ValueError: an input or a mask of another shape, sound that is too short for a frame, or for a mask.
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
            x = self._put_mask(x, temporal_mask)
        if masking is not None:
            spatial_mask = masking.spatial(x.size(0), x.size(2), x.device)
            if spatial_mask is not None:
                x = x.masked_fill(spatial_mask[:, None], 0.0)

        frame_mask = None
        if attention_mask is not None:
            frame_mask = torch.arange(x.size(1), device=x.device) < num_frames[:, None]

        return SpeechOutput(
            hidden=self.encoder(x, frame_mask),
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
        if int(self.feature_extractor.num_frames(torch.tensor(input_values.size(1), device="cpu"))) < 1:
            raise ValueError(f"the input is too short for a single frame: its length is {input_values.size(1)}")

    def _put_mask(self, x: Tensor, temporal_mask: Tensor) -> Tensor:
        if self.masked_spec_embed is None:
            raise ValueError("the model was made without the embedding that stands for masked frames")
        if temporal_mask.shape != x.shape[:2]:
            raise ValueError(
                f"`temporal_mask` must be of shape {tuple(x.shape[:2])}, a place for each frame, but is of shape "
                f"{tuple(temporal_mask.shape)}"
            )

        return torch.where(temporal_mask[:, :, None], self.masked_spec_embed.to(x.dtype), x)


def speech_plan(spec: SpeechSpec, prefix: str) -> ParallelPlan:
    """How a :class:`SpeechModel` is split: attention by heads, feed-forward networks by their inner width. The
    frontend, with a twentieth of the parameters, is not.

    :param prefix: the name of the :class:`SpeechModel` in the whole.
    """
    layer = f"{prefix}.encoder.layers.*"

    return ParallelPlan(
        tensor={
            f"{layer}.attention.q_proj": Split.COLUMN,
            f"{layer}.attention.k_proj": Split.COLUMN,
            f"{layer}.attention.v_proj": Split.COLUMN,
            f"{layer}.attention.out_proj": Split.ROW,
            f"{layer}.feed_forward.intermediate_dense": Split.COLUMN,
            f"{layer}.feed_forward.output_dense": Split.ROW,
            f"{layer}.layer_norm": Split.REPLICATED,
            f"{layer}.final_layer_norm": Split.REPLICATED,
        },
        divisible={"num_encoder_attn_heads": spec.num_attn_heads, "ffn_inner_dim": spec.ffn_inner_dim},
        units=(layer,),
    )


@torch.no_grad()
def init_speech(model: SpeechModel, name: str, parameter: Tensor, *, std: float) -> None:
    """Fill ``parameter`` with random numbers.

    :param name: of the parameter in ``model``, whose own tensor is not looked at.
    :param std: the standard deviation of projections inside the layers.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)

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
            # The length that a direction drawn so has to within a percent; it is drawn by itself.
            parameter.fill_(std * (output_dim * input_dim) ** 0.5)
    elif module is model.feature_projection.projection:
        init_projection(parameter, model.spec.feature_dim)
    elif leaf == "bias":
        parameter.zero_()
    elif module is model:
        nn.init.uniform_(parameter)
    else:
        nn.init.normal_(parameter, std=std)


@torch.no_grad()
def init_projection(parameter: Tensor, input_dim: int) -> None:
    """Fill the weight or the bias of a projection with uniform random numbers, up to ``input_dim ** -0.5``."""
    nn.init.uniform_(parameter, -(input_dim**-0.5), input_dim**-0.5)
