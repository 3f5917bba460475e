"""Records of artifacts: weights on this machine that lading does not load."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from lading.catalog.database.database import Database
from lading.catalog.database.statements import intact
from lading.catalog.records import FoundArtifact, now
from lading.catalog.schema import ArtifactRow
from lading.formats.artifacts import Artifact
from lading.system.filesystem import location_id, path_exists
from lading.system.uris import path_uri, uri_path
from lading.system.version import __version__


def record_artifacts(database: Database, found: Collection[FoundArtifact], *, searched: Sequence[Path] = ()) -> None:
    """Record artifacts.

    :param searched: the folders in which these are all artifacts, at any depth: those that this machine recorded there
        before go.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    with database.session(write=True) as session:
        write_artifacts(session, found, searched=searched)


def write_artifacts(session: Session, found: Collection[FoundArtifact], *, searched: Sequence[Path]) -> None:
    """Do what :func:`record_artifacts` does, in the caller's transaction."""
    rows = {(row.uri, row.place, row.kind): row for row in map(_row, found)}
    for folder in map(path_uri, searched):
        inside = or_(ArtifactRow.uri == folder, ArtifactRow.uri.startswith(f"{folder}/", autoescape=True))
        for old in session.scalars(select(ArtifactRow).where(inside)).all():
            path = uri_path(old.uri)
            here = path is not None and old.place == location_id(path.parent)
            if here and (old.uri, old.place, old.kind) not in rows:
                session.delete(old)
    for key, row in rows.items():
        known = session.get(ArtifactRow, key)
        if known is None or any(getattr(known, name) != getattr(row, name) for name in _FINDINGS):
            session.merge(row)


_FINDINGS = ("files", "bytes", "tensors", "dtypes", "reason")
"""The columns of what was found, as opposed to when."""


def known_artifacts(database: Database) -> list[FoundArtifact]:
    """Return the artifacts that are on this machine, in the order of their paths."""
    with database.session() as session, intact("an artifact"):
        return [
            FoundArtifact(
                path=path,
                artifact=Artifact(
                    kind=row.kind,
                    files=row.files,
                    bytes=row.bytes,
                    tensors=row.tensors,
                    dtypes=tuple(row.dtypes.split(",")) if row.dtypes else (),
                    reason=row.reason,
                ),
            )
            for row in session.scalars(select(ArtifactRow).order_by(ArtifactRow.uri, ArtifactRow.kind))
            if (path := uri_path(row.uri)) is not None and path_exists(path) and row.place == location_id(path.parent)
        ]


def _row(found: FoundArtifact) -> ArtifactRow:
    artifact = found.artifact

    return ArtifactRow(
        uri=path_uri(found.path),
        place=location_id(found.path.parent),
        kind=artifact.kind,
        files=artifact.files,
        bytes=artifact.bytes,
        tensors=artifact.tensors,
        dtypes=",".join(artifact.dtypes),
        reason=artifact.reason,
        found_at=now(),
        version=__version__,
    )
