"""Cards that lading writes itself, and the contents of their checkpoints: rows of a source of their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sqlalchemy import select
from sqlalchemy.orm import Session

from lading.cards.card import CardEntry
from lading.cards.card_file import CardFile, parse
from lading.cards.documents.write_yaml import to_yaml
from lading.catalog.checkpoints.record import write_checkpoint
from lading.catalog.database.database import Database
from lading.catalog.importing.apply import apply
from lading.catalog.importing.changes import ADDED
from lading.catalog.links import link_by_uri
from lading.catalog.records import CheckpointContents, ImportReport
from lading.catalog.schema import CardRow, SourceRow
from lading.errors import CardFileError

log = logging.getLogger("lading")


def card_entry(name: str, fields: Mapping[str, object]) -> CardEntry:
    """Return a card that the catalog is to hold, checked as one of a file: so it can be exported and imported again.

    :raises CardFileError: the name or a field is not valid.
    :raises TypeError: a value that YAML and JSON do not have.
    """
    if "@" in name:
        raise CardFileError([f"name: expected the name of a card without @, found {name!r}"])
    text = to_yaml([{"name": name, **fields}])
    file = parse(text.encode("utf-8", errors="surrogatepass"), source=ADDED, label=ADDED)
    if file.problems:
        raise CardFileError([problem.removeprefix(f"{ADDED}[0]").lstrip(".: ") for problem in file.problems])

    return file.cards[0]


def record_additions(
    database: Database, entries: Sequence[CardEntry], contents: Sequence[CheckpointContents]
) -> ImportReport:
    """Write cards of lading's own and the contents of checkpoints, in one transaction.

    A card of the same name from the same source is replaced. What an import of the cards warns of is logged.

    :raises CardFileError: another source has a card of the same name, or bases form a cycle; nothing was written.
    :raises CatalogError: the catalog cannot be written.
    """
    with database.session(write=True) as session:
        file = CardFile(
            source=ADDED, sha256="", cards=tuple(_in_order(session, entries)), architectures=(), problems=()
        )
        report = apply(session, [file] if entries else [], kind="import")
        for each in contents:
            write_checkpoint(session, each)
        link_by_uri(session)
    for warning in report.warnings:
        log.warning("%s", warning)

    return report


def _in_order(session: Session, entries: Sequence[CardEntry]) -> list[CardEntry]:
    """Return the entries with their places in the source: those that it has keep theirs, others come after them."""
    rows = session.execute(
        select(CardRow.name, CardRow.env, CardRow.position).join(CardRow.source).where(SourceRow.uri == ADDED)
    )
    places = {(name, env): position for name, env, position in rows}
    last = max(places.values(), default=-1)

    placed = []
    for entry in entries:
        place = places.get((entry.name, entry.env))
        if place is None:
            place = last = last + 1
        placed.append(replace(entry, source=f"{ADDED}[{place}]"))

    return placed
