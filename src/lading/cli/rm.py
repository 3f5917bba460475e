"""`lading rm`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.complete import complete_model
from lading.cli.names import unknown_model
from lading.cli.output import note, printable
from lading.system.display import counted, human_bytes

if TYPE_CHECKING:
    from lading.operations.remove import Removal


@command("rm")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_model)
@click.option(
    "--orphans", is_flag=True, help="Remove files that this catalog fetched to lading's cache and no card names."
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--yes", is_flag=True, help="Delete revisions of the Hugging Face cache without asking.")
def rm(names: tuple[str, ...], orphans: bool, dry_run: bool, yes: bool) -> None:
    """Remove models from this machine.

    Deletes the files that this catalog fetched to lading's cache. The cache of Hugging Face's libraries belongs to
    huggingface_hub: lists the revisions of the model there, asks, and lets huggingface_hub delete them. Files elsewhere
    stay (adopted ones, and those that a card names by their path), and so do files that another model needs. Cards
    stay, too: a load fetches the model again.

    For example: lading rm qwen3_0.6b
    """
    if not names and not orphans:
        raise click.UsageError("Give the NAME of a model, or --orphans.", click.get_current_context())

    from lading.catalog.store import get_asset_store
    from lading.operations.remove import checkpoint_without_card, remove_model, remove_orphans

    store = get_asset_store()
    # All of them, before anything is removed.
    for name in names:
        if store.maybe_retrieve_card(name) is None and (
            "://" not in name or checkpoint_without_card(name, store) is None
        ):
            raise unknown_model(name, store)

    agreed: dict[str, bool] = {}
    for name in names:
        removal = remove_model(name, dry_run=True, store=store)
        agreed[name] = yes or (not dry_run and _agreed(name, removal))
        if removal.revisions and not dry_run and not agreed[name]:
            remove_model(name, store=store)  # which refuses to, before another one is removed

    for name, hub in agreed.items():
        _say(name, remove_model(name, dry_run=dry_run, hub=hub, store=store), dry_run=dry_run)
    if orphans:
        removal = remove_orphans(dry_run=dry_run, store=store)
        _say("orphans", removal, dry_run=dry_run, nothing="there are no orphans")


def _agreed(name: str, removal: Removal) -> bool:
    """Ask whether the revisions of a model are to be deleted, where there is a terminal to ask."""
    if not removal.revisions or sys.stdin is None or not sys.stdin.isatty():
        return False
    for revision in removal.revisions:
        note(f"{revision.commit} of {revision.repo} is in {printable(str(revision.path))}")
    count = counted(len(removal.revisions), "revision")

    return click.confirm(
        f"Delete {count} of {printable(name)} from the Hugging Face cache, which other programs use, too?",
        err=True,
        abort=True,
    )


def _say(name: str, removal: Removal, *, dry_run: bool, nothing: str = "") -> None:
    for file in removal.kept:
        note(f"{printable(str(file.path))} stays: {file.reason}")
    if removal.also_of:
        verb = "is" if dry_run else "was"
        note(f"the checkpoint {verb} that of {printable(', '.join(removal.also_of))}, too")
    if removal.nothing:
        note(nothing or f"nothing of {printable(name)} is on this machine")
        return

    for revision in removal.revisions:
        verb = "is to be" if dry_run else "was"
        note(f"the revision {revision.commit} of {revision.repo} {verb} deleted by huggingface_hub")
    verb, end = ("to be removed", " (dry run)") if dry_run else ("removed", "")
    files = counted(len(removal.removed), "file")
    click.echo(f"{printable(name)}: {files} {verb}, {human_bytes(removal.freed)} freed{end}")
