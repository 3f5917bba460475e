"""The options of the vision transformer, and its parallel plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lading.families.nn.checks import require_dropout, require_layers, require_multiple, require_positive, require_size
from lading.families.nn.shapes import Shapes, norm, projection, under, weight_and_bias
from lading.models.parallel_plan import ParallelPlan, Split


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSpec:
    """The options of a vision transformer.

    :raises ValueError: the sizes are not valid, such as a number of heads that doesn't divide ``model_dim``.
    """

    model_dim: int
    num_input_channels: int
    input_dims: tuple[int, ...]
    """The size of an input: (height, width) of an image, or (depth, height, width) of a video."""
    patch_dims: tuple[int, ...]
    """The size of a patch, likewise."""
    learned_positions: bool
    """True if positions are a parameter, false if they are computed."""
    uniform_power: bool
    """True if each dimension of a video gets a third of a position, false if the depth gets half of it."""
    num_layers: int
    num_attn_heads: int
    qkv_bias: bool
    ffn_inner_dim: int
    norm_eps: float
    dropout_p: float
    """The dropout probability of the outputs of attention and feed-forward blocks."""
    attn_dropout_p: float
    """The dropout probability of the attention weights."""
    droppath_p: float
    """The probability that a block is skipped for an input in training (https://arxiv.org/abs/1603.09382)."""
    init_std: float

    def __post_init__(self) -> None:
        require_layers(self.num_layers)
        require_positive(self, "model_dim", "num_input_channels", "num_attn_heads", "ffn_inner_dim", "norm_eps")
        require_multiple(self, "model_dim", "num_attn_heads")
        require_dropout(self, "dropout_p", "attn_dropout_p", "droppath_p")
        if len(self.patch_dims) not in (2, 3) or len(self.input_dims) != len(self.patch_dims):
            raise ValueError(
                "`input_dims` and `patch_dims` must be two sizes each for images, or three for videos, but are "
                f"{list(self.input_dims)} and {list(self.patch_dims)}"
            )
        if min(self.patch_dims) < 1 or min(self.grid) < 1:
            raise ValueError(
                f"`input_dims` must hold at least one patch, but is {list(self.input_dims)}, and `patch_dims` is "
                f"{list(self.patch_dims)}"
            )
        for name in ("input_dims", "patch_dims"):
            require_size(f"`{name}`", max(getattr(self, name)))
        require_size("the number of patches", math.prod(self.grid))
        require_size("the number of values in a patch", self.num_input_channels * math.prod(self.patch_dims))
        if self.model_dim % 2:
            raise ValueError(f"`model_dim` must be even, for sines and cosines of positions, but is {self.model_dim}")

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of patches along each dimension of an input."""
        return tuple(size // patch for size, patch in zip(self.input_dims, self.patch_dims, strict=True))

    def shapes(self) -> Shapes:
        """Return the parameters of a :class:`~lading.families.nn.vision.VisionTransformer`."""
        dim = self.model_dim
        found: Shapes = {}
        if self.learned_positions:
            found["embeddings.position_embeddings"] = (1, math.prod(self.grid), dim)
        found |= weight_and_bias(
            "embeddings.patch_embeddings.projection", (dim, self.num_input_channels, *self.patch_dims)
        )

        return found | self.stack_shapes("encoder", self.num_layers) | norm("layernorm", dim)

    def stack_shapes(self, name: str, num_layers: int) -> Shapes:
        """Return the parameters of a stack of layers."""
        layer = self.layer_shapes()
        found: Shapes = {}
        for i in range(num_layers):
            found |= under(f"{name}.layer.{i}", layer)

        return found

    def layer_shapes(self, *, project: bool = True) -> Shapes:
        """Return the parameters of a layer.

        :param project: whether attention has an output projection.
        """
        dim, inner = self.model_dim, self.ffn_inner_dim
        found: Shapes = {}
        for name in ("query", "key", "value"):
            found |= projection(f"attention.attention.{name}", dim, dim, bias=self.qkv_bias)
        if project:
            found |= projection("attention.output.dense", dim, dim)

        return {
            **found,
            **projection("intermediate.dense", dim, inner),
            **projection("output.dense", inner, dim),
            **norm("layernorm_before", dim),
            **norm("layernorm_after", dim),
        }


def vision_plan(spec: VisionSpec, *layers: str, whole_attention: str | None = None) -> ParallelPlan:
    """Return the plan that splits attention by heads, and feed-forward networks by their inner width.

    :param layers: the names of the layers in the model.
    :param whole_attention: the name of a layer among these whose attention is not split, as it lacks the output
        projection that adds up the parts of its heads.
    """
    tensor: dict[str, Split] = {}
    for layer in layers:
        heads = Split.COLUMN if layer != whole_attention else Split.REPLICATED
        tensor |= {f"{layer}.attention.attention.{name}": heads for name in ("query", "key", "value")}
        tensor |= {
            f"{layer}.attention.output.dense": Split.ROW,
            f"{layer}.intermediate.dense": Split.COLUMN,
            f"{layer}.output.dense": Split.ROW,
            f"{layer}.layernorm_before": Split.REPLICATED,
            f"{layer}.layernorm_after": Split.REPLICATED,
        }

    return ParallelPlan(
        tensor=tensor,
        divisible={"num_encoder_attn_heads": spec.num_attn_heads, "ffn_inner_dim": spec.ffn_inner_dim},
        units=layers,
    )
