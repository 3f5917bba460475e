"""Local copies of a web server's files, found by the cache's entries, by content, or through the catalog."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lading.errors import LadingError
from lading.sources.cache import Cache, CachedFile, Entry
from lading.sources.sha256 import sha256_file
from lading.sources.source import FetchedFile, Known, RemoteFile
from lading.system.filesystem import FileStat

_log = logging.getLogger("lading")


class LocalFiles:
    """The files of one URI that are on this machine."""

    def __init__(self, cache: Cache, uri: str, *, offline: bool) -> None:
        self._cache = cache
        self._uri = uri
        self._offline = offline
        self._seen: dict[str, FileStat] = {}
        """The states in which files had their digests, by digest; the only record if the cache is not writable."""
        self._unusable: set[str] = set()
        """The SHA-256 of files that :meth:`read` found missing or damaged."""
        self._checking = threading.Lock()

    def described(self, name: str) -> RemoteFile | None:
        """Return the file as the server described it at the last fetch; ``None`` if it was not fetched."""
        record = next(self._records(name), None)
        if record is None:
            return None

        return RemoteFile(
            name=name, size=record.size, sha256=record.sha256 if record.published else None, etag=record.etag
        )

    def names(self) -> list[str]:
        """Return the names of the files that were fetched, sorted."""
        return sorted({name for entry in self._entries() for name in entry.files})

    def path(self, file: RemoteFile) -> Path | None:
        """Return the path of the file in the cache; ``None`` if it is not there. Its bytes are not checked."""
        record = self._record(file)
        sha256 = file.sha256 if record is None else record.sha256

        return None if sha256 is None else self._cache.find(sha256)

    def find(self, file: RemoteFile, known: Known) -> FetchedFile | None:
        """Return the file if it is on this machine: by the cache's entries, by its content, or through the catalog."""
        record = self._record(file)
        sha256 = file.sha256 if record is None else record.sha256
        if sha256 is None:
            return None

        path = self._cache.find(sha256)
        state = None if path is None else _verified(path, sha256, None if record is None else record.stat)
        if state is not None:
            self._seen[sha256] = state
            if record is None or record.stat != state:
                self.note(file, sha256, state)
        elif (path := known(sha256)) is not None:
            try:
                found = os.stat(path)
            except OSError:
                return None
            if stat.S_ISREG(found.st_mode) and file.size in (None, found.st_size):
                state = FileStat.from_stat(found)
        if path is None or state is None:
            return None

        return FetchedFile(name=file.name, path=path, stat=state, sha256=sha256, published=file.sha256 is not None)

    def read(self, file: RemoteFile, offset: int, into: memoryview) -> bool:
        """Fill ``into`` from the copy in the cache; return whether that is there, as it was when it was checked.

        A copy whose state was recorded only by another catalog is checked first.
        """
        record = self._record(file)
        if record is not None and record.stat is None:
            with self._checking:  # one thread hashes the file, once, even if it is damaged
                record = self._record(file)
                if record is not None and record.stat is None and record.sha256 not in self._unusable:
                    if self.find(file, lambda sha256: None) is None:
                        self._unusable.add(record.sha256)
                    record = self._record(file)
        path = None if record is None else self._cache.find(record.sha256)
        if record is None or path is None:
            return False
        try:
            with open(path, "rb", buffering=0) as opened:
                if FileStat.from_stat(os.fstat(opened.fileno())) != record.stat:
                    return False
                return os.preadv(opened.fileno(), [into], offset) == len(into)
        except OSError:
            return False

    def note(self, file: RemoteFile, sha256: str, state: FileStat) -> None:
        """Record that the file is in the cache, in a state that has the digest."""
        record = CachedFile(
            sha256=sha256,
            size=state.size,
            etag=file.etag,
            published=file.sha256 is not None,
            stat=state,
            fetched_at=time.time(),
        )
        try:
            self._cache.add(self._uri, {file.name: record})
        except OSError as error:
            # The file is here and intact; only the next lookup takes longer.
            _log.warning("The cache %s is not writable and cannot record %r: %s", self._cache.folder, file.name, error)

    def _record(self, file: RemoteFile) -> CachedFile | None:
        """Return the record under the name of ``file``, if it is known to have the same content."""
        record = next((record for record in self._records(file.name) if self._is_of(record, file)), None)
        if record is None or record.stat is not None:
            return record

        return replace(record, stat=self._seen.get(record.sha256))

    def _records(self, name: str) -> Iterator[CachedFile]:
        """Yield the records under a name: first that of this catalog, then those of others, without their states."""
        for entry in self._entries():
            if name in entry.files:
                yield entry.files[name]

    def _entries(self) -> Iterator[Entry]:
        if (own := self._cache.entry(self._uri)) is not None:
            yield own
        yield from self._cache.others(self._uri)

    def _is_of(self, record: CachedFile, file: RemoteFile) -> bool:
        if file.size not in (None, record.size):
            return False
        if file.sha256 is not None:
            return record.sha256 == file.sha256

        # Offline, the entry cannot be compared with the server's current file.
        return self._offline if file.etag is None else file.etag == record.etag


def _verified(path: Path, sha256: str, state: FileStat | None) -> FileStat | None:
    """Return the state of a cached file if its bytes have the digest; they are not hashed if it is in ``state``."""
    try:
        now = FileStat.from_stat(os.stat(path))
        if now == state:
            return now
        found, now = sha256_file(path)
    except (OSError, LadingError) as error:
        _log.warning("%s cannot be used: %s", path, error)
        return None
    if found != sha256:
        _log.warning("%s is damaged: its bytes differ from the fetched ones. It is fetched again.", path)
        return None

    return now
