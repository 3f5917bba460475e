"""Shell completion of names, which is fast and never reports errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from glob import escape
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from lading.catalog.store import AssetStore

_MOST = 200


def complete_model(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of models."""
    return _silent(lambda store: [m.name for m in store.models(f"{escape(incomplete)}*", limit=_MOST)])


def complete_target(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of models, or files if the word is a path."""
    if "/" in incomplete or incomplete.startswith((".", "~")):
        return [CompletionItem(incomplete, type="file")]

    return complete_model(context, parameter, incomplete)


def complete_comparable(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of models and ``family/architecture``, or files if the word is a path."""
    family, slash, arch = incomplete.partition("/")
    if slash and (
        found := _silent(
            lambda store: [f"{family}/{a.name}" for a in store.architectures(family) if a.name.startswith(arch)]
        )
    ):
        return found

    return complete_target(context, parameter, incomplete)


def complete_family(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of families."""
    return _silent(lambda store: [f.name for f in store.families() if f.name.startswith(incomplete)])


def _silent(produce: Callable[[AssetStore], Iterable[str]]) -> list[CompletionItem]:
    # A key press must not create a catalog, wait for a lock, or report an error.
    logging.getLogger("lading").setLevel(logging.CRITICAL + 1)
    try:
        from lading.catalog.open import open_catalog_readonly
        from lading.catalog.store import AssetStore
        from lading.system.settings import Settings

        store = AssetStore(open_catalog_readonly(Settings.from_environment()))
        return [CompletionItem(name) for name in produce(store)]
    except Exception:
        return []
