"""The writes of an import.

They write cards and architectures in bulk, without an object for each row: imports of a million are ordinary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from lading.cards.card import ArchitectureEntry, CardEntry
from lading.catalog.database.statements import chunks, dumps
from lading.catalog.importing.changes import ImportPlan, StatedRow
from lading.catalog.importing.derived import COLUMNS, Entries, descendants, resolve_columns
from lading.catalog.links import link_by_uri
from lading.catalog.records import now
from lading.catalog.schema import ArchitectureRow, CardCheckpointRow, CardRow, FamilyRow, Row, SourceRow
from lading.catalog.search import index_new, reindexed
from lading.system.filesystem import FileStat
from lading.system.version import __version__

if TYPE_CHECKING:
    from lading.cards.card_file import CardFile

Values = dict[str, object]

_NOTHING: Values = {column.key: None for column in COLUMNS} | {"gated": 0}


def write_sources(
    session: Session,
    files: Sequence[CardFile],
    *,
    kind: str,
    problems: Mapping[str, Sequence[str]],
    stats: Mapping[str, FileStat],
) -> dict[str, int]:
    """Record the sources of the files and return their row numbers, by URI."""
    by_uri = {file.source: file for file in files}
    rows = {
        row.uri: row
        for piece in chunks(by_uri)
        for row in session.scalars(select(SourceRow).where(SourceRow.uri.in_(piece)))
    }
    for uri, file in by_uri.items():
        if uri not in rows:
            rows[uri] = SourceRow(uri=uri, kind=kind)
            session.add(rows[uri])
        row, stat = rows[uri], stats.get(uri)
        # A file in the user's own folder stays a user's file when it is imported by name.
        row.kind = "user" if row.kind == "user" else kind
        row.sha256 = file.sha256
        row.size = None if stat is None else stat.size
        row.mtime_ns = None if stat is None else stat.mtime_ns
        row.imported_at = now()
        row.version = __version__
        row.problems = "\n".join(problems[uri]) or None
    session.flush()

    return {uri: row.id for uri, row in rows.items()}


def _insert(session: Session, row: type[Row], values: Sequence[Values]) -> None:
    # Without the option, SQLAlchemy writes rows that lack a value apart from the rest.
    session.execute(insert(row), values, execution_options={"render_nulls": True})


def write_architectures(session: Session, decision: ImportPlan, sources: Mapping[str, int]) -> None:
    """Apply ``decision`` to the rows of architectures."""
    write_families(session, {claim.key[0] for claim in decision.written()})

    for row in decision.removed:
        session.execute(
            delete(ArchitectureRow).where(ArchitectureRow.family == row.key[0], ArchitectureRow.name == row.key[1])
        )
    if decision.added:
        _insert(session, ArchitectureRow, [_architecture(claim, sources) for claim in decision.added])
    updated = [_architecture(claim, sources) for _, claim in (*decision.changed, *decision.moved)]
    if updated:
        session.execute(update(ArchitectureRow), updated)


def _architecture(claim: StatedRow, sources: Mapping[str, int]) -> Values:
    assert isinstance(claim.entry, ArchitectureEntry)

    return {
        "family": claim.key[0],
        "name": claim.key[1],
        "base": claim.entry.base,
        "config": dumps(dict(claim.entry.config)),
        "source_id": sources[claim.uri],
        "position": claim.position,
    }


def write_cards(session: Session, decision: ImportPlan, sources: Mapping[str, int], entries: Entries) -> None:
    """Apply ``decision`` to the rows of cards, and update the resolved values of the cards based on them.

    :param entries: the cards that change, and their bases.
    """
    removed = {row.key[0] for row in decision.removed if not row.key[1]}
    written = {claim.key[0] for claim in decision.touched() if not claim.key[1]}
    heirs = descendants(session, written | removed) - written - removed
    entries.load(heirs)

    for ids in chunks(row.row_id for row in decision.removed):
        session.execute(delete(CardRow).where(CardRow.id.in_(ids)))

    last = session.scalar(select(func.max(CardRow.id))) or 0
    for claims in chunks(decision.added):
        values = [_card(claim, sources, entries) for claim in claims]
        write_families(session, {family for row in values if isinstance(family := row["family"], str)})
        _insert(session, CardRow, values)
    index_new(session.connection(), last)

    for changes in chunks([*decision.changed, *decision.moved]):
        _update(session, [{"id": row.row_id} | _card(claim, sources, entries) for row, claim in changes])
    for names in chunks(heirs):
        found = session.execute(select(CardRow.id, CardRow.name).where(CardRow.env == "", CardRow.name.in_(names)))
        _update(
            session,
            [
                {"id": row_id, **resolve_columns(entry, entries)}
                for row_id, name in found.all()
                if (entry := entries.get(name)) is not None
            ],
        )

    if written or heirs:
        link_by_uri(session)


def _card(claim: StatedRow, sources: Mapping[str, int], entries: Entries) -> Values:
    entry = claim.entry
    assert isinstance(entry, CardEntry)

    return {
        "name": entry.name,
        "env": entry.env,
        "metadata_": claim.text,
        "source_id": sources[claim.uri],
        "position": claim.position,
        "folder": claim.folder,
        **(_NOTHING if entry.env else resolve_columns(entry, entries)),
    }


def _update(session: Session, rows: list[Values]) -> None:
    """Update cards by their ``id``; all rows have the same columns."""
    if not rows:
        return

    _unlink_moved(session, rows)
    write_families(session, {family for row in rows if isinstance(family := row["family"], str)})
    with reindexed(session.connection(), [row["id"] for row in rows]):
        session.execute(update(CardRow), rows)


def _unlink_moved(session: Session, rows: Sequence[Values]) -> None:
    """Unlink cards that now name another checkpoint from the one that they were loaded from."""
    new = {row["id"]: (row["checkpoint_uri"], row["checkpoint_path"]) for row in rows}
    linked = session.execute(
        select(CardRow.id, CardRow.checkpoint_uri, CardRow.checkpoint_path)
        .join(CardRow.link)
        .where(CardRow.id.in_(new))
    )
    stale = [row_id for row_id, uri, path in linked if (uri, path) != new[row_id]]
    session.execute(delete(CardCheckpointRow).where(CardCheckpointRow.card_id.in_(stale)))


def write_families(session: Session, names: Collection[str]) -> None:
    """Add missing families as unregistered ones."""
    missing = set(names)
    for piece in chunks(names):
        missing -= set(session.scalars(select(FamilyRow.name).where(FamilyRow.name.in_(piece))))
    if missing:
        session.add_all(FamilyRow(name=name, entry_point=None) for name in sorted(missing))


def forget(session: Session, sources: Collection[str]) -> None:
    """Delete sources that no longer exist, and families that nothing registers or names any more."""
    for piece in chunks(sources):
        session.execute(delete(SourceRow).where(SourceRow.uri.in_(piece)))

    session.execute(
        delete(FamilyRow).where(
            FamilyRow.entry_point.is_(None),
            ~FamilyRow.cards.any(),
            ~FamilyRow.architectures.any(),
        )
    )


def forget_empty(session: Session, sources: Collection[str]) -> None:
    """Delete those of these sources that have no rows any more."""
    for piece in chunks(sources):
        session.execute(
            delete(SourceRow).where(
                SourceRow.uri.in_(piece),
                ~SourceRow.cards.any(),
                ~SourceRow.architectures.any(),
            )
        )


def ask_again(session: Session, *, but: Collection[int], seeds: bool, all_users: bool) -> None:
    """Mark sources to be read again, as a changed or withdrawn row may have hidden theirs.

    :param but: the rows of the sources that were just read.
    :param seeds: also the package's own files.
    :param all_users: all watched files, not only those with documents that could not be imported.
    """
    unknown: Values = {"sha256": None, "size": None, "mtime_ns": None}
    if seeds:
        session.execute(update(SourceRow).where(SourceRow.kind == "seed").values(unknown))
    users = select(SourceRow.id).where(SourceRow.kind == "user")
    if not all_users:
        users = users.where(SourceRow.problems.is_not(None))
    for ids in chunks(set(session.scalars(users)) - set(but)):
        session.execute(update(SourceRow).where(SourceRow.id.in_(ids)).values(unknown))
