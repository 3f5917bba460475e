"""When a row was written, and by which lading."""

from __future__ import annotations

import re
from datetime import UTC, datetime


def now() -> str:
    """The time as the catalog keeps it: ISO 8601, UTC, whole seconds."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def newer(a: str, b: str) -> bool:
    """Whether version ``a`` is newer than ``b``, by their release numbers."""
    return _release(a) > _release(b)


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
