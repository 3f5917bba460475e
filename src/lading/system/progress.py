"""Progress bars on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


def byte_bar(total: int | None, label: str, *, shown: bool = True) -> tqdm[NoReturn]:
    """Create a progress bar for bytes, which appears after half a second and disappears when it is closed.

    :param total: the number of bytes; ``None`` if it is unknown.
    :param shown: whether to print the bar; it counts in either case.
    """
    from tqdm import tqdm  # most commands show no bar

    return tqdm(total=total, unit="B", unit_scale=True, desc=label, leave=False, delay=0.5, disable=not shown)
