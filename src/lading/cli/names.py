"""Patterns and families on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lading.errors import ModelFamilyNotKnownError, did_you_mean

if TYPE_CHECKING:
    from lading.catalog.store import AssetStore


def has_wildcard(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def require_family(family: str, store: AssetStore) -> None:
    """Require that a package registers a family, or that a card names it.

    :raises ModelFamilyNotKnownError: neither.
    """
    known = [f.name for f in store.families()]
    if family not in known:
        raise ModelFamilyNotKnownError(family, did_you_mean(family, known))
