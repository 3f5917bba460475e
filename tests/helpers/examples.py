"""How many examples a property is tried with: few in the quick tier, all in the slow one."""

from __future__ import annotations

from hypothesis import settings

QUICK = 25
"""The examples of a property in the quick tier; those that are written down beside it are tried besides."""


def examples(count: int) -> int:
    """Return the examples of a property that needs another number of them than most: ``count`` in the slow tier."""
    return min(count, QUICK) if settings().max_examples == QUICK else count
