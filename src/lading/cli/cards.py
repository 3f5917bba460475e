"""`lading import` and `lading export-cards`."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import click

from lading.cards.addresses import stated_addresses, with_addresses
from lading.cards.card import AssetCard, AssetCardField, CardEntry
from lading.cli.command import command
from lading.cli.complete import complete_model
from lading.cli.options import GivenPath, dry_run
from lading.cli.output import note, printable
from lading.cli.selection import has_wildcard
from lading.system.display import counted
from lading.system.filesystem import write_text
from lading.system.uris import uri_path

log = logging.getLogger("lading")


@command("import")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=GivenPath(allow_dash=True))
@dry_run
@click.option("--replace", is_flag=True, help="Replace cards that came from another source.")
@click.option("--keep-going", is_flag=True, help="Import the valid cards of files that also hold invalid ones.")
def import_(paths: tuple[str, ...], dry_run: bool, replace: bool, keep_going: bool) -> None:
    """Import cards and architectures from files and folders.

    A file that ends in .jsonl holds one per line; others are YAML. A PATH of - is stdin. With -v, shows all names.

    For example: lading import ./cards --dry-run
    """
    from lading.catalog.import_cards import import_cards
    from lading.errors import CardFileError

    report = import_cards(*paths, replace=replace, keep_going=keep_going, dry_run=dry_run)

    for warning in report.warnings:
        log.warning("%s", warning)
    counts = []
    for what in ("added", "changed", "unchanged", "removed"):
        names = getattr(report, what)
        counts.append(f"{len(names)} {what}")
        for name in names:
            log.info("%s %s", what, name)
    note(", ".join(counts), dry_run=dry_run)

    for problem in report.problems:
        note(f"error: {printable(problem)}")
    if report.problems:
        click.get_current_context().exit(CardFileError.exit_code)


@command("export-cards")
@click.argument("pattern", required=False, shell_complete=complete_model)
@click.option("-o", "--output", type=GivenPath(dir_okay=False), metavar="FILE", help="Write to FILE instead of stdout.")
def export_cards(pattern: str | None, output: str | None) -> None:
    """Write cards and architectures as YAML that can be imported.

    PATTERN is a name with * and ? as in a shell; the default is all.

    For example: lading export-cards 'qwen*' -o qwen.yaml
    """
    from lading.cards import card_file as cardfile
    from lading.catalog.store import get_asset_store

    store = get_asset_store()
    cards, architectures = store.entries(pattern)
    if pattern is not None and not cards and not architectures and not has_wildcard(pattern):
        store.retrieve_card(pattern)
    text = cardfile.dump(map(_with_absolute_paths, cards), architectures)

    if output is None or output == "-":
        click.echo(text, nl=False)
    else:
        write_text(Path(output), [text])
    note(f"{counted(len(cards), 'card')}, {counted(len(architectures), 'architecture')}")


def _with_absolute_paths(entry: CardEntry) -> CardEntry:
    """Return the entry with its relative paths made absolute."""
    if entry.folder is None:
        return entry

    card = AssetCard(entry.name, entry.metadata)
    paths = {
        name: str(uri_path(uri := AssetCardField(name, card, value, entry.folder).as_uri()) or uri)
        for name, value in stated_addresses(entry.metadata)
    }

    return replace(entry, metadata=with_addresses(entry.metadata, paths))
