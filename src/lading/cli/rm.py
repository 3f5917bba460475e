"""`lading rm`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.options import dry_run
from lading.cli.output import Form, listing_options, note, printable, write_rows
from lading.cli.selection import Selection, confirm, select_models
from lading.system.display import counted, human_bytes

if TYPE_CHECKING:
    from lading.operations.remove import Removal


_COLUMNS = ("name", "bytes", "removed", "kept", "revisions", "also_of", "dry_run")


@command("rm")
@select_models("NAME|PATH|URI", here=True, required=False)
@click.option(
    "--orphans", is_flag=True, help="Remove files that this catalog fetched to lading's cache and no card names."
)
@dry_run
@click.option(
    "--yes", is_flag=True, help="Remove several models, and revisions of the Hugging Face cache, without asking."
)
@listing_options
def rm(selection: Selection, orphans: bool, dry_run: bool, yes: bool, form: Form) -> None:
    """Remove models from this machine.

    Deletes the files that this catalog fetched to lading's cache. The cache of Hugging Face's libraries belongs to
    huggingface_hub: lists the revisions of the model there, asks, and lets huggingface_hub delete them. Files elsewhere
    stay (adopted ones, and those that a card names by their path), and so do files that another model needs. Cards
    stay, too: a load fetches the model again. NAME may be a pattern with * and ? as in a shell; lists several models,
    and asks, before it removes any.

    For example: lading rm qwen3_0.6b
    """
    if not selection and not orphans:
        raise click.UsageError("Give the NAME of a model, --every, or --orphans.", click.get_current_context())

    from lading.catalog.store import get_asset_store
    from lading.operations.remove import Remover, remove_orphans

    store = get_asset_store()
    remover = Remover(store)
    rows: list[tuple[object, ...]] = []

    def tell(name: str, removal: Removal, *, nothing: str = "") -> None:
        _write_notes(name, removal, dry_run=dry_run, nothing=nothing)
        if removal.nothing:
            return
        rows.append(_row(removal, dry_run=dry_run))
        if form is Form.TABLE:
            click.echo(_line(name, removal, dry_run=dry_run))

    # All of them, before anything is removed.
    plans = selection.resolve(remover.plan, store) if selection else {}
    if selection.failed:
        note("nothing was removed.")
        selection.finish()
    agreed = not (yes or dry_run) and _agreed(selection, {name: plan.removal for name, plan in plans.items()})

    if dry_run:
        selection.each(plans, lambda name, plan: tell(name, plan.removal))
    elif plans:
        with remover.removing(hub=yes or agreed) as remove:
            selection.each(plans, lambda name, plan: tell(name, remove(plan)))
    if orphans:
        tell("orphans", remove_orphans(dry_run=dry_run, store=store), nothing="no orphans were found")
    if form is not Form.TABLE:
        write_rows(_COLUMNS, rows, form)
    selection.finish()


def _agreed(selection: Selection, removals: Mapping[str, Removal]) -> bool:
    """Ask whether to remove several models, or revisions of one, where there is a terminal to ask.

    :raises PolicyError: there are several, and no terminal.
    """
    affected = {name: removal for name, removal in removals.items() if removal.removed or removal.revisions}
    revisions = [revision for removal in affected.values() for revision in removal.revisions]
    many = selection.several and bool(affected)
    if not many and not revisions:
        return False

    for name, removal in affected.items():
        if many:
            note(f"{printable(name)}: {counted(len(removal.removed), 'file')}, {human_bytes(removal.freed)}")
        for revision in removal.revisions:
            note(f"{revision.commit} of {revision.repo} is in {printable(str(revision.path))}")
    if not many and (sys.stdin is None or not sys.stdin.isatty()):
        return False  # the removal refuses

    of = f" of {printable(next(iter(affected)))}" if not many else ""
    cache = f"{counted(len(revisions), 'revision')}{of} from the Hugging Face cache, which other programs use, too"
    count = counted(len(affected), "model")
    confirm(
        f"Remove {count}{f', with {cache}' if revisions else ''}?" if many else f"Delete {cache}?",
        refusal=f"{count} would be removed, as listed, but stdin is not a terminal. Nothing was removed. Add "
        "`--yes` to remove them.",
    )

    return True


def _row(removal: Removal, *, dry_run: bool) -> tuple[object, ...]:
    kept = [asdict(file) for file in removal.kept]
    revisions = [asdict(revision) for revision in removal.revisions]

    return removal.name or None, removal.freed, removal.removed, kept, revisions, removal.also_of, dry_run


def _write_notes(name: str, removal: Removal, *, dry_run: bool, nothing: str) -> None:
    for file in removal.kept:
        note(f"{printable(str(file.path))} stays: {file.reason}")
    if removal.also_of:
        verb = "is" if dry_run else "was"
        note(f"the checkpoint {verb} that of {printable(', '.join(removal.also_of))}, too")
    if removal.nothing:
        note(nothing or f"nothing of {printable(name)} is on this machine")
    for revision in removal.revisions:
        verb = "is to be" if dry_run else "was"
        note(f"the revision {revision.commit} of {revision.repo} {verb} deleted by huggingface_hub")


def _line(name: str, removal: Removal, *, dry_run: bool) -> str:
    verb, end = ("to be removed", " (dry run)") if dry_run else ("removed", "")
    files = counted(len(removal.removed), "file")

    return f"{printable(name)}: {files} {verb}, {human_bytes(removal.freed)} freed{end}"
