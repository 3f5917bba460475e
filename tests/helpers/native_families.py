"""The families of this package, without ``hg``, whose models are those of transformers."""

from __future__ import annotations

from lading.system.entry_points import FAMILIES_GROUP, registered

NATIVE = sorted(
    entry.name
    for entry in registered(FAMILIES_GROUP)
    if entry.value.startswith("lading.families.") and entry.name != "hg"
)
