"""Records of checkpoints in the catalog: their manifests, copies and checks."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from lading.catalog.checkpoints.copies import copies_of, reachable, replace_copies, write_copies
from lading.catalog.checkpoints.manifests import (
    find_checkpoint,
    forget_digests,
    forget_file_digests,
    read_manifest,
    write_digests,
    write_tensors,
    write_validators,
)
from lading.catalog.database.database import Database
from lading.catalog.database.statements import dumps
from lading.catalog.links import link_by_uri, link_cards
from lading.catalog.records import HEADER, Check, CheckpointContents, DigestDocument, LocalCopy, SourceCheck, now
from lading.catalog.schema import COPIES, CheckpointRow, VerificationRow
from lading.formats.digests import Digests
from lading.formats.manifest import Manifest
from lading.system.uris import shown_uri
from lading.system.version import __version__

_log = logging.getLogger("lading")


def record_checkpoint(database: Database, contents: CheckpointContents, *, cards: Collection[str] = ()) -> None:
    """Record the contents of a checkpoint, in place of earlier records of its URI.

    The catalog keeps copies that other machines recorded if the files are the same, and digests if the tensors are. If
    the catalog cannot be written, this only logs it: no load needs it.

    :param cards: the names of the cards whose models this checkpoint is; this links them.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    if not _writable(database, f"the manifest of {shown_uri(contents.uri)}"):
        return

    with database.session(write=True) as session:
        write_checkpoint(session, contents, cards=cards)
        link_by_uri(session)


def write_checkpoint(session: Session, contents: CheckpointContents, *, cards: Collection[str] = ()) -> None:
    """Do what :func:`record_checkpoint` does in the caller's transaction, which also links by URI."""
    row = None if contents.moved_from is None else find_checkpoint(session, contents.moved_from)
    if row is None or contents.moved_from == contents.uri:
        row = _write_contents(session, contents)
    else:
        _move(session, row, contents)
    _write_checks(session, contents.uri, row, contents.checks)
    link_cards(session, cards, row)


def _write_contents(session: Session, contents: CheckpointContents) -> CheckpointRow:
    uri, manifest, copies, revision = contents.uri, contents.manifest, contents.copies, contents.revision
    row = find_checkpoint(session, uri)
    old = None if row is None else read_manifest(session, row)
    same_revision = row is not None and bool(revision) and revision == row.revision
    if row is None:
        row = CheckpointRow(uri=uri)
        session.add(row)
    _describe(row, manifest, revision)
    session.flush()

    same_files = old is not None and old.has_files_of(manifest)
    same = same_files and old is not None and old.tensors_equal(manifest)
    differ = (
        same and _may_differ(row, manifest, copies, same_revision=same_revision) and (contents.accept or not copies)
    )
    if not same or differ or (contents.accept and row.digest_document is not None):
        forget_digests(session, row.id)
        session.expire(row, ["digest_document"])
    if differ:
        forget_file_digests(session, row.id)
    if not same:
        write_tensors(session, row, manifest)
    write_validators(session, row.id, manifest)

    same_index = old is not None and old.index_name == manifest.index_name
    write_copies(session, row, copies, keep_others=same_files and same_index, keep_verified=same)

    return row


def _describe(row: CheckpointRow, manifest: Manifest, revision: str) -> None:
    """Set the columns of a checkpoint from its manifest."""
    row.revision = revision
    row.format = manifest.format
    row.bytes = manifest.total_bytes
    row.parameters = manifest.parameters
    row.dtypes = ",".join(manifest.dtype_counts)
    row.tensors = len(manifest)
    row.index_name = manifest.index_name
    row.metadata_ = dumps(dict(manifest.metadata))
    row.indexed_at = now()
    row.version = __version__


def _may_differ(row: CheckpointRow, manifest: Manifest, copies: Sequence[LocalCopy], *, same_revision: bool) -> bool:
    """Return whether the same tensors may have other values than before: nothing proves that they are equal."""
    if same_revision or all(shard.sha256 for shard in manifest.shards):
        return False

    # A load that found other bytes has recorded the files as they are, too; only verified files are known to be good.
    good = {(copy.file, copy.path, copy.stat) for copy in copies_of(row) if copy.verified_at is not None}

    return not copies or any((copy.file, copy.path, copy.stat) not in good for copy in copies)


def _move(session: Session, row: CheckpointRow, contents: CheckpointContents) -> None:
    """Give a checkpoint another URI and other copies; its tensors, digests and cards stay.

    The records of another checkpoint at that URI go, and its cards become those of this one.
    """
    replaced = find_checkpoint(session, contents.uri)
    if replaced is not None:
        for link in list(replaced.links):
            link.checkpoint = row
        session.flush()
        session.expire(replaced)
        session.delete(replaced)
        session.flush()

    row.uri = contents.uri
    if len(row.shards) == 1:  # a single file may have another name at the new place
        row.shards[0].name = contents.manifest.shards[0].name
    session.flush()
    write_copies(session, row, contents.copies, keep_others=False, keep_verified=False)


def record_files(
    database: Database,
    *,
    uri: str,
    copies: Sequence[LocalCopy] = (),
    checks: Sequence[SourceCheck] = (),
    cards: Collection[str] = (),
) -> None:
    """Record copies of a checkpoint's files and the results of checks, in one transaction.

    This only adds checks; the last check of a copy counts. The first SHA-256 of a file is the expected one from then
    on. If the catalog cannot be written, this only logs it.

    :param copies: replace those of the same files on this machine.
    :param cards: as :func:`record_checkpoint` takes them.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    if not _writable(database, f"what is known of the files of {shown_uri(uri)}"):
        return

    with database.session(write=True) as session:
        row = find_checkpoint(session, uri)
        if row is not None and copies:
            replace_copies(session, row, copies)
        _write_checks(session, uri, row, checks)
        if row is not None:
            link_cards(session, cards, row)


def _write_checks(session: Session, uri: str, row: CheckpointRow | None, checks: Sequence[SourceCheck]) -> None:
    session.add_all(_audit(uri, check) for check in checks)
    if row is not None:
        _note_checks(row, checks)


def record_companions(database: Database, *, uri: str, copies: Sequence[LocalCopy]) -> None:
    """Record the extra files of a checkpoint, each under its path; they hold no tensors.

    If the catalog knows all as they are, this writes nothing. Raises what :func:`record_files` does.
    """
    with database.session() as session:
        row = find_checkpoint(session, uri)
        if row is None or {(c.path, c.stat) for c in copies} <= {(c.path, c.stat) for c in copies_of(row)}:
            return

    record_files(database, uri=uri, copies=copies)


def forget_checkpoint(database: Database, uri: str) -> None:
    """Delete the records of a checkpoint, other than those of checks.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    with database.session(write=True) as session:
        row = find_checkpoint(session, uri)
        if row is not None:
            session.delete(row)


def last_digests(database: Database, uri: str, method: str) -> dict[str, str]:
    """Return the last good digest of each file of a checkpoint by a method of checks, by the file's name."""
    row = VerificationRow
    with database.session() as session:
        found = session.execute(
            select(row.file, row.found)
            .where(row.uri == uri, row.method == method, row.result != "mismatch", row.found.is_not(None))
            .order_by(row.id)
        )
        return {str(file): str(digest) for file, digest in found}


def record_digests(
    database: Database, *, uri: str, manifest: Manifest, digests: Digests, document: DigestDocument | None = None
) -> None:
    """Record the digests of a checkpoint's tensors, unless the catalog has other tensors of it by now.

    If the catalog cannot be written, this only logs it.

    :param document: the document that publishes them. Until its files are compared with these digests, the checkpoint
        then counts as not verified. ``None`` for digests of bytes that were read.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    if not _writable(database, f"the digests of {shown_uri(uri)}"):
        return

    with database.session(write=True) as session:
        row = find_checkpoint(session, uri)
        if row is not None and read_manifest(session, row).tensors_equal(manifest):
            write_digests(session, row.id, manifest, digests, document)
            if document is not None:
                session.execute(update(COPIES).where(COPIES.c.checkpoint_id == row.id).values(verified_at=None))


def _writable(database: Database, what: str) -> bool:
    if not database.writable:
        _log.info("%s is not kept, as the catalog %s cannot be written", what, database.target)

    return database.writable


def _audit(uri: str, check: SourceCheck) -> VerificationRow:
    return VerificationRow(
        uri=uri,
        file=check.file,
        path=check.place,
        method=check.method,
        expected=check.expected,
        found=check.found,
        result=check.result,
        version=__version__,
        at=now(),
    )


def _note_checks(checkpoint: CheckpointRow, checks: Sequence[SourceCheck]) -> None:
    """Note the results of checks beside the copies that are in the checked state, and first digests of files."""
    copies = {(copy.file, copy.path, copy.stat): row for row, copy in reachable(checkpoint.copies)}
    shards = {shard.name: shard for shard in checkpoint.shards}
    for check in checks:
        good = check.result != "mismatch"
        if good and check.method == HEADER:
            continue  # a part of the file only
        # The digests that a card publishes are those of tensors.
        proves = check.method == "blake3" or checkpoint.digest_document is None or check.file not in shards
        row = copies.get((check.file, check.path, check.stat)) if isinstance(check, Check) else None
        if row is not None and (proves or not good):
            row.verified_at = now() if good else None
        shard = shards.get(check.file)
        if good and check.method == "sha256" and shard is not None and shard.sha256 is None:
            shard.sha256 = check.found
