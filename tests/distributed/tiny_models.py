"""Small models of transformers, saved as it saves them; and what ranks hold, beside what one process holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def save_model(folder: Path, kls: Any, config: Any, **options: Any) -> Path:
    """A model of that class of transformers, with random weights."""
    torch.manual_seed(0)
    model = kls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder, **options)

    return folder


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def far(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by more than another order of summation explains."""
    scale = max(1.0, float(expected.detach().abs().max()))
    return not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * scale)
