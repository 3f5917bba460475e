"""Best-effort access to the catalog: a failure to read or record is logged and never fails a load.

Files fetched with a checkpoint are recorded as part of it, so that its removal removes them, too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from lading.catalog.checkpoints.record import record_checkpoint, record_companions, record_files
from lading.catalog.records import Check, CheckpointContents, LocalCopy, SourceCheck
from lading.catalog.store import AssetStore, StoredCheckpoint
from lading.checkpoints.checkpoint import Checkpoint
from lading.errors import CatalogError
from lading.sources.source import FetchedFile, Known, RemoteFile, Snapshot, Source
from lading.system.uris import shown_uri

log = logging.getLogger("lading")


class BestEffort:
    """A context whose body a failure of the catalog ends: it is logged, and all goes on.

    :param message: what the failure means, as for a logger.
    """

    def __init__(self, message: str, *arguments: object) -> None:
        self._message = f"{message}: %s"
        self._arguments = arguments

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, CatalogError | OSError):
            return False
        log.warning(self._message, *self._arguments, error)

        return True


def extra_copy(file: FetchedFile, source: Source) -> LocalCopy:
    """Return a fetched file that holds no tensors to read, as the catalog records it."""
    return LocalCopy(file=str(file.path), path=file.path, stat=file.stat, kind=source.kind)


def fetched_check(file: FetchedFile, name: str, expected: str | None) -> Check:
    """Return the check of a fetched file, recorded as ``name``, against its published SHA-256."""
    return Check(file=name, path=file.path, stat=file.stat, method="sha256", expected=expected, found=file.sha256)


def fetch_extra_files(
    source: Source, snapshot: Snapshot, files: Sequence[RemoteFile], store: AssetStore, uri: str, *, progress: bool
) -> list[FetchedFile]:
    """Fetch extra files of the checkpoint ``uri`` and record them; raises what the method of the source does."""
    if not files:
        return []

    fetched = source.fetch(snapshot, files, known=lambda sha256: None, progress=progress)
    with BestEffort("the extra files of %s are not in the catalog", shown_uri(uri)):
        record_companions(store.database, uri=uri, copies=[extra_copy(file, source) for file in fetched])

    return fetched


def known_content(store: AssetStore | None) -> Known:
    """Return a function from a digest to a verified file that the catalog knows."""

    def known(sha256: str) -> Path | None:
        if store is not None:
            with BestEffort("the catalog cannot be searched for files that are already on this machine"):
                return store.find_content(sha256)
        return None

    return known


def stored_checkpoint(name: str, uri: str, store: AssetStore) -> StoredCheckpoint | None:
    # Here the catalog only saves reading headers, so its failures do not fail the load.
    with BestEffort("the manifest of %s cannot be read from the catalog", name):
        return store.checkpoint(uri)
    return None


def record_manifest(
    checkpoint: Checkpoint,
    copies: Sequence[LocalCopy],
    store: AssetStore,
    *,
    checks: Sequence[Check] = (),
    accept: bool = False,
) -> None:
    with BestEffort("the manifest of %s is not in the catalog", checkpoint.name):
        store.database.require_writable()
        contents = CheckpointContents(
            uri=checkpoint.uri,
            manifest=checkpoint.manifest,
            copies=copies,
            checks=checks,
            revision=checkpoint.revision,
            accept=accept,
        )
        record_checkpoint(store.database, contents, cards=[checkpoint.name])


def record_fetched(
    checkpoint: Checkpoint, copies: Sequence[LocalCopy], checks: Sequence[Check], store: AssetStore | None
) -> None:
    if store is not None:
        with BestEffort("the fetched files of %s are not in the catalog", checkpoint.name):
            record_files(store.database, uri=checkpoint.uri, copies=copies, checks=checks)


def record_checks(checkpoint: Checkpoint, checks: Sequence[SourceCheck], store: AssetStore) -> None:
    with BestEffort("the checks of %s are not in the catalog", checkpoint.name):
        record_files(store.database, uri=checkpoint.uri, checks=checks)
