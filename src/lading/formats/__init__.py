"""Checkpoint formats: what a checkpoint holds, told by its headers."""

from lading.formats.local import *  # noqa: F403
from lading.formats.local import __all__ as __all__
