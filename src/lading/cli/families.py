"""`lading families` and `lading archs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.complete import complete_family
from lading.cli.output import Column, Form, listing_options, note, write_rows
from lading.errors import ModelFamilyNotKnownError, did_you_mean

if TYPE_CHECKING:
    from lading.catalog.store import AssetStore


@command("families")
@listing_options
def families(form: Form) -> None:
    """List the model families.

    These are the families that installed packages register, and those that cards name.

    For example: lading families --json
    """
    from lading.catalog.store import get_asset_store

    rows = [(f.name, f.registered, f.architectures, f.cards) for f in get_asset_store().families()]
    table = (
        Column(name="name", keep=True),
        Column(name="registered", color=lambda registered: None if registered else "yellow"),
        Column(name="architectures", right=True),
        Column(name="cards", right=True),
    )
    write_rows(("name", "registered", "architectures", "cards"), rows, form, table=table)


@command("archs")
@click.argument("family", required=False, shell_complete=complete_family)
@listing_options
def archs(family: str | None, form: Form) -> None:
    """List the architectures of a family, or of all families.

    For example: lading archs qwen
    """
    from lading.catalog.store import get_asset_store

    store = get_asset_store()
    found = store.architectures(family)
    if not found and family is not None:
        require_family(family, store)
        note(f"the family {family!r} has no architectures in the catalog.")

    columns = ("name", "family", "base", "overrides", "source")
    table = (
        Column(name="name", keep=True),
        Column(name="family"),
        Column(name="base"),
        Column(name="source"),
    )
    write_rows(columns, [(a.name, a.family, a.base, a.overrides, a.source) for a in found], form, table=table)


def require_family(family: str, store: AssetStore) -> None:
    """Require that a package registers a family, or that a card names it.

    :raises ModelFamilyNotKnownError: neither.
    """
    known = [f.name for f in store.families()]
    if family not in known:
        raise ModelFamilyNotKnownError(family, did_you_mean(family, known))
