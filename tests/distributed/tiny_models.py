"""Small models of transformers, saved as it saves them; and what ranks hold, beside what one process holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from lading.gangs import create_fake_gangs, create_gangs
from lading.models.construct import create_model
from lading.models.family import get_family


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


def compare_with_one(family_name: str, config: Any, axes: dict[str, int], run: Callable[[Module], Tensor]) -> list[str]:
    """Where a new model over gangs, and one in this process alone, differ: outputs, and gradients by their names."""

    def outcome(model: Module, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        found = run(model)
        found[found.isfinite()].square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

        return {"": found.detach()} | {name: whole(gradient) for name, gradient in gradients.items()}

    torch.set_num_threads(1)
    family: Any = get_family(family_name)
    found = []

    with warnings.catch_warnings(), create_gangs("cpu", **axes) as gangs:
        warnings.simplefilter("error")
        torch.manual_seed(0)
        alone = create_model(family, config, gangs=create_fake_gangs("cpu"), dtype=torch.float32, meta=False)
        torch.manual_seed(0)
        model = create_model(family, config, gangs=gangs, dtype=torch.float32, meta=False)

        for seed, training in ((1, True), (2, True), (3, False)):
            for each in (alone, model):
                each.zero_grad()
                each.train(training)
            expected, ours = outcome(alone, seed), outcome(model, seed)
            if expected.keys() != ours.keys():
                found.append(f"gradients of {expected.keys() ^ ours.keys()}")
            # Against the largest of all: the keys' bias has no gradient but noise.
            largest = max(float(tensor[tensor.isfinite()].abs().max()) for tensor in expected.values())
            for name, tensor in expected.items():
                if not torch.allclose(ours[name], tensor, rtol=1e-4, atol=1e-5 * largest):
                    found.append(f"{name or 'outputs'}, seed {seed}")

    return found
