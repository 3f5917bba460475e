"""`lading remove-card`, `lading rename` and `lading relocate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.complete import complete_model
from lading.cli.options import GivenPath, dry_run
from lading.cli.output import Form, listing_options, note, printable, write_rows
from lading.cli.selection import Selection, confirm
from lading.system.display import counted
from lading.system.uris import uri_path

if TYPE_CHECKING:
    from lading.catalog.records import CardChange

_COLUMNS = ("card", "field", "before", "after")


@command("remove-card")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_model)
@dry_run
@click.option("--yes", is_flag=True, help="Remove several cards without asking.")
@listing_options
def remove_card(names: tuple[str, ...], dry_run: bool, yes: bool, form: Form) -> None:
    """Remove cards from the catalog, with their overlays.

    Removes no weights: `lading rm` does. A card that a watched card file states has to be removed there. NAME may be a
    pattern with * and ? as in a shell; lists several cards, and asks, before it removes any.

    For example: lading remove-card my-model
    """
    from lading.catalog.edit_cards import remove_cards
    from lading.catalog.store import get_asset_store

    store = get_asset_store()
    selection = Selection(names, cards=True)
    chosen = selection.resolve(lambda name: name, store)
    if selection.failed:
        note("nothing was removed.")
        selection.finish()
    if selection.several and not (yes or dry_run):
        cards = [change.card for change in remove_cards(*chosen, dry_run=True, store=store)]
        for card in cards:
            note(printable(card))
        count = counted(len(cards), "card")
        confirm(
            f"Remove {count}?",
            refusal=f"{count} would be removed, as listed, but stdin is not a terminal. Nothing was removed. Add "
            "`--yes` to remove them.",
        )

    _report(remove_cards(*chosen, dry_run=dry_run, store=store), "removed", form, dry_run=dry_run)


@command("rename")
@click.argument("old", metavar="OLD", shell_complete=complete_model)
@click.argument("new", metavar="NEW")
@dry_run
@listing_options
def rename(old: str, new: str, dry_run: bool, form: Form) -> None:
    """Give the card OLD the name NEW, wherever it occurs.

    A card that a watched card file states has to be renamed there.

    For example: lading rename checkpoint-500 my-model
    """
    from lading.catalog.edit_cards import rename_card

    _report(rename_card(old, new, dry_run=dry_run), "changed", form, dry_run=dry_run)


@command("relocate")
@click.argument("old", metavar="OLD", type=GivenPath(path_type=Path))
@click.argument("new", metavar="NEW", type=GivenPath(path_type=Path))
@dry_run
@listing_options
def relocate(old: Path, new: Path, dry_run: bool, form: Form) -> None:
    """Tell the catalog that OLD is at the path NEW now.

    Moves no files: do that before. OLD may be a checkpoint, or a folder with checkpoints in it. Checks that the
    checkpoints at the new place have the tensors that the catalog knows.

    For example: lading relocate /scratch/models /data/models
    """
    from lading.operations.relocate import relocate_checkpoints

    _report(relocate_checkpoints(old, new, dry_run=dry_run), "changed", form, dry_run=dry_run)


def _report(changes: Sequence[CardChange], what: str, form: Form, *, dry_run: bool) -> None:
    write_rows(_COLUMNS, [[getattr(change, c) for c in _COLUMNS] for change in changes], form)
    for file in sorted({str(path) for change in changes if (path := uri_path(change.stated_in)) is not None}):
        note(f"{printable(file)} states it as it was: the next `lading import` of that file brings that back")
    cards = counted(len({change.card for change in changes}), "card")
    note(f"{cards} {what}", dry_run=dry_run)
