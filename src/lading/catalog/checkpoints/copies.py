"""The local copies of a checkpoint's files: their rows and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Row, select, true, tuple_
from sqlalchemy.orm import Session, make_transient

from lading.catalog.database.statements import chunks, intact
from lading.catalog.records import CopyKind, LocalCopy, from_signed, now, to_signed
from lading.catalog.schema import COPIES, SHARDS, CheckpointRow, CopyRow
from lading.system.filesystem import FileStat, location_id, path_text, text_path

_R = TypeVar("_R", CopyRow, Row[Any])


def reachable(rows: Iterable[_R]) -> list[tuple[_R, LocalCopy]]:
    """Return the rows, mapped or of columns, whose path leads to the copy from this machine, each with its value."""
    with intact("a copy"):
        return [
            (
                row,
                LocalCopy(
                    file=row.file,
                    path=text_path(row.path),
                    stat=FileStat(row.size, row.mtime_ns, row.ctime_ns, from_signed(row.inode)),
                    verified_at=row.verified_at,
                    kind=row.kind,
                ),
            )
            for row in rows
            if row.place == location_id(text_path(row.path).parent)
        ]


def copies_of(checkpoint: CheckpointRow) -> list[LocalCopy]:
    """Return the copies of a checkpoint that this machine can reach."""
    return [copy for _, copy in reachable(checkpoint.copies)]


def all_copies(session: Session) -> dict[int, list[LocalCopy]]:
    """Return the copies of all checkpoints that this machine can reach, by the checkpoint's id."""
    found: dict[int, list[LocalCopy]] = {}
    for row, copy in _find(session, true()):
        found.setdefault(row.checkpoint_id, []).append(copy)

    return found


def copies_with(session: Session, sha256: str) -> list[LocalCopy]:
    """Return the copies of all shards of this SHA-256 that this machine can reach."""
    shards = select(SHARDS.c.checkpoint_id, SHARDS.c.name).where(SHARDS.c.sha256 == sha256)

    return [copy for _, copy in _find(session, tuple_(COPIES.c.checkpoint_id, COPIES.c.file).in_(shards))]


def copies_of_id(session: Session, checkpoint_id: int) -> list[LocalCopy]:
    """Return what :func:`copies_of` does, by the id of the checkpoint."""
    return [copy for _, copy in _find(session, COPIES.c.checkpoint_id == checkpoint_id)]


def copies_at(session: Session, path: Path) -> list[LocalCopy]:
    """Return the copies at ``path`` of this machine, one for each checkpoint that the file belongs to."""
    return [copy for _, copy in _find(session, COPIES.c.path == path_text(path))]


def _find(session: Session, condition: ColumnElement[bool]) -> list[tuple[Row[Any], LocalCopy]]:
    c = COPIES.c

    return reachable(session.execute(select(COPIES).where(condition).order_by(c.checkpoint_id, c.file, c.place)))


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
    copies = _unless_published(checkpoint, copies)
    if keep_verified:
        verified = {(c.file, c.path, c.stat): c.verified_at for c in copies_of(checkpoint)}
        copies = [replace(c, verified_at=c.verified_at or verified.get((c.file, c.path, c.stat))) for c in copies]
    places = {location_id(copy.path.parent) for copy in copies}
    _replace(session, checkpoint, [row for row in checkpoint.copies if not keep_others or row.place in places], copies)


def replace_copies(session: Session, checkpoint: CheckpointRow, copies: Sequence[LocalCopy]) -> None:
    """Replace the copies of the same files on this machine."""
    copies = _unless_published(checkpoint, copies)
    same = {(name, location_id(copy.path.parent)) for copy in copies for name in (copy.file, path_text(copy.path))}
    _replace(session, checkpoint, [row for row in checkpoint.copies if (row.file, row.place) in same], copies)


def _unless_published(checkpoint: CheckpointRow, copies: Sequence[LocalCopy]) -> Sequence[LocalCopy]:
    """Return fetched copies as not verified if a card publishes digests: these are not compared by a download."""
    if checkpoint.digest_document is None:
        return copies
    shards = {shard.name for shard in checkpoint.shards}

    return [replace(copy, verified_at=None) if copy.file in shards else copy for copy in copies]


def _replace(
    session: Session, checkpoint: CheckpointRow, outdated: Sequence[CopyRow], copies: Sequence[LocalCopy]
) -> None:
    """Replace rows of a checkpoint with those of other copies.

    After that, no checkpoint uses a file that lading fetched into the cache of the hub's client, but the cache keeps
    it. So the catalog keeps its path, like that of an extra file, and removes it with the rest.
    """
    rows = [
        CopyRow(
            checkpoint_id=checkpoint.id,
            file=copy.file,
            place=location_id(copy.path.parent),
            path=path_text(copy.path),
            size=copy.stat.size,
            mtime_ns=copy.stat.mtime_ns,
            ctime_ns=copy.stat.ctime_ns,
            inode=to_signed(copy.stat.inode),
            recorded_at=now(),
            verified_at=copy.verified_at,
            kind=copy.kind,
        )
        for copy in _with_known_kinds(session, copies)
    ]
    new = {(row.path, row.place) for row in rows}
    for row in outdated:
        session.delete(row)
    session.flush()
    session.expire(checkpoint, ["copies"])
    for row in outdated:
        if (row.kind == "hub" or row.file == row.path) and (row.path, row.place) not in new:
            make_transient(row)
            row.file = row.path
            session.merge(row)
    session.flush()
    session.add_all(rows)
    session.flush()


_THEIRS_FIRST: tuple[CopyKind, ...] = ("source", "adopted", "hub", "cache")


def _with_known_kinds(session: Session, copies: Sequence[LocalCopy]) -> list[LocalCopy]:
    """Return the copies with their known kinds: a file in the same state still has the same owner.

    A file that lading does not own in one checkpoint, it owns in none, and must never remove for one of them.
    """
    known: dict[tuple[Path, FileStat], set[CopyKind]] = {}
    for paths in chunks(path_text(copy.path) for copy in copies):
        for _, copy in _find(session, COPIES.c.path.in_(paths)):
            known.setdefault((copy.path, copy.stat), set()).add(copy.kind)

    def kind_of(copy: LocalCopy) -> CopyKind:
        kinds = known.get((copy.path, copy.stat)) or {copy.kind}

        return next(kind for kind in _THEIRS_FIRST if kind in kinds)

    return [replace(copy, kind=kind_of(copy)) for copy in copies]
