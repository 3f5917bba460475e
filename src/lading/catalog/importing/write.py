"""Decisions into rows, in bulk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from sqlalchemy import Connection, bindparam, delete, exists, func, insert, select, update

from lading.cards.card import ArchitectureEntry, CardEntry
from lading.catalog import search
from lading.catalog.database.statements import chunks, dumps
from lading.catalog.importing.changes import ImportPlan, StatedRow
from lading.catalog.importing.derived import COLUMNS, Entries, descendants, resolve_columns
from lading.catalog.links import link_by_uri
from lading.catalog.records import now
from lading.catalog.schema import ArchitectureRow, CardCheckpointRow, CardRow, FamilyRow, SourceRow
from lading.system.filesystem import FileStat
from lading.system.version import __version__

if TYPE_CHECKING:
    from lading.cards.card_file import CardFile

Values = dict[str, object]

_NOTHING: Values = {column.key: None for column in COLUMNS} | {"gated": 0}


def write_sources(
    connection: Connection,
    files: Sequence[CardFile],
    *,
    kind: str,
    problems: Mapping[str, Sequence[str]],
    stats: Mapping[str, FileStat],
) -> dict[str, int]:
    """Record where the files come from; their row numbers, by URI."""
    if not files:
        return {}

    there = {
        row.uri: row
        for piece in chunks(file.source for file in files)
        for row in connection.execute(
            select(SourceRow.id, SourceRow.uri, SourceRow.kind).where(SourceRow.uri.in_(piece))
        )
    }
    added, changed = [], []
    for file in {file.source: file for file in files}.values():
        row, stat = there.get(file.source), stats.get(file.source)
        values = {
            "uri": file.source,
            # A file in the user's own folder stays one when it is imported by name.
            "kind": "user" if row is not None and row.kind == "user" else kind,
            "sha256": file.sha256,
            "size": None if stat is None else stat.size,
            "mtime_ns": None if stat is None else stat.mtime_ns,
            "imported_at": now(),
            "version": __version__,
            "problems": "\n".join(problems[file.source]) or None,
        }
        if row is None:
            added.append(values)
        else:
            changed.append(values | {"row_id": row.id})
    if added:
        connection.execute(insert(SourceRow), added)
    if changed:
        columns: Values = {name: bindparam(name) for name in changed[0] if name not in ("row_id", "uri")}
        connection.execute(update(SourceRow).where(SourceRow.id == bindparam("row_id")).values(columns), changed)

    return {
        uri: row_id
        for piece in chunks(file.source for file in files)
        for row_id, uri in connection.execute(select(SourceRow.id, SourceRow.uri).where(SourceRow.uri.in_(piece)))
    }


def write_architectures(connection: Connection, decision: ImportPlan, sources: Mapping[str, int]) -> None:
    """Make the rows of architectures what ``decision`` says."""
    write_families(connection, {claim.key[0] for claim in decision.written()})
    at = (ArchitectureRow.family == bindparam("of_family"), ArchitectureRow.name == bindparam("of_name"))

    if decision.removed:
        keys = [{"of_family": row.key[0], "of_name": row.key[1]} for row in decision.removed]
        connection.execute(delete(ArchitectureRow).where(*at), keys)
    if decision.added:
        connection.execute(insert(ArchitectureRow), [_architecture(claim, sources) for claim in decision.added])

    updated = [claim for _, claim in (*decision.changed, *decision.moved)]
    if updated:
        values = [
            {"of_family": c.key[0], "of_name": c.key[1]} | {f"new_{k}": v for k, v in _architecture(c, sources).items()}
            for c in updated
        ]
        columns: Values = {name: bindparam(f"new_{name}") for name in _architecture(updated[0], sources)}
        connection.execute(update(ArchitectureRow).where(*at).values(columns), values)


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


def write_cards(connection: Connection, decision: ImportPlan, sources: Mapping[str, int], entries: Entries) -> None:
    """Make the rows of cards what ``decision`` says, and bring up to date what the cards based on them resolve to.

    :param entries: holds the cards that change, and their bases.
    """
    removed = {row.key[0] for row in decision.removed if not row.key[1]}
    written = {claim.key[0] for claim in decision.touched() if not claim.key[1]}
    heirs = descendants(connection, written | removed) - written - removed
    entries.load(heirs)

    for ids in chunks(row.row_id for row in decision.removed):
        connection.execute(delete(CardRow).where(CardRow.id.in_(ids)))

    last = connection.scalar(select(func.max(CardRow.id))) or 0
    for claims in chunks(decision.added):
        values = [_card(claim, sources, entries) for claim in claims]
        write_families(connection, {family for row in values if isinstance(family := row["family"], str)})
        connection.execute(insert(CardRow), values)
    search.index_new(connection, last)

    for changes in chunks([*decision.changed, *decision.moved]):
        _update(connection, [{"row_id": row.row_id} | _card(claim, sources, entries) for row, claim in changes])
    for names in chunks(heirs):
        found = connection.execute(select(CardRow.id, CardRow.name).where(CardRow.env == "", CardRow.name.in_(names)))
        _update(
            connection,
            [
                {"row_id": row_id, **resolve_columns(entry, entries)}
                for row_id, name in found.all()
                if (entry := entries.get(name)) is not None
            ],
        )

    if written or heirs:
        link_by_uri(connection)


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


def _update(connection: Connection, rows: list[Values]) -> None:
    """Update cards by ``row_id``; all rows have the same columns."""
    if not rows:
        return

    columns: Values = {name: bindparam(f"new_{name}") for name in rows[0] if name != "row_id"}
    statement = update(CardRow).where(CardRow.id == bindparam("new_row_id")).values(columns)
    values = [{f"new_{name}": value for name, value in row.items()} for row in rows]

    _unlink_moved(connection, rows)
    write_families(connection, {family for row in rows if isinstance(family := row["family"], str)})
    with search.reindexed(connection, [row["row_id"] for row in rows]):
        connection.execute(statement, values)


def _unlink_moved(connection: Connection, rows: Sequence[Values]) -> None:
    """A card that is to name another checkpoint is no longer linked to the one that it was loaded from."""
    new = {row["row_id"]: (row["checkpoint_uri"], row["checkpoint_path"]) for row in rows}
    linked = connection.execute(
        select(CardRow.id, CardRow.checkpoint_uri, CardRow.checkpoint_path)
        .join_from(CardRow, CardCheckpointRow, CardRow.id == CardCheckpointRow.card_id)
        .where(CardRow.id.in_(new))
    )
    stale = [row_id for row_id, uri, path in linked if (uri, path) != new[row_id]]
    connection.execute(delete(CardCheckpointRow).where(CardCheckpointRow.card_id.in_(stale)))


def write_families(connection: Connection, names: Collection[str]) -> None:
    """Add the families that are not there yet, as ones that nothing registers."""
    missing = set(names)
    for piece in chunks(names):
        missing -= set(connection.scalars(select(FamilyRow.name).where(FamilyRow.name.in_(piece))))
    if missing:
        connection.execute(insert(FamilyRow), [{"name": name, "entry_point": None} for name in sorted(missing)])


def forget(connection: Connection, sources: Collection[str]) -> None:
    """Drop sources that are no more, and families that nothing registers or names any longer."""
    for piece in chunks(sources):
        connection.execute(delete(SourceRow).where(SourceRow.uri.in_(piece)))

    connection.execute(
        delete(FamilyRow).where(
            FamilyRow.entry_point.is_(None),
            ~exists().where(CardRow.family == FamilyRow.name),
            ~exists().where(ArchitectureRow.family == FamilyRow.name),
        )
    )


def forget_empty(connection: Connection, sources: Collection[str]) -> None:
    """Drop those of these sources that state nothing any longer."""
    for piece in chunks(sources):
        connection.execute(
            delete(SourceRow).where(
                SourceRow.uri.in_(piece),
                ~exists().where(CardRow.source_id == SourceRow.id),
                ~exists().where(ArchitectureRow.source_id == SourceRow.id),
            )
        )


def ask_again(connection: Connection, *, but: Collection[int], seeds: bool, all_users: bool) -> None:
    """Have sources read again, as what changed or was withdrawn may have hidden what they state.

    :param but: the rows of the sources that were just read.
    :param seeds: also the package's own files.
    :param all_users: all files that are watched, not only those of which something could not be imported.
    """
    unknown: Values = {"sha256": None, "size": None, "mtime_ns": None}
    if seeds:
        connection.execute(update(SourceRow).where(SourceRow.kind == "seed").values(unknown))
    users = select(SourceRow.id).where(SourceRow.kind == "user")
    if not all_users:
        users = users.where(SourceRow.problems.is_not(None))
    for ids in chunks(set(connection.scalars(users)) - set(but)):
        connection.execute(update(SourceRow).where(SourceRow.id.in_(ids)).values(unknown))
