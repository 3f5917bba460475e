"""Files that come along with a checkpoint are written down as its own, so that they are removed with it one day."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lading.catalog.checkpoints import record_companions
from lading.catalog.records import LocalCopy
from lading.catalog.store import AssetStore
from lading.errors import CatalogError
from lading.fetch.source import FetchedFile, RemoteFile, Snapshot, Source
from lading.filesystem import FileStat

log = logging.getLogger("lading")


def fetch_along(
    source: Source,
    snapshot: Snapshot,
    files: Sequence[RemoteFile],
    store: AssetStore | None,
    uri: str,
    *,
    progress: bool,
) -> list[FetchedFile]:
    """Bring files here that come along with the checkpoint ``uri``; raises what the method of the source does.

    :param store: whose catalog is told.
    """
    if not files:
        return []

    with noting_broken_off(source, snapshot, files, store, uri):
        fetched = source.fetch(snapshot, files, known=lambda sha256: None, progress=progress)
    _note(
        store,
        uri,
        [
            LocalCopy(file=str(file.path), path=file.path, stat=file.stat, kind=source.kind if file.own else "adopted")
            for file in fetched
        ],
    )

    return fetched


@contextmanager
def noting_broken_off(
    source: Source, snapshot: Snapshot, files: Sequence[RemoteFile], store: AssetStore | None, uri: str
) -> Iterator[None]:
    """Where the body brings some of the files and fails, note which: a second attempt finds them, and could not tell
    them from those of other programs.
    """
    if store is None or source.kind == "cache":  # what is in lading's own cache is lading's
        yield
        return

    before = source.local(snapshot, files)
    try:
        yield
    except BaseException:
        came = [path for path, old in zip(source.local(snapshot, files), before, strict=True) if path and not old]
        _note(
            store,
            uri,
            [
                LocalCopy(file=str(path), path=path, stat=FileStat.from_stat(os.stat(path)), kind=source.kind)
                for path in came
            ],
        )
        raise


def _note(store: AssetStore | None, uri: str, copies: Sequence[LocalCopy]) -> None:
    if store is None or not copies:
        return
    try:
        record_companions(store.database, uri=uri, copies=copies)
    except (CatalogError, OSError) as error:
        log.warning("what came along with %s is not in the catalog: %s", uri, error)
