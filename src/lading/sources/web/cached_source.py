"""Sources whose files the transport fetches to lading's own cache: web servers, and stores of objects.

A strong validator, or the digest that the server publishes, shows that all ranges of a file have the same content.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from lading.errors import CheckpointNotFoundError, DigestMismatchError, FetchError, LadingError
from lading.sources.cache import Cache
from lading.sources.disk import advised, require_space
from lading.sources.partial import Identity, Partial, sweep
from lading.sources.source import FetchedFile, Known, RemoteFile, Snapshot
from lading.sources.web.address import is_plain
from lading.sources.web.connection import Timeouts
from lading.sources.web.download import Concurrency, Download, WorkerGroup, read_range
from lading.sources.web.local_files import LocalFiles
from lading.sources.web.redirects import shown
from lading.sources.web.responses import Answer, BadRanges, HeadRefused, describe, refusal
from lading.sources.web.transport import Location, Resource, Transport
from lading.system.filesystem import FileStat
from lading.system.progress import byte_bar

if TYPE_CHECKING:
    from tqdm import tqdm

_log = logging.getLogger("lading")

_METADATA_CONNECTIONS = 8
"""Concurrent requests for the metadata of files."""


class CachedSource(ABC):
    """A source with the files of one URI; base of a :class:`~lading.sources.source.Source`.

    A subclass says which files there are (``snapshot``), and where the bytes of each one are.
    """

    kind: Literal["cache", "hub"] = "cache"
    lists: bool

    def __init__(
        self,
        uri: str,
        *,
        cache: Cache,
        offline: bool,
        timeouts: Timeouts | None = None,
        concurrency: Concurrency | None = None,
    ) -> None:
        """:param offline: whether to use only the cache and open no socket."""
        self.uri = uri
        self._cache = cache
        self._local = LocalFiles(cache, uri, offline=offline)
        self._offline = offline
        self._concurrency = concurrency or Concurrency()
        self._transport = Transport(timeouts=timeouts)
        self._resources: dict[str, Resource] = {}
        self._described: set[RemoteFile] = set()  # as the server describes them
        weakref.finalize(self, self._transport.close)

    @abstractmethod
    def address(self, name: str) -> str:
        """Return the URI of a file, which stays the same: partial files of equal URIs are joined."""

    @abstractmethod
    def locate(self, name: str) -> Location:
        """Return where the file can be requested now. Several threads call it.

        :raises LadingError: it cannot be found out.
        """

    def refused(self, response: Answer) -> LadingError:
        """Return the error for a response whose status is that of a permanent failure."""
        return refusal(response)

    def close(self) -> None:
        """End all requests, also those in progress in other threads. A later request opens connections again."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resource(self, name: str) -> Resource:
        if name not in self._resources:
            label, locate = shown(self.address(name)), partial(self.locate, name)
            self._resources.setdefault(name, Resource(label, locate, refused=self.refused))

        return self._resources[name]

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def with_siblings(self, snapshot: Snapshot, names: Sequence[str]) -> Snapshot:
        """Return ``snapshot`` with the named files, which are in the folder of the URI's file, in the given order.

        A source that lists all files has them in the snapshot already.

        Files that the server does not have are left out. Offline, a file that is not cached is an error, as the server
        cannot be asked whether it exists.

        :raises FetchError: a name, which the index of a checkpoint chose, is not a plain file name.
        """
        if self.lists:
            return snapshot
        wanted = [name for name in dict.fromkeys(names) if snapshot.file(name) is None]
        for name in wanted:
            if not is_plain(name):
                raise FetchError(f"{shown(self.uri)!r}: expected plain file names in its index, found {name[:80]!r}.")

        found = [file for file in self.describe(wanted) if isinstance(file, RemoteFile)]

        return replace(snapshot, files=(*snapshot.files, *found))

    # --- descriptions of files ---------------------------------------------------------------------------------------

    def describe(self, names: Sequence[str]) -> list[RemoteFile | CheckpointNotFoundError]:
        """Return what the server says of each file now, or that it does not have it; offline, as it was last fetched.

        :raises FetchError: the server cannot be reached; or offline, a file was not fetched.
        """
        if not self._offline:
            return self._request_descriptions(names)

        files: list[RemoteFile | CheckpointNotFoundError] = []
        for name in names:
            file = self._local.described(name)
            if file is None:
                raise self._offline_error(name)
            files.append(file)

        return files

    def _offline_error(self, name: str) -> FetchError:
        return FetchError(
            f"{name!r} of {shown(self.uri)!r} is not in the cache {self._cache.folder}, and it is not fetched, as "
            "LADING_OFFLINE or HF_HUB_OFFLINE is set. Unset it, or fetch the file on a machine that is online."
        )

    def _request_descriptions(self, names: Sequence[str]) -> list[RemoteFile | CheckpointNotFoundError]:
        waiting, found = deque(names), dict[str, RemoteFile | CheckpointNotFoundError]()
        with WorkerGroup(self._transport) as group:

            def request_all() -> None:
                while True:
                    try:
                        name = waiting.popleft()
                    except IndexError:
                        return
                    try:
                        found[name] = self._request_description(name, group.stop)
                    except CheckpointNotFoundError as error:
                        found[name] = error

            if len(names) == 1:
                request_all()
            for _ in range(min(_METADATA_CONNECTIONS, len(waiting))):
                group.start(request_all)
            group.watch(lambda: None)

        self._described.update(file for file in found.values() if isinstance(file, RemoteFile))

        return [found[name] for name in names]

    def _request_description(self, name: str, stop: threading.Event) -> RemoteFile:
        resource = self._resource(name)
        action = partial(_request_file, self._transport, resource, name)

        return self._transport.retry(action, what=repr(resource.label), stop=stop)

    # --- parts of files ----------------------------------------------------------------------------------------------

    def read(self, snapshot: Snapshot, file: RemoteFile, offset: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of a file from ``offset`` on. Safe to call from several threads."""
        size = len(into)
        if offset < 0 or (file.size is not None and offset + size > file.size):
            raise ValueError(f"{file.name!r} has {file.size} bytes: there are no {size} at {offset}.")
        if size == 0 or self._local.read(file, offset, into):
            return
        if self._offline:
            raise self._offline_error(file.name)

        self._read_range(file, offset, into)

    def _read_range(self, file: RemoteFile, offset: int, into: memoryview) -> None:
        read_range(self._transport, self._resource(file.name), file, offset, into)

    # --- whole files -------------------------------------------------------------------------------------------------

    def local(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> list[Path | None]:
        """Return the path of each file in the cache, ``None`` if it is not there. The bytes are not checked."""
        return [self._local.path(file) for file in files]

    def fetch(
        self, snapshot: Snapshot, files: Sequence[RemoteFile], *, known: Known, progress: bool
    ) -> list[FetchedFile]:
        """Fetch files to the cache, except those already here, and return them in the order of ``files``."""
        files = self._with_validators(files)
        here = [self._local.find(file, known) for file in files]
        missing = [file for file, found in zip(files, here, strict=True) if found is None]
        if not missing:
            return [file for file in here if file is not None]
        if self._offline:
            raise self._offline_error(missing[0].name)

        sweep(self._cache.tmp)
        sizes = [file.size for file in missing]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        with byte_bar(total, "fetch", shown=progress) as bar, advised("LADING_CACHE_DIR"):
            return [found or self._fetch_one(file, known, bar) for file, found in zip(files, here, strict=True)]

    def _with_validators(self, files: Sequence[RemoteFile]) -> Sequence[RemoteFile]:
        """Return the files with their current validators, requested for those that have neither digest nor validator.

        Without them, an interrupted fetch could not be resumed.

        :raises FetchError: the server cannot be reached, or the size of a file has changed.
        :raises CheckpointNotFoundError: a file does not exist any more.
        """
        unknown = [file.name for file in files if file.sha256 is file.etag is None and file not in self._described]
        if self._offline or not unknown:
            return files

        now = dict(zip(unknown, self._request_descriptions(unknown), strict=True))

        return [self._updated(file, now.get(file.name)) for file in files]

    def _updated(self, file: RemoteFile, now: RemoteFile | CheckpointNotFoundError | None) -> RemoteFile:
        if now is None:
            return file
        if isinstance(now, CheckpointNotFoundError):
            raise now
        if None not in (file.size, now.size) and file.size != now.size:
            raise FetchError(
                f"{self._resource(file.name).label!r} has changed: expected {file.size} bytes, as when it was indexed, "
                f"found {now.size}. Index it again with `lading index`."
            )

        return replace(file, sha256=now.sha256, etag=now.etag)

    def _fetch_one(self, file: RemoteFile, known: Known, bar: tqdm[Any]) -> FetchedFile:
        identity = Identity(url=self.address(file.name), etag=file.etag, size=file.size, sha256=file.sha256)
        with self._cache.lock(identity.key):
            # Another process may have fetched it meanwhile, or the same content was fetched under another name.
            found = self._local.find(file, known)
            if found is not None:
                bar.update(file.size or 0)
                return found

            return self._download(file, identity, bar)

    def _download(self, file: RemoteFile, identity: Identity, bar: tqdm[Any]) -> FetchedFile:
        resource = self._resource(file.name)
        for last in (False, True):
            part = Partial.open(self._cache.tmp, identity)
            resumed = bool(part.done)
            download = Download(self._transport, resource, part, concurrency=self._concurrency, advance=bar.update)
            try:
                require_space(self._cache.tmp, (file.size or 0) - sum(known.end - known.start for known in part.done))
                ranges = identity.resumable and (
                    resumed or (file.size or 0) > self._concurrency.piece_of(file.size or 0)
                )
                try:
                    sha256 = download.fetch_ranges() if ranges and not last else download.fetch_whole()
                except BadRanges as error:
                    _log.info("%s: %s; fetching it as a whole", resource.label, error)
                    part.discard()
                    bar.update(-download.reported)
                    continue
                if file.sha256 not in (None, sha256):
                    if resumed and not last:  # the resumed part may have been damaged
                        part.discard()
                        bar.update(-download.reported)
                        continue
                    raise _mismatch(resource.label, str(file.sha256), sha256)
                path = self._cache.put(part.fd, part.path, sha256, file.name)
            except (OSError, DigestMismatchError):
                # The part would keep the disk full, or is useless.
                part.discard()
                raise
            except BaseException:
                part.release(download.done)
                raise
            part.remove_notes()

            state = FileStat.from_stat(os.stat(path))
            self._local.note(file, sha256, state)

            return FetchedFile(name=file.name, path=path, stat=state, sha256=sha256, published=file.sha256 is not None)

        raise AssertionError("the second round ends")


def _request_file(transport: Transport, resource: Resource, name: str) -> RemoteFile:
    """Return the server's description of a file: by HEAD, or by a GET of its first byte if HEAD does not suffice."""
    by_head = None
    with suppress(HeadRefused), transport.open("HEAD", resource) as response:
        by_head = describe(response, name)
    if by_head is not None and by_head.size:
        return by_head

    with transport.open("GET", resource, {"Range": "bytes=0-0"}) as response:
        by_get = describe(response, name)

    # Some servers say zero if they do not know the size; for others it is the size.
    return by_head if by_head is not None and by_head.size == by_get.size else by_get


def _mismatch(label: str, expected: str, found: str) -> DigestMismatchError:
    return DigestMismatchError(
        label,
        f"{label!r} does not have the digest that its server publishes: expected the SHA-256 {expected}, found "
        f"{found}. The file was discarded. Fetch it again; if that does not help, report it to its publisher.",
        expected=expected,
        found=found,
    )
