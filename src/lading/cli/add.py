"""`lading add`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.failure import explain
from lading.cli.options import GivenPath, dry_run, no_progress, no_restrict
from lading.cli.output import Column, Form, listing_options, note, printable, write_rows
from lading.system.display import counted, human_bytes

if TYPE_CHECKING:
    from lading.operations.add import Status

_COLUMNS = (
    "name", "status", "family", "arch", "bytes", "dtypes", "license", "checkpoint", "moved_from", "problem",
)  # fmt: skip

_COLORS = {"added": "green", "moved": "green", "changed": "green", "gone": "yellow", "failed": "red"}

_TABLE = (
    Column(name="name", keep=True),
    Column(name="status", color=_COLORS.get),
    Column(name="family"),
    Column(name="arch"),
    Column(name="bytes", heading="size", show=human_bytes, right=True),
    Column(name="license"),
    Column(name="checkpoint"),
)

_ORDER: tuple[Status, ...] = ("added", "changed", "moved", "unchanged", "gone", "skipped", "failed")


def _fields(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, object]:
    from lading.cards.documents.read_yaml import yaml_documents

    fields: dict[str, object] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.strip() or name.strip() in ("name", "checkpoint"):
            raise click.BadParameter(
                f"expected FIELD=VALUE with a field such as `license` or `owner`, found {value!r}; PATH is the "
                "checkpoint, and `--name-from` gives the name"
            )
        document = next(yaml_documents(text), None)
        # As in a card: numbers, true, lists; and invalid YAML, such as @me, is text.
        fields[name.strip()] = text if document is None or document.problems else document.value

    return fields


@command("add")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=GivenPath())
@click.option(
    "--name-from",
    default="folder",
    metavar="RULE",
    help="The names of cards: folder (the default), path (below PATH), or a pattern with {folder}, {parent}, {path}.",
)
@click.option("-r", "--recursive", is_flag=True, help="Search folders at any depth, also in checkpoints.")
@click.option(
    "--set", "fields", multiple=True, callback=_fields, metavar="FIELD=VALUE", help="A field of all these cards."
)
@dry_run
@no_restrict
@no_progress
@listing_options
def add(
    paths: tuple[str, ...],
    name_from: str,
    recursive: bool,
    fields: dict[str, object],
    dry_run: bool,
    no_restrict: bool,
    no_progress: bool,
    form: Form,
) -> None:
    """Give checkpoints a name: write a card for each one.

    PATH is a checkpoint, a folder of checkpoints, or an address such as hg://org/name. Family and architecture come
    from config.json; license, base model and task from README.md. A checkpoint that has a card keeps it, also if it
    moved; run it again after changes.

    For example: lading add ~/models --set owner=me
    """
    from lading.operations.add import add_checkpoints
    from lading.operations.card_names import describe_rule

    try:
        found = add_checkpoints(
            *paths,
            name_from=name_from,
            recursive=recursive,
            fields=fields,
            dry_run=dry_run,
            restrict=not no_restrict,
            progress=not no_progress,
        )
    except ValueError as error:
        if isinstance(error, UnicodeError):
            raise
        raise click.BadParameter(str(error), param_hint="'--name-from'") from None

    shown = [each for each in found if form is not Form.NAMES or each.name is not None]
    write_rows(_COLUMNS, [[getattr(each, c) for c in _COLUMNS] for each in shown], form, table=_TABLE)
    for each in found:
        if each.problem is not None:
            note(printable(each.problem))

    statuses = Counter(each.status for each in found)
    counts = [f"{statuses[status]} {status}" for status in _ORDER if statuses[status]]
    if statuses["added"]:
        note(f"a card's name is {describe_rule(name_from)}")
    if not found:
        deeper = "" if recursive else "; `--recursive` searches the folders in the folders of PATH, too"
        note(f"no checkpoint was found{deeper}")
    else:
        total = counted(len(found), "checkpoint")
        note(f"{total}: {', '.join(counts)}", dry_run=dry_run)

    codes = [explain(each.error)[0] for each in found if each.status == "failed" and each.error is not None]
    click.get_current_context().exit(max(codes, default=0))
