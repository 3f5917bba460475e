"""Where the files of a checkpoint are: rows of copies, and the values that they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, or_, select, true, tuple_

from lading.catalog.database.statements import chunks, intact
from lading.catalog.records import Check, CopyKind, LocalCopy, from_signed, now, to_signed
from lading.catalog.schema import COPIES, SHARDS, CopyRow
from lading.system.filesystem import FileStat, location_id


def copies_of(connection: Connection, checkpoint_id: int) -> list[LocalCopy]:
    """The copies of a checkpoint that can be reached from this machine by their path."""
    return [copy for _, copy in _reachable(connection, COPIES.c.checkpoint_id == checkpoint_id)]


def all_copies(connection: Connection) -> dict[int, list[LocalCopy]]:
    """The copies of all checkpoints that can be reached from this machine by their path, by the checkpoint's id."""
    found: dict[int, list[LocalCopy]] = {}
    for checkpoint_id, copy in _reachable(connection, true()):
        found.setdefault(checkpoint_id, []).append(copy)

    return found


def copies_with(connection: Connection, sha256: str) -> list[LocalCopy]:
    """The copies of all shards of this SHA-256 that can be reached from this machine by their path."""
    shards = select(SHARDS.c.checkpoint_id, SHARDS.c.name).where(SHARDS.c.sha256 == sha256)

    return [copy for _, copy in _reachable(connection, tuple_(COPIES.c.checkpoint_id, COPIES.c.file).in_(shards))]


def copies_at(connection: Connection, path: Path) -> list[LocalCopy]:
    """What is known of the file at ``path`` of this machine, by each checkpoint that it is of."""
    return [copy for _, copy in _reachable(connection, COPIES.c.path == str(path))]


def _reachable(connection: Connection, condition: ColumnElement[bool]) -> list[tuple[int, LocalCopy]]:
    rows = connection.execute(
        select(
            COPIES.c.checkpoint_id,
            COPIES.c.file,
            COPIES.c.place,
            COPIES.c.path,
            COPIES.c.size,
            COPIES.c.mtime_ns,
            COPIES.c.ctime_ns,
            COPIES.c.inode,
            COPIES.c.verified_at,
            COPIES.c.kind,
        )
        .where(condition)
        .order_by(COPIES.c.checkpoint_id, COPIES.c.file, COPIES.c.place)
    )
    found = []
    with intact("a copy"):
        for checkpoint_id, file, place, name, size, mtime_ns, ctime_ns, inode, verified_at, kind in rows:
            path = Path(name)
            if place == location_id(path.parent):
                stat = FileStat(size, mtime_ns, ctime_ns, from_signed(inode))
                copy = LocalCopy(file=file, path=path, stat=stat, verified_at=verified_at, kind=kind)
                found.append((checkpoint_id, copy))

    return found


def write_copies(
    connection: Connection,
    checkpoint_id: int,
    copies: Sequence[LocalCopy],
    *,
    keep_others: bool,
    keep_verified: bool,
) -> None:
    """Write copies in place of all that are known.

    :param keep_others: keep those of other machines.
    :param keep_verified: what was verified in just the state that it is in stays so.
    """
    copies = _with_known_kinds(connection, copies)
    if keep_verified:
        verified = {(c.file, c.path, c.stat): c.verified_at for c in copies_of(connection, checkpoint_id)}
        copies = [replace(c, verified_at=c.verified_at or verified.get((c.file, c.path, c.stat))) for c in copies]
    outdated = CopyRow.checkpoint_id == checkpoint_id
    if keep_others:
        outdated &= CopyRow.place.in_({location_id(copy.path.parent) for copy in copies})
    _make_way(connection, outdated, copies)
    _insert_copies(connection, checkpoint_id, copies)


def replace_copies(connection: Connection, checkpoint_id: int, copies: Sequence[LocalCopy]) -> None:
    """Write copies in place of those of the same files on this machine."""
    copies = _with_known_kinds(connection, copies)
    for copy in copies:
        outdated = and_(
            CopyRow.checkpoint_id == checkpoint_id,
            CopyRow.file.in_({copy.file, str(copy.path)}),
            CopyRow.place == location_id(copy.path.parent),
        )
        _make_way(connection, outdated, copies)
    _insert_copies(connection, checkpoint_id, copies)


def _make_way(connection: Connection, outdated: ColumnElement[bool], copies: Sequence[LocalCopy]) -> None:
    """Delete copies that others take the place of.

    What lading brought into the cache of the hub's client is of use to no checkpoint then, and that cache keeps it. So
    it stays known, by its path, as what came along does; it is removed with the rest.
    """
    rows = connection.execute(
        select(COPIES).where(outdated, or_(COPIES.c.kind == "hub", COPIES.c.file == COPIES.c.path))
    ).mappings()
    new = {(str(copy.path), location_id(copy.path.parent)) for copy in copies}
    left = {(row["path"], row["place"]): {**row, "file": row["path"]} for row in rows}
    left = {key: row for key, row in left.items() if key not in new}

    connection.execute(delete(CopyRow).where(outdated))
    for (path, place), row in left.items():
        same = and_(CopyRow.checkpoint_id == row["checkpoint_id"], CopyRow.file == path, CopyRow.place == place)
        connection.execute(delete(CopyRow).where(same))
    if left:
        connection.execute(insert(CopyRow), list(left.values()))


_THEIRS_FIRST: tuple[CopyKind, ...] = ("source", "adopted", "hub", "cache")


def _with_known_kinds(connection: Connection, copies: Sequence[LocalCopy]) -> list[LocalCopy]:
    """The copies with the kinds that are known of them: a file that looks as it did is whose it was.

    What is not lading's in one checkpoint is so in all: it must never be removed for one of them.
    """
    known: dict[tuple[Path, FileStat], set[CopyKind]] = {}
    for paths in chunks(str(copy.path) for copy in copies):
        for _, copy in _reachable(connection, COPIES.c.path.in_(paths)):
            known.setdefault((copy.path, copy.stat), set()).add(copy.kind)

    def kind_of(copy: LocalCopy) -> CopyKind:
        kinds = known.get((copy.path, copy.stat)) or {copy.kind}

        return next(kind for kind in _THEIRS_FIRST if kind in kinds)

    return [replace(copy, kind=kind_of(copy)) for copy in copies]


def _insert_copies(connection: Connection, checkpoint_id: int, copies: Sequence[LocalCopy]) -> None:
    rows = [
        {
            "checkpoint_id": checkpoint_id,
            "file": copy.file,
            "place": location_id(copy.path.parent),
            "path": str(copy.path),
            "size": copy.stat.size,
            "mtime_ns": copy.stat.mtime_ns,
            "ctime_ns": copy.stat.ctime_ns,
            "inode": to_signed(copy.stat.inode),
            "recorded_at": now(),
            "verified_at": copy.verified_at,
            "kind": copy.kind,
        }
        for copy in copies
    ]
    if rows:
        connection.execute(insert(CopyRow), rows)


def same_copy(checkpoint_id: int, copy: LocalCopy | Check) -> ColumnElement[bool]:
    """The condition that a row is of this copy, in this state."""
    return and_(
        CopyRow.checkpoint_id == checkpoint_id,
        CopyRow.file == copy.file,
        CopyRow.path == str(copy.path),
        CopyRow.place == location_id(copy.path.parent),
        CopyRow.size == copy.stat.size,
        CopyRow.mtime_ns == copy.stat.mtime_ns,
        CopyRow.ctime_ns == copy.stat.ctime_ns,
        CopyRow.inode == to_signed(copy.stat.inode),
    )


def all_verified(connection: Connection, checkpoint_id: int, copies: Sequence[LocalCopy]) -> bool:
    """Whether each copy was verified in just the state that it is in."""
    return all(
        connection.scalar(select(CopyRow.verified_at).where(same_copy(checkpoint_id, copy))) is not None
        for copy in copies
    )
