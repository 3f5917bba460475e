"""The options of the speech encoder, and its parallel plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lading.families.nn.checks import require_dropout, require_layers, require_multiple, require_positive, require_size
from lading.families.nn.shapes import Shapes, norm, projection, under, weight_and_bias
from lading.models.parallel_plan import ParallelPlan, Split


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

    def shapes(self) -> Shapes:
        """Return the names and shapes of the parameters of a :class:`~lading.families.nn.speech.SpeechModel`."""
        dim = self.model_dim
        found: Shapes = {"masked_spec_embed": (dim,)} if self.masked else {}
        found |= self._frontend_shapes()
        found |= norm("feature_projection.layer_norm", self.feature_dim)
        if self.project_features:
            found |= projection("feature_projection.projection", self.feature_dim, dim)

        kernel = self.pos_conv_kernel_size
        weight = "encoder.pos_conv_embed.conv.parametrizations.weight"
        found |= {
            "encoder.pos_conv_embed.conv.bias": (dim,),
            f"{weight}.original0": (1, 1, kernel),
            f"{weight}.original1": (dim, dim // self.num_pos_conv_groups, kernel),
        }
        if self.norm_first and self.layer_norm_features:
            found |= norm("encoder.input_layer_norm", dim)
        if self.norm_first or self.layer_norm_features:
            found |= norm("encoder.layer_norm", dim)
        layer = self._layer_shapes()
        for i in range(self.num_layers):
            found |= under(f"encoder.layers.{i}", layer)

        return found

    def _frontend_shapes(self) -> Shapes:
        found: Shapes = {}
        input_dim = 1
        for i, (dim, kernel, _) in enumerate(() if self.fbank is not None else self.feature_extractor_layer_descs):
            name = f"feature_extractor.conv_layers.{i}"
            found |= weight_and_bias(f"{name}.conv", (dim, input_dim, kernel), bias=self.feature_extractor_bias)
            if i == 0 or self.feature_extractor_layer_norm_convs:
                found |= norm(f"{name}.layer_norm", dim)
            input_dim = dim

        return found

    def _layer_shapes(self) -> Shapes:
        dim, inner = self.model_dim, self.ffn_inner_dim

        return {
            **projection("attention.k_proj", dim, dim),
            **projection("attention.v_proj", dim, dim),
            **projection("attention.q_proj", dim, dim),
            **projection("attention.out_proj", dim, dim),
            **norm("layer_norm", dim),
            **projection("feed_forward.intermediate_dense", dim, inner),
            **projection("feed_forward.output_dense", inner, dim),
            **norm("final_layer_norm", dim),
        }


def speech_plan(spec: SpeechSpec, prefix: str) -> ParallelPlan:
    """Return the parallel plan of a :class:`~lading.families.nn.speech.SpeechModel`.

    It splits attention by heads and feed-forward networks by their inner width. The frontend, with a twentieth of the
    parameters, is not split.

    :param prefix: the name of the speech model in the whole model.
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
