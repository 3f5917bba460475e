"""What a name on the command line means, and what is said of one that nobody has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lading.errors import ModelNotKnownError, NotSupportedError
from lading.system.filesystem import expand_home, path_exists

if TYPE_CHECKING:
    from lading.catalog.store import AssetStore


def name_or_path(target: str, store: AssetStore) -> str | Path:
    """The name of a card where one has it; else a path, if it looks like one or if something is there.

    :raises ModelNotKnownError: it is neither.
    :raises NotSupportedError: it is a URI, which only the card of a model can state.
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


def unknown_model(name: str, store: AssetStore) -> ModelNotKnownError:
    """The error for a name that no model has; it suggests others."""
    near = store.suggest(name.partition("@")[0])

    return ModelNotKnownError(name, f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
