"""Bars on stderr for what may take long."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


def byte_bar(total: int | None, label: str, *, shown: bool = True) -> tqdm[NoReturn]:
    """A bar for bytes, which appears when they take longer than half a second, and goes with the last of them.

    :param total: ``None`` where it is not known.
    :param shown: one that is not counts all the same.
    """
    from tqdm import tqdm  # not every command has anything to show

    return tqdm(total=total, unit="B", unit_scale=True, desc=label, leave=False, delay=0.5, disable=not shown)
