"""What the sizes and probabilities of a module have to satisfy, whichever module it is.

Each check takes the value that holds the fields, and their names; the error names the first one that is wrong.
"""

from __future__ import annotations

from typing import Any

MAX_SIZE = 2**30
"""More than any width, vocabulary or context of a model. The bytes of a float32 matrix of two such sizes still fit into
64 bits; above that, torch fails with errors of its own."""


def require_positive(spec: Any, *names: str) -> None:
    """:raises ValueError: one of these fields is not above zero, or is an integer above ``MAX_SIZE``."""
    for name in names:
        value = getattr(spec, name)
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, but is {value}")
        if isinstance(value, int):
            require_size(f"`{name}`", value)


def require_size(what: str, value: int) -> None:
    """:raises ValueError: ``value`` is larger than any size of a model."""
    if value > MAX_SIZE:
        # Python refuses to print integers of thousands of digits.
        found = f"is {value}" if value.bit_length() < 100 else f"has {value.bit_length()} bits"
        raise ValueError(f"{what} must be at most {MAX_SIZE}, but {found}")


MAX_LAYERS = 10_000
"""More than any model has, and few enough to make modules of."""

MAX_LABELS = 1_000_000
"""More than any classifier tells apart, and few enough to keep their names."""


def require_layers(num_layers: int) -> None:
    """:raises ValueError: no layers, or so many that modules for them would take all of the memory."""
    if not 0 < num_layers <= MAX_LAYERS:
        raise ValueError(f"`num_layers` must be from 1 to {MAX_LAYERS}, but is {num_layers}")


def require_multiple(spec: Any, name: str, *divisors: str) -> None:
    """:raises ValueError: the field ``name`` is not a multiple of one of the other fields."""
    for divisor in divisors:
        if getattr(spec, name) % getattr(spec, divisor) != 0:
            raise ValueError(
                f"`{name}` must be a multiple of `{divisor}`, but they are {getattr(spec, name)} and "
                f"{getattr(spec, divisor)}"
            )


def require_dropout(spec: Any, *names: str) -> None:
    """:raises ValueError: one of these fields is no probability with which something may be left out: below one."""
    for name in names:
        value = getattr(spec, name)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"`{name}` must be in [0, 1), but is {value}")


def require_symbol(pad_idx: int | None, vocab_size: int) -> None:
    """:raises ValueError: the symbol for padding is none of ``vocab_size`` symbols."""
    if pad_idx is not None and not 0 <= pad_idx < vocab_size:
        raise ValueError(f"`pad_idx` must be an index of the {vocab_size} symbols, but is {pad_idx}")
