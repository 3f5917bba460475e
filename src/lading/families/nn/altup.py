"""Alternating updates (https://arxiv.org/abs/2301.13310)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lading.families.nn.gemma3n_spec import Gemma3nSpec
from lading.families.nn.norm import RMSNorm
from lading.families.nn.rounding import scaled
from lading.families.nn.uninitialized import Linear


class AltUp(nn.Module):
    """The states of each token around a layer, which computes one of them; the others are predicted and corrected.

    States are of shape (A, N, S, model_dim).
    """

    def __init__(self, spec: Gemma3nSpec) -> None:
        super().__init__()

        dim, states = spec.model_dim, spec.altup_num_inputs
        self.active = spec.altup_active_idx

        self.correct_output_scale = nn.Parameter(torch.empty(dim))
        self.correction_coefs = ClippedLinear(states, states, limit=spec.altup_coef_clip)
        self.prediction_coefs = ClippedLinear(states, states**2, limit=spec.altup_coef_clip)
        self.modality_router = Linear(dim, states, bias=False)
        self.router_norm = RMSNorm.of(spec, dim)

    def predict(self, states: Tensor) -> Tensor:
        """Predict all states after the layer from those before it."""
        coefficients: Tensor = self.prediction_coefs(self._modalities(states[self.active]))
        mixing = torch.unflatten(coefficients, -1, (len(states), -1)).transpose(-1, -2)
        changes = torch.matmul(states.permute(1, 2, 3, 0), mixing).permute(3, 0, 1, 2)

        return (changes + states).contiguous()

    def correct(self, predicted: Tensor, computed: Tensor) -> Tensor:
        """Correct the predicted states by the one that the layer computed, (N, S, model_dim)."""
        error = computed - predicted[self.active]
        coefficients: Tensor = self.correction_coefs(self._modalities(computed)) + 1.0

        return error * coefficients.permute(2, 0, 1)[..., None] + predicted

    def forward(self, computed: Tensor) -> Tensor:
        """Scale the corrected state that the layer computed, (N, S, model_dim) → the same shape."""
        return computed * self.correct_output_scale

    def _modalities(self, x: Tensor) -> Tensor:
        """Map (N, S, model_dim) → (N, S, A), from -1 to 1."""
        routed = self.modality_router(scaled(self.router_norm(x), x.size(-1) ** -1.0))

        return torch.tanh(routed.float()).to(x.dtype)


class ClippedLinear(Linear):
    """A projection without a bias, whose weights are clipped to ``±limit`` in training."""

    def __init__(self, in_features: int, out_features: int, *, limit: float) -> None:
        super().__init__(in_features, out_features, bias=False)

        self.limit = limit

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (…, in_features) → (…, out_features)."""
        return linear(input, self.weight.clamp(-self.limit, self.limit) if self.training else self.weight)
