"""Values into the catalog: card files, the manifests of checkpoints, and what checks of files found."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sqlalchemy import Connection, delete, insert, select, update

from lading.card import path_uri, split_name, uri_path
from lading.catalog.apply import apply
from lading.catalog.database import Database
from lading.catalog.entries import dumps
from lading.catalog.manifests import forget_digests, read_manifest, same_tensors, write_tensors
from lading.catalog.merge import STDIN
from lading.catalog.provenance import now
from lading.catalog.records import ImportReport, LocalCopy, to_signed
from lading.catalog.refresh import card_files
from lading.catalog.rows import link_by_uri
from lading.catalog.schema import CardCheckpointRow, CardRow, CheckpointRow, CopyRow, VerificationRow
from lading.filesystem import FileStat, place_id
from lading.manifest import Manifest
from lading.version import __version__

if TYPE_CHECKING:
    from lading.cardfile import CardFile

_log = logging.getLogger("lading")


# --- cards -----------------------------------------------------------------------------------------------------------


def collect(paths: Sequence[str | Path], *, stdin: BinaryIO | None = None) -> list[CardFile]:
    """Read card files; what is wrong in one is told by its ``problems``.

    :param paths: files (JSON Lines if they end in ``.jsonl``, else YAML), folders (their ``*.yaml``, ``*.yml`` and
        ``*.jsonl``, at any depth), or ``-`` for ``stdin``, whose first character tells which of the two it is.

    :raises FileNotFoundError: nothing is at a path, or no card file in a folder.
    :raises OSError: a file cannot be read.
    """
    from lading.cardfile import parse

    files: dict[str, CardFile] = {}  # a path that is given twice is read once
    for path in paths:
        if str(path) == "-":
            data = (stdin or sys.stdin.buffer).read()
            files[STDIN] = parse(data, source=STDIN, label=STDIN, json_lines=data.lstrip().startswith(b"{"))
            continue

        top = Path(path).expanduser().absolute()
        if not top.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        found = list(card_files(top))
        if not found:
            raise FileNotFoundError(errno.ENOENT, "The folder holds no card file (*.yaml, *.yml, *.jsonl)", str(path))
        for file in found:
            uri = path_uri(file)
            files[uri] = parse(
                file.read_bytes(),
                source=uri,
                folder=file.parent,
                label=file.name if file == top else file.relative_to(top).as_posix(),
                json_lines=file.suffix == ".jsonl",
            )

    return list(files.values())


class _DryRun(Exception):  # noqa: N818  (it is no error: it ends the transaction without a commit)
    def __init__(self, report: ImportReport) -> None:
        self.report = report


def import_files(
    database: Database,
    files: Sequence[CardFile],
    *,
    kind: str = "import",
    replace: bool = False,
    keep_going: bool = False,
    dry_run: bool = False,
) -> ImportReport:
    """Bring the catalog in line with card files, in one transaction.

    Importing the same file again changes what changed in it and removes what is gone from it. A name that another
    source states with the same content stays as it is. A base or a family that is not known is a warning, as files come
    in any order; bases that form a cycle are a problem.

    :param kind: ``import``, or ``user`` for files that are watched.
    :param replace: take over names that another source states otherwise, which else is a problem.
    :param keep_going: import what is right although something is wrong, and report the rest.
    :param dry_run: report, and change nothing.

    :raises CardFileError: something is wrong (``.problems``: all of it, in all files); nothing was changed.
    :raises CatalogError: the catalog cannot be written.
    """
    try:
        with database.write() as connection:
            report = apply(
                connection, files, kind=kind, replace=replace, keep_going=keep_going, stats=_unchanged_since_read(files)
            )
            if dry_run:
                raise _DryRun(report)
    except _DryRun as done:
        return done.report

    return report


def _unchanged_since_read(files: Iterable[CardFile]) -> dict[str, FileStat]:
    """The states of files whose content is still what was read: only that may be recorded beside the content."""
    stats: dict[str, FileStat] = {}
    for file in files:
        path = uri_path(file.source)
        try:
            if path is not None:
                stat = FileStat.from_stat(os.stat(path))
                if hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256:
                    stats[file.source] = stat
        except OSError:
            continue

    return stats


# --- checkpoints -----------------------------------------------------------------------------------------------------


def record_checkpoint(
    database: Database,
    *,
    uri: str,
    manifest: Manifest,
    copies: Sequence[LocalCopy],
    revision: str = "",
    card_name: str | None = None,
) -> None:
    """Write what a checkpoint holds and where its files are; it replaces what was known of ``uri``.

    Copies that other machines recorded stay known as long as the files are the same, and digests of tensors as long as
    the bytes are sure to be. Where the catalog cannot be written, nothing is done but to log it: no load needs it.

    :param uri: of the checkpoint, all that tells it from another included.
    :param copies: the files on this machine: shards and, where there is one, the index file.
    :param card_name: the card that the checkpoint was loaded for, which is linked to it.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    if not database.writable:
        _log.info("the manifest of %s is not kept, as the catalog %s cannot be written", uri, database.target)
        return

    values = {
        "revision": revision,
        "format": manifest.format,
        "bytes": manifest.total_bytes,
        "parameters": manifest.parameters,
        "dtypes": ",".join(manifest.dtype_counts),
        "tensors": len(manifest),
        "index_name": manifest.index_name,
        "metadata_": dumps(dict(manifest.metadata)),
        "indexed_at": now(),
        "version": __version__,
    }
    with database.write() as connection:
        known, known_revision = connection.execute(
            select(CheckpointRow.id, CheckpointRow.revision).where(CheckpointRow.uri == uri)
        ).one_or_none() or (None, "")
        old = None if known is None else read_manifest(connection, known)
        if known is None:
            connection.execute(insert(CheckpointRow).values(uri=uri, **values))
            known = connection.scalars(select(CheckpointRow.id).where(CheckpointRow.uri == uri)).one()
        else:
            connection.execute(update(CheckpointRow).where(CheckpointRow.id == known).values(**values))
        if old is None or not same_tensors(old, manifest):
            write_tensors(connection, known, manifest)
        elif not (
            # Equal tensors may hold other values: these are the three ways to know that they do not.
            all(shard.sha256 for shard in manifest.shards)
            or (revision and revision == known_revision)
            or (copies and _are_known(connection, known, copies))
        ):
            forget_digests(connection, known)

        same_files = old is not None and old.shards == manifest.shards and old.index_name == manifest.index_name
        _write_copies(connection, known, copies, keep_others=same_files)
        if card_name is not None:
            _link(connection, split_name(card_name)[0], known)
        link_by_uri(connection)


def _state(copy: LocalCopy) -> dict[str, object]:
    """Where a copy is, and the state that it is in."""
    return {
        "file": copy.file,
        "place": place_id(copy.path.parent),
        "path": str(copy.path),
        "size": copy.stat.size,
        "mtime_ns": copy.stat.mtime_ns,
        "ctime_ns": copy.stat.ctime_ns,
        "inode": to_signed(copy.stat.inode),
    }


def _are_known(connection: Connection, checkpoint_id: int, copies: Sequence[LocalCopy]) -> bool:
    """Whether these copies are recorded already, in the same state."""
    states = [_state(copy) for copy in copies]
    columns = [getattr(CopyRow, name) for name in states[0]]
    rows = connection.execute(select(*columns).where(CopyRow.checkpoint_id == checkpoint_id))

    return {tuple(state.values()) for state in states} <= set(map(tuple, rows))


def _write_copies(
    connection: Connection, checkpoint_id: int, copies: Sequence[LocalCopy], *, keep_others: bool
) -> None:
    rows = [
        {"checkpoint_id": checkpoint_id, **_state(copy), "recorded_at": now(), "verified_at": copy.verified_at}
        for copy in copies
    ]
    outdated = delete(CopyRow).where(CopyRow.checkpoint_id == checkpoint_id)
    if keep_others:
        outdated = outdated.where(CopyRow.place.in_({row["place"] for row in rows}))
    connection.execute(outdated)
    if rows:
        connection.execute(insert(CopyRow), rows)


def _link(connection: Connection, card_name: str, checkpoint_id: int) -> None:
    card_id = connection.scalar(select(CardRow.id).where(CardRow.name == card_name, CardRow.env == ""))
    if card_id is None:
        return

    connection.execute(delete(CardCheckpointRow).where(CardCheckpointRow.card_id == card_id))
    connection.execute(insert(CardCheckpointRow).values(card_id=card_id, checkpoint_id=checkpoint_id, linked_at=now()))


def record_verification(
    database: Database,
    *,
    uri: str,
    file: str,
    path: Path,
    stat: FileStat,
    method: str,
    expected: str | None,
    found: str | None,
) -> None:
    """Write that a file of a checkpoint was checked. Checks are only added; the last one decides what a copy is worth.

    Where the catalog cannot be written, nothing is done but to log it.

    :param file: its name within the checkpoint.
    :param stat: the state in which it was checked.
    :param method: such as ``sha256``.
    :param expected: the digest that was published or recorded.
    :param found: the digest of the file. The check succeeded if it is the expected one.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    if not database.writable:
        _log.info("the check of %s is not kept, as the catalog %s cannot be written", path, database.target)
        return

    match = expected is not None and expected == found
    with database.write() as connection:
        connection.execute(
            insert(VerificationRow).values(
                uri=uri,
                file=file,
                path=str(path),
                method=method,
                expected=expected,
                found=found,
                result="match" if match else "mismatch",
                version=__version__,
                at=now(),
            )
        )
        connection.execute(
            update(CopyRow)
            .where(
                CopyRow.checkpoint_id == select(CheckpointRow.id).where(CheckpointRow.uri == uri).scalar_subquery(),
                CopyRow.file == file,
                CopyRow.path == str(path),
                CopyRow.place == place_id(path.parent),
                CopyRow.size == stat.size,
                CopyRow.mtime_ns == stat.mtime_ns,
                CopyRow.ctime_ns == stat.ctime_ns,
                CopyRow.inode == to_signed(stat.inode),
            )
            .values(verified_at=now() if match else None)
        )
