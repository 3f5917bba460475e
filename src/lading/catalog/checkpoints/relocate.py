"""The relocation of a checkpoint's records to the path at which its files are now."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from lading.catalog.checkpoints.copies import write_copies
from lading.catalog.checkpoints.manifests import find_checkpoint
from lading.catalog.database.database import Database
from lading.catalog.links import link_by_uri
from lading.catalog.records import LocalCopy


def relocate_checkpoint(database: Database, *, uri: str, to: str, copies: Sequence[LocalCopy]) -> None:
    """Give a checkpoint another URI and other copies; its tensors, digests and cards stay.

    The records of another checkpoint at the URI ``to`` go, and its cards become those of this one.

    :param copies: the files on this machine, at the new place. A checkpoint of one file may have another name there.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    with database.session(write=True) as session:
        move_checkpoint(session, uri=uri, to=to, copies=copies)
        link_by_uri(session)


def move_checkpoint(session: Session, *, uri: str, to: str, copies: Sequence[LocalCopy]) -> None:
    """Do what :func:`relocate_checkpoint` does, apart from new links to cards, in the caller's transaction."""
    row = find_checkpoint(session, uri)
    if row is None or uri == to:
        return
    replaced = find_checkpoint(session, to)
    if replaced is not None:
        for link in list(replaced.links):
            link.checkpoint = row
        session.flush()
        session.expire(replaced)
        session.delete(replaced)
        session.flush()

    row.uri = to
    if len(row.shards) == 1:
        row.shards[0].name = next(copy.file for copy in copies if copy.file != str(copy.path))
    session.flush()
    write_copies(session, row, copies, keep_others=False, keep_verified=False)
