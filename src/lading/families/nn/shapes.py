"""The names and shapes of the parameters of layers, as a state dict lists them."""

from __future__ import annotations

from typing import TypeAlias

from lading.models.targets import Buffer, Shape

Shapes: TypeAlias = dict[str, Shape]
"""The shape of each parameter and buffer by its name; for a further name of a tied one, the first."""


def projection(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Shapes:
    """Return the parameters of a linear layer."""
    return weight_and_bias(name, (outputs, inputs), bias=bias)


def norm(name: str, dim: int) -> Shapes:
    """Return the parameters of a normalization with a bias."""
    return weight_and_bias(name, (dim,))


def batch_norm(name: str, dim: int) -> Shapes:
    """Return the parameters and buffers of a batch normalization."""
    return norm(name, dim) | {
        f"{name}.running_mean": Buffer((dim,)),
        f"{name}.running_var": Buffer((dim,)),
        f"{name}.num_batches_tracked": Buffer((), "I64"),
    }


def weight_and_bias(name: str, shape: tuple[int, ...], *, bias: bool = True) -> Shapes:
    """Return a weight of this shape, and a bias with an element for each row of it."""
    found: Shapes = {f"{name}.weight": shape}
    if bias:
        found[f"{name}.bias"] = shape[:1]

    return found


def under(prefix: str, shapes: Shapes) -> Shapes:
    """Return the parameters of a module that has ``prefix`` as its name."""
    return {
        f"{prefix}.{name}": f"{prefix}.{shape}" if isinstance(shape, str) else shape for name, shape in shapes.items()
    }
