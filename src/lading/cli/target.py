"""NAME or PATH: what an argument that may be either means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lading.catalog.store import AssetStore


def name_or_path(target: str, store: AssetStore) -> str | Path:
    """The name of a card where one has it; else a path, if it looks like one or if something is there."""
    if target.startswith((".", "~")):
        return Path(target).expanduser()
    if store.maybe_retrieve_card(target) is None and ("/" in target or Path(target).exists()):
        return Path(target)

    return target
