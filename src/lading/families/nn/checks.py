"""Checks of the sizes and probabilities in the specification of a module.

A check takes the object with the fields, and their names; it raises a ``ValueError`` that names the first wrong one.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

MAX_SIZE = 2**30
"""The largest width, vocabulary or context, above that of any model. The bytes of a float32 matrix of two such sizes
still fit in 64 bits; above that, torch fails with errors of its own."""


def require_positive(spec: Any, *names: str) -> None:
    """Require that the named fields are positive, and integers at most ``MAX_SIZE``."""
    for name in names:
        value = getattr(spec, name)
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, but is {value}")
        if isinstance(value, int):
            require_size(f"`{name}`", value)


def require_size(what: str, value: int) -> None:
    """Require that ``value`` is at most ``MAX_SIZE``."""
    if value > MAX_SIZE:
        # Python refuses to print integers of thousands of digits.
        found = f"is {value}" if value.bit_length() < 100 else f"has {value.bit_length()} bits"
        raise ValueError(f"{what} must be at most {MAX_SIZE}, but {found}")


MAX_LAYERS = 10_000
"""The largest number of layers, above that of any model, and small enough to create their modules."""

MAX_LABELS = 1_000_000
"""The largest number of labels, above that of any classifier, and small enough to store their names."""


def require_layers(num_layers: int) -> None:
    """Require from 1 to ``MAX_LAYERS`` layers, so that their modules fit in memory."""
    if not 0 < num_layers <= MAX_LAYERS:
        raise ValueError(f"`num_layers` must be from 1 to {MAX_LAYERS}, but is {num_layers}")


def require_multiple(spec: Any, name: str, *divisors: str) -> None:
    """Require that the field ``name`` is a multiple of each of the other fields."""
    for divisor in divisors:
        if getattr(spec, name) % getattr(spec, divisor) != 0:
            raise ValueError(
                f"`{name}` must be a multiple of `{divisor}`, but they are {getattr(spec, name)} and "
                f"{getattr(spec, divisor)}"
            )


def require_dropout(spec: Any, *names: str) -> None:
    """Require that the named fields are dropout probabilities, at least 0 and below 1."""
    for name in names:
        value = getattr(spec, name)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"`{name}` must be in [0, 1), but is {value}")


def require_symbol(pad_idx: int | None, vocab_size: int) -> None:
    """Require that the symbol for padding is one of ``vocab_size`` symbols, or ``None``."""
    if pad_idx is not None and not 0 <= pad_idx < vocab_size:
        raise ValueError(f"`pad_idx` must be an index of the {vocab_size} symbols, but is {pad_idx}")


def require_quantizer(output_dim: int, num_codebooks: int, num_entries: int) -> None:
    """Require that codebooks of ``num_entries`` entries give vectors of width ``output_dim``, each an equal part."""
    if min(output_dim, num_codebooks, num_entries) < 1 or output_dim % num_codebooks != 0:
        raise ValueError(
            f"the width of a quantized vector must be a multiple of the number of codebooks, and none of the sizes "
            f"zero, but they are {output_dim}, {num_codebooks} and {num_entries} entries"
        )
    require_size("the number of entries in all codebooks", num_codebooks * num_entries)
    require_size("the width of a quantized vector", output_dim)


def shared_fields(kls: type[Any], config: Any) -> dict[str, Any]:
    """Return the values in ``config`` of the fields that it has in common with the dataclass ``kls``."""
    return {f.name: getattr(config, f.name) for f in fields(kls) if hasattr(config, f.name)}
