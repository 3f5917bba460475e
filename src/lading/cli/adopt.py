"""`lading adopt`."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.failure import SYSTEM
from lading.cli.options import GivenPath, dry_run, no_restrict
from lading.cli.output import Column, Form, listing_options, note, printable, write_rows
from lading.errors import LadingError
from lading.system.display import counted, human_bytes

if TYPE_CHECKING:
    from lading.operations.adopt import Adoption, Status

_COLUMNS = (
    "path", "status", "kind", "checkpoint", "revision", "cards", "moved_from", "left_behind", "bytes", "dtypes",
    "verified", "overlays", "problem",
)  # fmt: skip

_STATUSES: dict[Status, tuple[str, str]] = {
    "adopted": ("checkpoint", "adopted"),
    "known": ("checkpoint", "known before"),
    "moved": ("checkpoint", "moved"),
    "unloadable": ("artifact", "that lading does not load"),
    "failed": ("checkpoint", "that cannot be used"),
}

_TABLE = (
    Column(name="status", color={"adopted": "green", "moved": "green", "unloadable": "yellow", "failed": "red"}.get),
    Column(name="kind"),
    Column(name="cards", show=lambda cards: ", ".join(cards) or "-", keep=True),
    Column(name="bytes", heading="size", show=human_bytes, right=True),
    Column(name="dtypes", show=lambda dtypes: ", ".join(dtypes) or "-"),
    Column(name="path"),
)


@command("adopt")
@click.argument("paths", nargs=-1, metavar="[PATH]...", type=GivenPath(path_type=Path))
@dry_run
@no_restrict
@listing_options
def adopt(paths: tuple[Path, ...], dry_run: bool, no_restrict: bool, form: Form) -> None:
    """Record which checkpoints are on this machine.

    They stay in place, and lading never deletes them. Records those in the folders PATH, at any depth; without PATH,
    those in the cache of Hugging Face's libraries. `lading list --all` and `lading du` show all of them.

    For example: lading adopt /models
    """
    from lading.operations.adopt import adopt_checkpoints

    found = adopt_checkpoints(*paths, dry_run=dry_run, restrict=not no_restrict)
    write_rows(_COLUMNS, [[getattr(each, c) for c in _COLUMNS] for each in found], form, table=_TABLE)
    for each in found:
        if each.status == "failed":
            note(printable(each.problem or ""))
        elif each.left_behind:
            _remind(each)
        elif each.overlays and form is Form.TABLE:
            _suggest(each)

    _explain([each for each in found if each.problem is not None and each.error is None])

    statuses = Counter(each.status for each in found)
    counts = [f"{counted(n, noun)} {what}" for status, (noun, what) in _STATUSES.items() if (n := statuses[status])]
    summary = ", ".join(counts) or "no checkpoint was found"
    note(summary, dry_run=dry_run)

    errors = [each.error for each in found if each.error is not None]
    if errors and len(errors) == len(found):
        error = errors[0]
        click.get_current_context().exit(error.exit_code if isinstance(error, LadingError) else SYSTEM)


def _explain(artifacts: Sequence[Adoption]) -> None:
    """Say why lading does not load artifacts, once for each reason."""
    by_reason: dict[str, list[Adoption]] = {}
    for each in artifacts:
        by_reason.setdefault(f"{each.kind}: {each.problem}", []).append(each)
    for reason, those in by_reason.items():
        more = f" and {len(those) - 1} more" if len(those) > 1 else ""
        note(f"{printable(str(those[0].path))}{more}: {printable(reason)}")


def _remind(adoption: Adoption) -> None:
    names, before, now = ", ".join(adoption.left_behind), str(adoption.moved_from), str(adoption.path)
    note(
        f"{printable(now)} was at {printable(before)}, the path that {names} still states. Run `lading relocate "
        f"{printable(shlex.quote(before))} {printable(shlex.quote(now))}` to change it."
    )


def _suggest(adoption: Adoption) -> None:
    note(
        f"{printable(str(adoption.path))} belongs to no card. If its name is right, add this to a card file to let the "
        "model load it:"
    )
    for overlay in adoption.overlays:
        for line in overlay.splitlines():
            click.echo(f"  {printable(line)}", err=True)
