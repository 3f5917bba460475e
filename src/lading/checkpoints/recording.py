"""Files that come along with a checkpoint are written down as its own, so that they are removed with it one day."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lading.cards.card import shown_uri
from lading.catalog.checkpoints.intents import forget_unmet, record_intents
from lading.catalog.checkpoints.record import record_companions
from lading.catalog.records import LocalCopy
from lading.catalog.store import AssetStore
from lading.errors import CatalogError
from lading.sources.source import FetchedFile, RemoteFile, Snapshot, Source

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

    with noting_intent(source, snapshot, files, store, uri):
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
def noting_intent(
    source: Source, snapshot: Snapshot, files: Sequence[RemoteFile], store: AssetStore | None, uri: str
) -> Iterator[None]:
    """Note before the body fetches files what it is about to bring into a cache that other programs use, too.

    However the body ends, and be it that the process dies, what came is then known to be lading's.
    """
    paths = [] if store is None or not store.database.writable else source.shared(snapshot, files)
    if store is None or not paths:
        yield
        return

    try:
        record_intents(store.database, paths, uri=uri)
    except (CatalogError, OSError) as error:
        log.warning("what is about to come of %s is not in the catalog: %s", shown_uri(uri), error)
    try:
        yield
    finally:
        try:
            forget_unmet(store.database, paths)
        except (CatalogError, OSError) as error:
            log.warning("what did not come of %s is in the catalog still: %s", shown_uri(uri), error)


def _note(store: AssetStore | None, uri: str, copies: Sequence[LocalCopy]) -> None:
    if store is None or not copies:
        return
    try:
        record_companions(store.database, uri=uri, copies=copies)
    except (CatalogError, OSError) as error:
        log.warning("what came along with %s is not in the catalog: %s", shown_uri(uri), error)
