"""Sizes, counts and names of columns, as people read them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lading.errors import escaped


def human_bytes(count: int | None) -> str:
    """Format a size as ``1.5 GB``, in powers of 1,000 as on model hubs."""
    return "-" if count is None else _human(count, ("B", "kB", "MB", "GB", "TB", "PB"), " ")


def human_count(count: int | None) -> str:
    """Format a number as ``596M``."""
    return "-" if count is None else _human(count, ("", "K", "M", "B", "T"), "")


def counted(count: int, noun: str) -> str:
    """Format a count and a noun as ``1 shard`` or ``2 shards``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _human(count: int, units: Sequence[str], gap: str) -> str:
    value, unit = float(count), 0
    # 999.5 would be rounded to 1000.
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1

    shown = str(count) if unit == 0 else f"{value:.3g}" if value < 100 else f"{value:.0f}"

    return f"{shown}{gap if units[unit] else ''}{units[unit]}"


def some(names: Collection[str], *, most: int = 3) -> str:
    """Format the first ``most`` of ``names`` and the number of the others."""
    first = list(names)[:most]
    more = len(names) - len(first)

    return ", ".join(first) + (f" and {more} more" if more else "")


def runs_of(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and the last of each run of consecutive numbers in ascending ones."""
    starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]

    return [(numbers[i], numbers[end - 1]) for i, end in zip(starts, [*starts[1:], len(numbers)], strict=True)]


def representation(value: object, *facts: str) -> str:
    """Return the representation of a report, a line of its class and the ``facts`` that are not empty."""
    return escaped(f"<{type(value).__name__}: {', '.join(filter(None, facts))}>")


def unique_names(columns: Sequence[str]) -> list[str]:
    """Add numbers to repeated names of SQL columns, as the keys of an object are unique."""
    unique: list[str] = []
    for name in columns:
        candidate, n = name, 1
        while candidate in unique:
            n += 1
            candidate = f"{name}_{n}"
        unique.append(candidate)

    return unique
