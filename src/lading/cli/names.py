"""Resolution of names on the command line, and the error for unknown ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lading.errors import ModelFamilyNotKnownError, ModelNotKnownError, NotSupportedError, did_you_mean
from lading.system.filesystem import expand_home, path_exists

if TYPE_CHECKING:
    from lading.catalog.store import AssetStore


def name_or_path(target: str, store: AssetStore) -> str | Path:
    """Return ``target`` if a card has that name; else as a path, if it looks like one or exists.

    :raises ModelNotKnownError: it is neither.
    :raises NotSupportedError: it is a URI, which only a card can state.
    """
    if target.startswith((".", "~")):
        return expand_home(target)
    if "://" in target:
        raise NotSupportedError(
            f"Expected the name of a model or a path, found the URI {target!r}. State it as the "
            "`checkpoint` of a card, and give the card's name."
        )
    if store.maybe_retrieve_card(target) is not None:
        return target
    if "/" in target or path_exists(target):
        return Path(target)

    raise unknown_model(target, store)


def has_wildcard(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def require_family(family: str, store: AssetStore) -> None:
    """Require that a package registers a family, or that a card names it.

    :raises ModelFamilyNotKnownError: neither.
    """
    known = [f.name for f in store.families()]
    if family not in known:
        raise ModelFamilyNotKnownError(family, did_you_mean(family, known))


def unknown_model(name: str, store: AssetStore) -> ModelNotKnownError:
    """Return the error for an unknown model, with suggestions."""
    near = store.suggest(name.partition("@")[0])

    return ModelNotKnownError(name, f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
