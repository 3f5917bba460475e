"""The options of the speech encoder and of its layers, and their parallel plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lading.families.nn.checks import require_dropout, require_layers, require_multiple, require_positive, require_size
from lading.families.nn.shapes import Shapes, batch_norm, norm, projection, under, weight_and_bias
from lading.models.parallel_plan import ParallelPlan, Split


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """The options of the layers of a speech encoder.

    :raises ValueError: the sizes are not valid, such as a number of heads that doesn't divide ``model_dim``.
    """

    model_dim: int
    num_attn_heads: int
    ffn_inner_dim: int
    pos_encoder_type: str = "conv"
    """The kind of positions; all but ``relative`` and ``rotary`` are added to the frames before the layers."""
    depthwise_conv_kernel_size: int | None = None
    """The kernel size of the convolution in a Conformer layer; ``None`` for Transformer layers."""
    norm_first: bool
    """True if layers normalize their input and the encoder its output, false if layers normalize their output."""
    norm_eps: float
    dropout_p: float
    """The dropout probability of frames with positions, and of the outputs of the blocks of a layer."""
    attn_dropout_p: float
    """The dropout probability of the attention weights."""
    ffn_inner_dropout_p: float

    def __post_init__(self) -> None:
        require_positive(self, "model_dim", "num_attn_heads", "ffn_inner_dim", "norm_eps")
        require_multiple(self, "model_dim", "num_attn_heads")
        require_dropout(self, "dropout_p", "attn_dropout_p", "ffn_inner_dropout_p")
        if self.pos_encoder_type == "relative" and self.model_dim % 2:
            raise ValueError(f"relative positions need an even `model_dim`, but it is {self.model_dim}")
        if self.pos_encoder_type == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need attention heads of an even width, but it is {self.head_dim}")
        if self.depthwise_conv_kernel_size is not None:
            require_positive(self, "depthwise_conv_kernel_size")
            require_size(
                "`model_dim` times `depthwise_conv_kernel_size`", self.model_dim * self.depthwise_conv_kernel_size
            )
            if self.norm_first:
                raise ValueError("Conformer layers normalize their output: `norm_order` must be POST, but is PRE")

    @property
    def head_dim(self) -> int:
        """The width of an attention head."""
        return self.model_dim // self.num_attn_heads

    def layer_shapes(self) -> Shapes:
        """Return the names and shapes of the parameters of a layer."""
        dim = self.model_dim
        if self.depthwise_conv_kernel_size is None:
            return {
                **under("attention", self._attention_shapes()),
                **norm("layer_norm", dim),
                **under("feed_forward", self._feed_forward_shapes()),
                **norm("final_layer_norm", dim),
            }

        return {
            **norm("ffn1_layer_norm", dim),
            **under("ffn1", self._feed_forward_shapes()),
            **norm("self_attn_layer_norm", dim),
            **under("self_attn", self._attention_shapes()),
            **norm("conv_module.layer_norm", dim),
            "conv_module.pointwise_conv1.weight": (2 * dim, dim, 1),
            "conv_module.depthwise_conv.weight": (dim, 1, self.depthwise_conv_kernel_size),
            **batch_norm("conv_module.batch_norm", dim),
            "conv_module.pointwise_conv2.weight": (dim, dim, 1),
            **norm("ffn2_layer_norm", dim),
            **under("ffn2", self._feed_forward_shapes()),
            **norm("final_layer_norm", dim),
        }

    def _attention_shapes(self) -> Shapes:
        dim, heads = self.model_dim, (self.num_attn_heads, self.head_dim)
        found: Shapes = {}
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            found |= projection(name, dim, dim)
        if self.pos_encoder_type == "relative":
            found |= projection("relative.projection", dim, dim, bias=False)
            found |= {"relative.bias.u": heads, "relative.bias.v": heads}

        return found

    def _feed_forward_shapes(self) -> Shapes:
        return {
            **projection("intermediate_dense", self.model_dim, self.ffn_inner_dim),
            **projection("output_dense", self.ffn_inner_dim, self.model_dim),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechSpec(LayerSpec):
    """The options of the speech encoder and its frontend.

    :raises ValueError: the sizes are not valid, such as a number of heads that doesn't divide ``model_dim``.
    """

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
    max_seq_len: int | None = None
    """The largest number of frames, if positions have a limit."""
    pos_encoder_depth: int = 1
    """The number of convolutions for positions."""
    pos_conv_kernel_size: int
    """The kernel size of all of these together."""
    num_pos_conv_groups: int
    num_layers: int
    layer_norm_features: bool
    """True if frames are normalized again after positions are added."""
    first_pass_dropout_p: float
    """The dropout probability of the projected frames."""
    layer_drop_p: float
    """The probability that a layer is skipped in training (https://arxiv.org/abs/1909.11556)."""
    masked: bool
    """True if the model has an embedding for masked frames."""

    def __post_init__(self) -> None:
        require_layers(self.num_layers)
        LayerSpec.__post_init__(self)  # `super()` needs the class before it has slots
        require_positive(self, "feature_dim")
        if self.max_seq_len is not None:
            require_positive(self, "max_seq_len")
        if self.pos_encoder_type == "conv":
            require_positive(self, "pos_conv_kernel_size", "num_pos_conv_groups", "pos_encoder_depth")
            require_layers(self.pos_encoder_depth)
            require_multiple(self, "model_dim", "num_pos_conv_groups")
            require_size("`model_dim` times `pos_conv_kernel_size`", self.model_dim * self.pos_conv_kernel_size)
        require_dropout(self, "first_pass_dropout_p", "layer_drop_p")
        if not self.project_features and self.feature_dim != self.model_dim:
            raise ValueError(
                f"frames of width {self.feature_dim} must be projected to a `model_dim` of {self.model_dim}"
            )

        if self.fbank is not None:
            self._check_width(self.fbank[0] * self.fbank[1], "the filter banks give")
            return
        if not 0.0 < self.feature_grad_scale <= 1.0:
            raise ValueError(f"`feature_grad_scale` must be in (0, 1], but is {self.feature_grad_scale}")
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

        if self.pos_encoder_type == "conv":
            found |= under("encoder.pos_conv_embed", self._position_shapes())
        if self.norm_first and self.layer_norm_features:
            found |= norm("encoder.input_layer_norm", dim)
        if self.norm_first or self.layer_norm_features:
            found |= norm("encoder.layer_norm", dim)
        layer = self.layer_shapes()
        for i in range(self.num_layers):
            found |= under(f"encoder.layers.{i}", layer)

        return found

    @property
    def pos_conv_layer_kernel_size(self) -> int:
        """The kernel size of each convolution for positions."""
        depth = self.pos_encoder_depth

        return self.pos_conv_kernel_size if depth == 1 else max(3, self.pos_conv_kernel_size // depth)

    def _position_shapes(self) -> Shapes:
        kernel, dim = self.pos_conv_layer_kernel_size, self.model_dim
        shape = (dim, dim // self.num_pos_conv_groups, kernel)
        if self.pos_encoder_depth == 1:
            weight = "conv.parametrizations.weight"
            return {"conv.bias": (dim,), f"{weight}.original0": (1, 1, kernel), f"{weight}.original1": shape}

        found: Shapes = {}
        for i in range(self.pos_encoder_depth):
            found |= weight_and_bias(f"layers.{i}.conv", shape)

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


def speech_plan(spec: SpeechSpec, prefix: str) -> ParallelPlan:
    """Return the parallel plan of a :class:`~lading.families.nn.speech.SpeechModel`.

    It splits attention by heads and feed-forward networks by their inner width. The frontend, with a twentieth of the
    parameters, and the convolutions of Conformer layers, with an eighth, are not split.

    :param prefix: the name of the speech model in the whole model.
    """
    layer = f"{prefix}.encoder.layers.*"

    return ParallelPlan(
        tensor=layer_splits(spec, layer),
        divisible={"num_encoder_attn_heads": spec.num_attn_heads, "ffn_inner_dim": spec.ffn_inner_dim},
        units=(layer,),
    )


def layer_splits(spec: LayerSpec, layer: str) -> Mapping[str, Split]:
    """Return the splits of the modules of the layers with the names ``layer``."""
    conformer = spec.depthwise_conv_kernel_size is not None
    attention = "self_attn" if conformer else "attention"
    networks = ("ffn1", "ffn2") if conformer else ("feed_forward",)
    norms = ("ffn1_layer_norm", "self_attn_layer_norm", "conv_module.layer_norm", "ffn2_layer_norm", "final_layer_norm")

    splits = {f"{attention}.{name}": Split.COLUMN for name in ("q_proj", "k_proj", "v_proj")}
    if spec.pos_encoder_type == "relative":
        splits |= dict.fromkeys((f"{attention}.relative.projection", f"{attention}.relative.bias"), Split.COLUMN)
    splits[f"{attention}.out_proj"] = Split.ROW
    for network in networks:
        splits |= {f"{network}.intermediate_dense": Split.COLUMN, f"{network}.output_dense": Split.ROW}
    splits |= dict.fromkeys(norms if conformer else ("layer_norm", "final_layer_norm"), Split.REPLICATED)

    return {f"{layer}.{name}": split for name, split in splits.items()}
