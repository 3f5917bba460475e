"""Progress bars: on stderr, or as widgets of a notebook."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


def byte_bar(total: int | None, label: str, *, shown: bool = True) -> tqdm[NoReturn]:
    """Create a progress bar for bytes, which appears after half a second and disappears when it is closed.

    It is a widget in a notebook that has widgets, and text on stderr elsewhere.

    :param total: the number of bytes; ``None`` if it is unknown.
    :param shown: whether to print the bar; it counts in either case.
    """
    with warnings.catch_warnings():
        # A notebook without widgets shows text, too; a warning at each first load would not help.
        warnings.filterwarnings("ignore", message="IProgress not found")
        from tqdm.auto import tqdm  # most commands show no bar

    return tqdm(total=total, unit="B", unit_scale=True, desc=label, leave=False, delay=0.5, disable=not shown)
