"""Mixtures of experts: a router that chooses feed-forward networks for each token, and these networks.

The names and layouts of the parameters are those of transformers 5, which stacks the weights of all experts. Ranks that
split the experts call the same modules: each holds some of them, and skips the choices of the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.experts_spec import ExpertsSpec
from lading.families.nn.ffn import GatedFeedForward, activate
from lading.models.targets import is_distributed

_grouped_mm = getattr(nn.functional, "grouped_mm", None)  # since torch 2.10


class Router(nn.Module):
    """The projection of a token to a logit for each expert."""

    def __init__(self, spec: ExpertsSpec, model_dim: int) -> None:
        super().__init__()

        self.is_wide = spec.wide_router

        self.weight = nn.Parameter(torch.empty(spec.num_experts, model_dim))
        # Training moves it by the load of the experts, without a gradient. As a buffer it keeps its own dtype where
        # parameters are sharded together.
        bias = torch.empty(spec.num_experts) if spec.correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, model_dim) → (T, num_experts)."""
        return linear(x.float(), self.weight.float()) if self.is_wide else linear(x, self.weight)


class Experts(nn.Module):
    """Gated feed-forward networks with stacked weights."""

    def __init__(self, spec: ExpertsSpec, decoder: DecoderSpec) -> None:
        super().__init__()

        self.activation = decoder.ffn_activation
        self.transposed = spec.transposed
        self.weighs_inputs = spec.weighs_inputs

        up, down = spec.stacked_shapes(decoder.model_dim)
        self.gate_up_proj = nn.Parameter(torch.empty(up))
        self.down_proj = nn.Parameter(torch.empty(down))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Map tokens (T, model_dim) → the weighted sums of the outputs of their experts (T, model_dim).

        :param chosen: (T, top_k), the indices of the experts of each token. Those outside of the experts that this
            module holds are skipped.
        :param weights: (T, top_k), the weights of these experts.
        """
        up, down = (_local(weight) for weight in (self.gate_up_proj, self.down_proj))
        if not self.transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        count, top_k = len(up), chosen.size(1)

        # The choices of all tokens, in the order of the experts; all others come last, and are cut off.
        experts = chosen.flatten()
        experts = torch.where((experts >= 0) & (experts < count), experts, count)
        sizes = torch.bincount(experts, minlength=count + 1)[:count]
        order = experts.argsort(stable=True)[: int(sizes.sum())]
        tokens, own = order // top_k, weights.flatten()[order, None]

        y = x[tokens]
        if self.weighs_inputs:
            y = y * own.to(y.dtype)
        gate, inner = _product_of_groups(y, up, sizes).chunk(2, dim=-1)
        y = _product_of_groups(activate(gate, self.activation) * inner, down, sizes)
        if not self.weighs_inputs:
            y = (y * own).to(y.dtype)

        # Each row has a place of its own, so that the sum has the same order in each call, unlike with `index_add`.
        places = y.new_zeros(chosen.numel(), y.size(1)).index_copy(0, order, y)

        return torch.unflatten(places, 0, chosen.shape).sum(1)


class MixtureOfExperts(nn.Module):
    """A feed-forward network of experts, a few for each token (https://arxiv.org/abs/1701.06538)."""

    def __init__(self, spec: ExpertsSpec, decoder: DecoderSpec) -> None:
        super().__init__()

        self.spec = spec

        self.experts = Experts(spec, decoder)
        self.add_module(spec.router_name, Router(spec, decoder.model_dim))
        if spec.shared_inner_dim is not None:
            self.add_module(spec.shared_name, GatedFeedForward(decoder, spec.shared_inner_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, model_dim) → the same shape."""
        tokens = x.flatten(0, -2)
        router: Any = self.get_submodule(self.spec.router_name)
        chosen, weights = choose(self.spec, router(tokens), router.e_score_correction_bias)
        y: Tensor = self.experts(tokens, chosen, weights)
        if self.spec.shared_inner_dim is not None:
            y = y + self.get_submodule(self.spec.shared_name)(tokens)

        return y.view(x.shape)


def choose(spec: ExpertsSpec, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the experts of each token and their weights, both (T, top_k); weights are in float32.

    :param logits: (T, num_experts), those of the router.
    :param bias: (num_experts,), added to the scores for the choice alone.
    """
    logits = logits.float()
    scores = logits.softmax(-1) if spec.scores == "softmax" else logits.sigmoid()
    # Without groups or a bias, the order of the logits is that of the scores, which can be equal for different logits.
    rated = logits if bias is None and spec.num_groups == 1 else scores
    if bias is not None:
        rated = rated + bias
    if spec.num_groups > 1:
        groups = torch.unflatten(rated, -1, (spec.num_groups, -1))
        best = groups.topk(2, -1).values.sum(-1).topk(spec.top_k_groups, -1).indices
        left_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
        rated = groups.masked_fill(left_out[..., None], -torch.inf).flatten(-2)

    chosen = rated.topk(spec.top_k, -1).indices
    weights = scores.gather(-1, chosen)
    if spec.normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + torch.finfo(weights.dtype).tiny)

    return chosen, weights * spec.scale


def _product_of_groups(x: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """Multiply the rows of ``x`` (R, inputs), group by group, by the matrices (E, inputs, outputs) → (R, outputs).

    :param sizes: (E,), the number of rows of each group, in their order.
    """
    if _grouped_mm is not None and _has_kernel(x, weights):
        y: Tensor = _grouped_mm(x, weights, offs=sizes.cumsum(0).to(torch.int32))
        return y

    # Groups without rows stay in the graph, so that all ranks that gather gradients have one.
    return torch.cat([rows @ weight for rows, weight in zip(torch.split(x, sizes.tolist()), weights, strict=True)])


def _has_kernel(x: Tensor, weights: Tensor) -> bool:
    """Return whether torch multiplies groups of this dtype and these strides at once on their device."""
    kernels = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}
    if x.dtype not in kernels.get(x.device.type, ()) or weights.dtype != x.dtype:
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    inputs, outputs = weights.shape[1:]

    return inputs * x.itemsize % 16 == 0 and outputs * x.itemsize % 16 == 0  # as the kernels require of rows


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a parameter that this rank holds."""
    return tensor.to_local() if is_distributed(tensor) else tensor
