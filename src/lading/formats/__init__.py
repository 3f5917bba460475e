"""Checkpoint formats: the manifest of a checkpoint, read from the headers of its files.

The public functions are those of :mod:`lading.formats.local`. Python imports them at their first use: the catalog needs
only the values of :mod:`lading.formats.manifest`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lading.formats.local import *  # noqa: F403
    from lading.formats.local import __all__ as __all__


def __getattr__(name: str) -> object:
    return getattr(import_module(f"{__name__}.local"), name)
