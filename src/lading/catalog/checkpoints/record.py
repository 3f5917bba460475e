"""What is known of checkpoints, into the catalog: what they hold, where their files are, what checks of them found."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sqlalchemy import Connection, insert, select, update

from lading.cards.card import split_name
from lading.catalog.checkpoints.copies import all_verified, copies_of, replace_copies, same_copy, write_copies
from lading.catalog.checkpoints.manifests import (
    forget_digests,
    read_manifest,
    same_tensors,
    write_digests,
    write_tensors,
)
from lading.catalog.database.database import Database
from lading.catalog.database.statements import dumps
from lading.catalog.links import link_by_uri, link_card
from lading.catalog.records import HEADER, Check, LocalCopy, now
from lading.catalog.schema import CheckpointRow, CopyRow, ShardRow, VerificationRow
from lading.formats.digests import Digests
from lading.formats.manifest import Manifest
from lading.system.uris import shown_uri
from lading.system.version import __version__

_log = logging.getLogger("lading")


def record_checkpoint(
    database: Database,
    *,
    uri: str,
    manifest: Manifest,
    copies: Sequence[LocalCopy],
    revision: str = "",
    card_name: str | None = None,
    accept: bool = False,
) -> None:
    """Write what a checkpoint holds and where its files are; it replaces what was known of ``uri``.

    Copies that other machines recorded stay known as long as the files are the same, and so do digests as long as the
    tensors are. Where the catalog cannot be written, nothing is done but to log it: no load needs it.

    :param uri: of the checkpoint, all that tells it from another included.
    :param copies: the files on this machine: shards and, where there is one, the index file.
    :param card_name: the card that the checkpoint was loaded for, which is linked to it.
    :param accept: take the files as they are now for the right ones: what was recorded of others' bytes is forgotten.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    if not _writable(database, f"the manifest of {shown_uri(uri)}"):
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
        same = old is not None and same_tensors(old, manifest)
        if not same:
            write_tensors(connection, known, manifest)
        elif _may_differ(
            connection, known, manifest, copies, same_revision=bool(revision) and revision == known_revision
        ) and (accept or not copies):
            forget_digests(connection, known)

        same_files = old is not None and old.index_name == manifest.index_name and old.has_files_of(manifest)
        write_copies(connection, known, copies, keep_others=same_files, keep_verified=same)
        if card_name is not None:
            link_card(connection, split_name(card_name)[0], known)
        link_by_uri(connection)


def _may_differ(
    connection: Connection, checkpoint_id: int, manifest: Manifest, copies: Sequence[LocalCopy], *, same_revision: bool
) -> bool:
    """Whether the same tensors may hold other values than before: nothing tells that they do not."""
    if same_revision or all(shard.sha256 for shard in manifest.shards):
        return False

    # A load that found other bytes has recorded the files as they are, too; only what was verified is known to be good.
    return not copies or not all_verified(connection, checkpoint_id, copies)


def record_files(
    database: Database, *, uri: str, copies: Sequence[LocalCopy] = (), checks: Sequence[Check] = ()
) -> None:
    """Write where files of a checkpoint are, and what checks of them found, in one transaction.

    Checks are only added; the last one decides what a copy is worth. The SHA-256 of a file that had none is recorded
    with it, and holds from then on. Where the catalog cannot be written, nothing is done but to log it.

    :param copies: take the place of what was known of the same files on this machine.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    if not _writable(database, f"what is known of the files of {shown_uri(uri)}"):
        return

    with database.write() as connection:
        checkpoint_id = connection.scalar(select(CheckpointRow.id).where(CheckpointRow.uri == uri))
        if checkpoint_id is not None and copies:
            replace_copies(connection, checkpoint_id, copies)
        for check in checks:
            _write_check(connection, uri, checkpoint_id, check)


def record_companions(database: Database, *, uri: str, copies: Sequence[LocalCopy]) -> None:
    """Write which files came along with a checkpoint, each under its path; none is one that tensors are read from.

    Where all are known as they are, nothing is written. Raises what :func:`record_files` does.
    """
    with database.read() as connection:
        checkpoint_id = connection.scalar(select(CheckpointRow.id).where(CheckpointRow.uri == uri))
        known = () if checkpoint_id is None else copies_of(connection, checkpoint_id)
        if checkpoint_id is None or {(c.path, c.stat) for c in copies} <= {(c.path, c.stat) for c in known}:
            return

    record_files(database, uri=uri, copies=copies)


def recorded_headers(database: Database, uri: str) -> dict[str, str]:
    """Return the digest of the header of each file of a checkpoint, as it was recorded last, by the file's name."""
    row = VerificationRow
    with database.read() as connection:
        found = connection.execute(
            select(row.file, row.found)
            .where(row.uri == uri, row.method == HEADER, row.result == "recorded", row.found.is_not(None))
            .order_by(row.id)
        )
        return {str(file): str(digest) for file, digest in found}


def record_digests(database: Database, *, uri: str, manifest: Manifest, digests: Digests) -> None:
    """Write the digests of a checkpoint's tensors, unless the catalog knows other tensors of it by now.

    Where the catalog cannot be written, nothing is done but to log it.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    if not _writable(database, f"the digests of {shown_uri(uri)}"):
        return

    with database.write() as connection:
        known = connection.scalar(select(CheckpointRow.id).where(CheckpointRow.uri == uri))
        if known is not None and read_manifest(connection, known).tensors_equal(manifest):
            write_digests(connection, known, manifest, digests)


def _writable(database: Database, what: str) -> bool:
    if not database.writable:
        _log.info("%s is not kept, as the catalog %s cannot be written", what, database.target)

    return database.writable


def _write_check(connection: Connection, uri: str, checkpoint_id: int | None, check: Check) -> None:
    connection.execute(
        insert(VerificationRow).values(
            uri=uri,
            file=check.file,
            path=str(check.path),
            method=check.method,
            expected=check.expected,
            found=check.found,
            result=check.result,
            version=__version__,
            at=now(),
        )
    )
    if checkpoint_id is None:
        return

    good = check.result != "mismatch"
    if good and check.method == HEADER:
        return  # it is a part of the file only
    connection.execute(
        update(CopyRow).where(same_copy(checkpoint_id, check)).values(verified_at=now() if good else None)
    )
    if good and check.method == "sha256":
        connection.execute(
            update(ShardRow)
            .where(ShardRow.checkpoint_id == checkpoint_id, ShardRow.name == check.file, ShardRow.sha256.is_(None))
            .values(sha256=check.found)
        )
