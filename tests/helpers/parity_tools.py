"""What the tests against other implementations share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lading.models.family import Family, family_of_model_type


def family_of(model_type: str) -> Family[Any, Any]:
    family = family_of_model_type(model_type)
    assert family is not None

    return family


@torch.no_grad()
def randomise(module: nn.Module, gain: float = 2.0) -> None:
    """Draw weights so large that attention is far from uniform."""
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=gain * parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.5, 0.5)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """``max |a - b| / max |b|`` over all elements."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())
