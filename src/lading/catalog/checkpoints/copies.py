"""The local copies of a checkpoint's files: their rows and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sqlalchemy import ColumnElement, and_, select, true, tuple_
from sqlalchemy.orm import Session, make_transient

from lading.catalog.database.statements import chunks, intact
from lading.catalog.records import Check, CopyKind, LocalCopy, from_signed, now, to_signed
from lading.catalog.schema import CheckpointRow, CopyRow, ShardRow
from lading.system.filesystem import FileStat, location_id


def copies_of(checkpoint: CheckpointRow) -> list[LocalCopy]:
    """Return the copies of a checkpoint whose path leads to them from this machine."""
    return [copy for row in checkpoint.copies if (copy := _reachable(row)) is not None]


def all_copies(session: Session) -> dict[int, list[LocalCopy]]:
    """Return the copies of all checkpoints that this machine can reach, by the checkpoint's id."""
    found: dict[int, list[LocalCopy]] = {}
    for checkpoint_id, copy in _copies(session, true()):
        found.setdefault(checkpoint_id, []).append(copy)

    return found


def copies_with(session: Session, sha256: str) -> list[LocalCopy]:
    """Return the copies of all shards of this SHA-256 whose path leads to them from this machine."""
    shards = select(ShardRow.checkpoint_id, ShardRow.name).where(ShardRow.sha256 == sha256)

    return [copy for _, copy in _copies(session, tuple_(CopyRow.checkpoint_id, CopyRow.file).in_(shards))]


def copies_at(session: Session, path: Path) -> list[LocalCopy]:
    """Return the copies at ``path`` of this machine, one for each checkpoint that the file belongs to."""
    return [copy for _, copy in _copies(session, CopyRow.path == str(path))]


def _copies(session: Session, condition: ColumnElement[bool]) -> list[tuple[int, LocalCopy]]:
    rows = session.scalars(
        select(CopyRow).where(condition).order_by(CopyRow.checkpoint_id, CopyRow.file, CopyRow.place)
    )

    return [(row.checkpoint_id, copy) for row in rows if (copy := _reachable(row)) is not None]


def _reachable(row: CopyRow) -> LocalCopy | None:
    """Return the copy of a row; ``None`` for one of another machine."""
    with intact("a copy"):
        path = Path(row.path)
        if row.place != location_id(path.parent):
            return None
        stat = FileStat(row.size, row.mtime_ns, row.ctime_ns, from_signed(row.inode))

        return LocalCopy(file=row.file, path=path, stat=stat, verified_at=row.verified_at, kind=row.kind)


def write_copies(
    session: Session,
    checkpoint: CheckpointRow,
    copies: Sequence[LocalCopy],
    *,
    keep_others: bool,
    keep_verified: bool,
) -> None:
    """Replace all known copies of a checkpoint.

    :param keep_others: keep those of other machines.
    :param keep_verified: keep the verification of files that are in the state that was verified.
    """
    copies = _with_known_kinds(session, copies)
    if keep_verified:
        verified = {(c.file, c.path, c.stat): c.verified_at for c in copies_of(checkpoint)}
        copies = [replace(c, verified_at=c.verified_at or verified.get((c.file, c.path, c.stat))) for c in copies]
    outdated = CopyRow.checkpoint_id == checkpoint.id
    if keep_others:
        outdated &= CopyRow.place.in_({location_id(copy.path.parent) for copy in copies})
    _make_way(session, outdated, copies)
    _insert_copies(session, checkpoint, copies)


def replace_copies(session: Session, checkpoint: CheckpointRow, copies: Sequence[LocalCopy]) -> None:
    """Replace the copies of the same files on this machine."""
    copies = _with_known_kinds(session, copies)
    for copy in copies:
        outdated = and_(
            CopyRow.checkpoint_id == checkpoint.id,
            CopyRow.file.in_({copy.file, str(copy.path)}),
            CopyRow.place == location_id(copy.path.parent),
        )
        _make_way(session, outdated, copies)
    _insert_copies(session, checkpoint, copies)


def _make_way(session: Session, outdated: ColumnElement[bool], copies: Sequence[LocalCopy]) -> None:
    """Delete copies that others replace.

    After that, no checkpoint uses a file that lading fetched into the cache of the hub's client, but the cache keeps
    it. So the catalog keeps its path, like that of an extra file, and removes it with the rest.
    """
    new = {(str(copy.path), location_id(copy.path.parent)) for copy in copies}
    rows = session.scalars(select(CopyRow).where(outdated)).all()
    for row in rows:
        session.delete(row)
    session.flush()
    for row in rows:
        if (row.kind == "hub" or row.file == row.path) and (row.path, row.place) not in new:
            make_transient(row)
            row.file = row.path
            session.merge(row)
    session.flush()


_THEIRS_FIRST: tuple[CopyKind, ...] = ("source", "adopted", "hub", "cache")


def _with_known_kinds(session: Session, copies: Sequence[LocalCopy]) -> list[LocalCopy]:
    """Return the copies with their known kinds: a file in the same state still has the same owner.

    A file that lading does not own in one checkpoint, it owns in none, and must never remove for one of them.
    """
    known: dict[tuple[Path, FileStat], set[CopyKind]] = {}
    for paths in chunks(str(copy.path) for copy in copies):
        for _, copy in _copies(session, CopyRow.path.in_(paths)):
            known.setdefault((copy.path, copy.stat), set()).add(copy.kind)

    def kind_of(copy: LocalCopy) -> CopyKind:
        kinds = known.get((copy.path, copy.stat)) or {copy.kind}

        return next(kind for kind in _THEIRS_FIRST if kind in kinds)

    return [replace(copy, kind=kind_of(copy)) for copy in copies]


def _insert_copies(session: Session, checkpoint: CheckpointRow, copies: Sequence[LocalCopy]) -> None:
    session.add_all(
        CopyRow(
            checkpoint_id=checkpoint.id,
            file=copy.file,
            place=location_id(copy.path.parent),
            path=str(copy.path),
            size=copy.stat.size,
            mtime_ns=copy.stat.mtime_ns,
            ctime_ns=copy.stat.ctime_ns,
            inode=to_signed(copy.stat.inode),
            recorded_at=now(),
            verified_at=copy.verified_at,
            kind=copy.kind,
        )
        for copy in copies
    )
    session.flush()
    session.expire(checkpoint, ["copies"])


def same_copy(checkpoint_id: int, copy: LocalCopy | Check) -> ColumnElement[bool]:
    """Return the condition that a row is of this copy, in this state."""
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


def all_verified(session: Session, checkpoint: CheckpointRow, copies: Sequence[LocalCopy]) -> bool:
    """Return whether each copy was verified in just the state that it is in."""
    return all(
        session.scalar(select(CopyRow.verified_at).where(same_copy(checkpoint.id, copy))) is not None for copy in copies
    )
