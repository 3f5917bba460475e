"""Checkpoint formats: the manifest of a checkpoint, read from the headers of its files."""

from lading.formats.local import *  # noqa: F403
from lading.formats.local import __all__ as __all__
