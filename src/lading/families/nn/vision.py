"""Vision transformers (https://arxiv.org/abs/2010.11929) over the patches of images or videos.

The names of parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, interpolate

from lading.families.nn.attention import AttentionMask
from lading.families.nn.encoder_blocks import AttentionHeads, Intermediate, LayerStack
from lading.families.nn.positions import position_angles
from lading.families.nn.uninitialized import Conv2d, Conv3d, LayerNorm, Linear
from lading.families.nn.vision_spec import VisionSpec


def sinusoidal_positions(
    grid: tuple[int, ...], dim: int, *, uniform_power: bool, device: torch.device | None = None
) -> Tensor:
    """Compute the positions of a grid with two or three dimensions → ``(*grid, dim)``, float32.

    Each dimension of the grid fills a part of the channels with sines and then cosines of its coordinate: two
    dimensions half each; the first of three half, and the others a quarter each, or all three a third each.
    """
    shares = [2, 4, 4] if len(grid) == 3 and not uniform_power else len(grid) * [len(grid)]

    parts = []
    for axis, (size, share) in enumerate(zip(grid, shares, strict=True)):
        half = math.ceil(dim / (2 * share))
        angles = position_angles(torch.arange(size, device=device), half, divisor=half)
        shape = [1] * len(grid)
        shape[axis] = size
        parts.append(torch.cat((angles.sin(), angles.cos()), dim=1).view(*shape, 2 * half).expand(*grid, 2 * half))

    # Rounded up, the parts may be wider than `dim`.
    return torch.cat(parts, dim=-1)[..., :dim]


def resize_positions(positions: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Interpolate positions ``(*grid, dim)`` to another grid, cubically for images, linearly for videos."""
    if positions.shape[:-1] == grid:
        return positions
    mode = "bicubic" if len(grid) == 2 else "trilinear"
    resized = interpolate(positions.movedim(-1, 0)[None], size=grid, mode=mode, align_corners=False)

    return resized[0].movedim(0, -1)


class PatchProjection(nn.Module):
    """The projection of patches that do not overlap, as a convolution."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()

        kind = Conv2d if len(spec.patch_dims) == 2 else Conv3d
        # torch's annotations fix the number of dimensions of each class.
        sizes: tuple[int, ...] = spec.patch_dims
        self.projection = kind(spec.num_input_channels, spec.model_dim, sizes, stride=sizes)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Project ``(N, C, *input_dims)`` → ``(N, *grid, model_dim)``."""
        y: Tensor = self.projection(x)

        return y.movedim(1, -1)


class PatchEmbeddings(nn.Module):
    """The projected patches and their positions."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()

        self.grid = spec.grid
        self.uniform_power = spec.uniform_power

        self.position_embeddings: nn.Parameter | None = None
        if spec.learned_positions:
            self.position_embeddings = nn.Parameter(torch.empty(1, math.prod(spec.grid), spec.model_dim))
        self.patch_embeddings = PatchProjection(spec)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed ``(N, C, *input_dims)`` → (N, S, model_dim); the positions of other sizes are interpolated."""
        x = self.patch_embeddings(pixel_values)
        if self.position_embeddings is None:
            positions = sinusoidal_positions(self.grid, x.size(-1), uniform_power=self.uniform_power, device=x.device)
        else:
            positions = self.position_embeddings.view(*self.grid, x.size(-1))
        # Computed positions are float32 in any model.
        y: Tensor = (x + resize_positions(positions, x.shape[1:-1])).to(x.dtype)

        return y.flatten(1, -2)


class BlockOutput(nn.Module):
    """The output projection of a block.

    :param depth: the number of the layer, from 1, by which the initial weights are scaled down.
    """

    def __init__(self, input_dim: int, spec: VisionSpec, depth: int) -> None:
        super().__init__()

        self.dropout_p = spec.dropout_p
        self.depth = depth

        self.dense = Linear(input_dim, spec.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, input_dim) → (N, S, model_dim)."""
        return dropout(self.dense(x), self.dropout_p, self.training)


class VisionAttention(nn.Module):
    """Attention with its output projection, if it has one."""

    def __init__(self, spec: VisionSpec, depth: int, *, project: bool = True) -> None:
        super().__init__()

        self.attention = AttentionHeads(
            spec.model_dim, spec.num_attn_heads, bias=spec.qkv_bias, dropout_p=spec.attn_dropout_p
        )
        self.output = BlockOutput(spec.model_dim, spec, depth) if project else None

    def forward(self, x: Tensor, mask: AttentionMask, memory: Tensor | None = None) -> Tensor:
        """Map (N, S, model_dim), which attends to itself or to ``memory`` (N, K, model_dim) → the same shape."""
        y: Tensor = self.attention(x, mask, memory)
        if self.output is not None:
            y = self.output(y)

        return y


class VisionLayer(nn.Module):
    """Attention and a feed-forward network, each normalized before.

    :param depth: the number of the layer, from 1.
    :param project: whether attention has an output projection.
    """

    def __init__(self, spec: VisionSpec, depth: int, *, project: bool = True) -> None:
        super().__init__()

        self.droppath_p = spec.droppath_p

        self.attention = VisionAttention(spec, depth, project=project)
        self.intermediate = Intermediate(spec.model_dim, spec.ffn_inner_dim)
        self.output = BlockOutput(spec.ffn_inner_dim, spec, depth)
        self.layernorm_before = LayerNorm(spec.model_dim, eps=spec.norm_eps)
        self.layernorm_after = LayerNorm(spec.model_dim, eps=spec.norm_eps)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        return self._feed_forward(x + self._drop_path(self.attention(self.layernorm_before(x), mask)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self._drop_path(self.output(self.intermediate(self.layernorm_after(x))))

    def _drop_path(self, x: Tensor) -> Tensor:
        """Set all of an input to zero with the probability ``droppath_p`` in training, and scale the others up."""
        if not self.training or self.droppath_p == 0.0:
            return x
        kept = torch.empty((x.size(0), 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.droppath_p)

        return x * kept / (1.0 - self.droppath_p)


class VisionTransformer(nn.Module):
    """The embeddings of patches and the layers over them; the parameters are uninitialized."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()

        self.spec = spec

        self.embeddings = PatchEmbeddings(spec)
        self.encoder = LayerStack(VisionLayer(spec, depth) for depth in range(1, spec.num_layers + 1))
        self.layernorm = LayerNorm(spec.model_dim, eps=spec.norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images (N, C, height, width), or videos (N, C, depth, height, width) → (N, S, model_dim).

        The S patches of an input are in the order of its dimensions, the last one running fastest.

        :raises ValueError: the input has another number of dimensions or channels, or is smaller than a patch.
        """
        patch, found = self.spec.patch_dims, tuple(pixel_values.shape)
        if (
            len(found) != len(patch) + 2
            or found[1] != self.spec.num_input_channels
            or any(size < least for size, least in zip(found[2:], patch, strict=True))
        ):
            raise ValueError(
                f"the input must be of shape (N, {self.spec.num_input_channels}, "
                f"{', '.join(f'{size} or more' for size in patch)}), but is of shape {found}"
            )
        y: Tensor = self.layernorm(self.encoder(self.embeddings(pixel_values), AttentionMask()))

        return y


@torch.no_grad()
def init_vision(model: nn.Module, name: str, parameter: Tensor, *, std: float) -> None:
    """Draw weights from a truncated normal distribution; biases become zero, norms one, and positions sinusoidal."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    owner = model.get_submodule(path.rpartition(".")[0])

    if leaf == "bias":
        parameter.zero_()
    elif isinstance(module, nn.LayerNorm):
        parameter.fill_(1.0)
    elif isinstance(module, PatchEmbeddings):
        positions = sinusoidal_positions(module.grid, parameter.size(-1), uniform_power=module.uniform_power)
        parameter.copy_(positions.reshape(parameter.shape))
    else:
        nn.init.trunc_normal_(parameter, std=std)
        if isinstance(owner, BlockOutput):
            parameter.div_(math.sqrt(2 * owner.depth))
