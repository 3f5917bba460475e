"""The source of ``https://`` URIs: files on any web server, kept in lading's own cache.

A URI names one file, or the index of a checkpoint whose other files are in the same folder. HTTP has no revisions, so
:attr:`Snapshot.revision` is always empty; a strong validator, or the digest that the server publishes, shows that all
ranges of a file have the same content.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import quote, urlunsplit

from lading.errors import CheckpointNotFoundError, DigestMismatchError, FetchError
from lading.sources.cache import Cache
from lading.sources.disk import advised, require_space
from lading.sources.partial import Identity, Partial, sweep
from lading.sources.source import FetchedFile, Known, RemoteFile, Snapshot
from lading.sources.web.address import WebAddress, is_plain
from lading.sources.web.client import Client, Connection, Timeouts
from lading.sources.web.download import Concurrency, Download, WorkerGroup, read_range
from lading.sources.web.local_files import LocalFiles
from lading.sources.web.redirects import shown
from lading.sources.web.responses import BadRanges, HeadRefused, describe
from lading.system.filesystem import FileStat
from lading.system.progress import byte_bar

if TYPE_CHECKING:
    import httpx2 as httpx
    from tqdm import tqdm

_log = logging.getLogger("lading")

_METADATA_CONNECTIONS = 8
"""Concurrent requests for the metadata of files."""


class HttpSource:
    """The source at an ``https://`` URI; a :class:`~lading.sources.source.Source`."""

    kind: Literal["cache", "hub"] = "cache"
    lists = False

    def __init__(
        self,
        uri: str,
        *,
        cache: Cache,
        offline: bool,
        timeouts: Timeouts | None = None,
        concurrency: Concurrency | None = None,
    ) -> None:
        """
        :param offline: whether to use only the cache and open no socket.

        :raises AddressError: ``uri`` does not name a file.
        """
        self.uri = uri
        self._cache = cache
        self._local = LocalFiles(cache, uri, offline=offline)
        self._offline = offline
        self._timeouts = timeouts or Timeouts()
        self._concurrency = concurrency or Concurrency()
        self._parts, self._name = WebAddress.from_uri(uri)
        self.inner: str | None = self._name

        self._lock = Lock()
        self._opened_client: Client | None = None
        self._described: set[RemoteFile] = set()  # as the server describes them

    @property
    def _client(self) -> Client:
        """The HTTP client, opened on first use.

        :raises PolicyError: requests to the URI are refused.
        """
        with self._lock:
            if self._opened_client is None:
                self._opened_client = Client(self.uri, timeouts=self._timeouts)
                weakref.finalize(self, self._opened_client.close)

            return self._opened_client

    def close(self) -> None:
        """Close the connections; they are opened again when they are needed."""
        if self._opened_client is not None:
            self._opened_client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the file that the URI names; offline, as it was last fetched."""
        (file,) = self._describe([self._name])
        if isinstance(file, CheckpointNotFoundError):
            raise file

        return Snapshot(uri=self.uri, revision="", files=(file,))

    def with_siblings(self, snapshot: Snapshot, names: Sequence[str]) -> Snapshot:
        """Return ``snapshot`` with the named files, which are in the folder of the URI's file, in the given order.

        Files that the server does not have are left out. Offline, a file that is not cached is an error, as the server
        cannot be asked whether it exists.

        :raises FetchError: a name, which the index of a checkpoint chose, is not a plain file name.
        """
        wanted = [name for name in dict.fromkeys(names) if snapshot.file(name) is None]
        for name in wanted:
            if not is_plain(name):
                raise FetchError(f"{shown(self.uri)!r}: expected plain file names in its index, found {name[:80]!r}.")

        found = [file for file in self._describe(wanted) if isinstance(file, RemoteFile)]

        return replace(snapshot, files=(*snapshot.files, *found))

    def _describe(self, names: Sequence[str]) -> list[RemoteFile | CheckpointNotFoundError]:
        if not self._offline:
            return self._request_metadata(names)

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

    def _request_metadata(self, names: Sequence[str]) -> list[RemoteFile | CheckpointNotFoundError]:
        client, waiting = self._client, deque(names)
        found: dict[str, RemoteFile | CheckpointNotFoundError] = {}

        def request_all(connection: Connection) -> None:
            while True:
                try:
                    name = waiting.popleft()
                except IndexError:
                    return
                url = client.parse(self._url(name))
                action = partial(_request_file, connection, url, name)
                try:
                    found[name] = client.retry(action, what=repr(shown(url)), stop=group.stop)
                except CheckpointNotFoundError as error:
                    found[name] = error

        with WorkerGroup(client) as group:
            if len(names) == 1:
                with client.connection() as connection:
                    request_all(connection)
            for _ in range(min(_METADATA_CONNECTIONS, len(waiting))):
                group.start_requests(request_all)
            group.watch(lambda: None)

        self._described.update(file for file in found.values() if isinstance(file, RemoteFile))

        return [found[name] for name in names]

    def _url(self, name: str) -> str:
        if name == self._name:
            return self.uri
        folder = self._parts.path.rpartition("/")[0]

        return urlunsplit(self._parts._replace(path=f"{folder}/{quote(name, safe='')}", fragment=""))

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

        client = self._client
        url = client.parse(self._url(file.name))

        with client.connection() as connection:
            into[:] = client.retry(lambda: read_range(connection, url, file, offset, size), what=repr(shown(url)))

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
        with byte_bar(total, "fetch", shown=progress) as bar:
            try:
                with advised("LADING_CACHE_DIR"):
                    return [found or self._fetch_one(file, known, bar) for file, found in zip(files, here, strict=True)]
            finally:
                self.close()

    def _with_validators(self, files: Sequence[RemoteFile]) -> Sequence[RemoteFile]:
        """Return the files with their current validators, requested for those that have neither digest nor validator.

        Without them, an interrupted fetch could not be resumed.

        :raises FetchError: the server cannot be reached, or the size of a file has changed.
        :raises CheckpointNotFoundError: a file does not exist any more.
        """
        unknown = [file.name for file in files if file.sha256 is file.etag is None and file not in self._described]
        if self._offline or not unknown:
            return files

        now = dict(zip(unknown, self._request_metadata(unknown), strict=True))

        return [self._updated(file, now.get(file.name)) for file in files]

    def _updated(self, file: RemoteFile, now: RemoteFile | CheckpointNotFoundError | None) -> RemoteFile:
        if now is None:
            return file
        if isinstance(now, CheckpointNotFoundError):
            raise now
        if None not in (file.size, now.size) and file.size != now.size:
            raise FetchError(
                f"{shown(self._url(file.name))!r} has changed: expected {file.size} bytes, as when it was indexed, "
                f"found {now.size}. Index it again with `lading index`."
            )

        return replace(file, sha256=now.sha256, etag=now.etag)

    def _fetch_one(self, file: RemoteFile, known: Known, bar: tqdm[Any]) -> FetchedFile:
        identity = Identity(url=self._url(file.name), etag=file.etag, size=file.size, sha256=file.sha256)
        with self._cache.lock(identity.key):
            # Another process may have fetched it meanwhile, or the same content was fetched under another name.
            found = self._local.find(file, known)
            if found is not None:
                bar.update(file.size or 0)
                return found

            return self._download(file, identity, bar)

    def _download(self, file: RemoteFile, identity: Identity, bar: tqdm[Any]) -> FetchedFile:
        for last in (False, True):
            part = Partial.open(self._cache.tmp, identity)
            resumed = bool(part.done)
            download = Download(self._client, part, concurrency=self._concurrency, advance=bar.update)
            try:
                require_space(self._cache.tmp, (file.size or 0) - sum(known.end - known.start for known in part.done))
                ranges = identity.resumable and (
                    resumed or (file.size or 0) > self._concurrency.piece_of(file.size or 0)
                )
                try:
                    sha256 = download.fetch_ranges() if ranges and not last else download.fetch_whole()
                except BadRanges as error:
                    _log.info("%s: %s; fetching it as a whole", shown(identity.url), error)
                    part.discard()
                    bar.update(-download.reported)
                    continue
                if file.sha256 not in (None, sha256):
                    if resumed and not last:  # the resumed part may have been damaged
                        part.discard()
                        bar.update(-download.reported)
                        continue
                    raise _mismatch(identity.url, str(file.sha256), sha256)
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


def _request_file(connection: Connection, url: httpx.URL, name: str) -> RemoteFile:
    """Return the server's description of a file: by HEAD, or by a GET of its first byte if HEAD does not suffice."""
    by_head = None
    with suppress(HeadRefused), connection.open("HEAD", url, {}) as response:
        by_head = describe(response, name)
    if by_head is not None and by_head.size:
        return by_head

    with connection.open("GET", url, {"Range": "bytes=0-0"}) as response:
        by_get = describe(response, name)

    # Some servers say zero if they do not know the size; for others it is the size.
    return by_head if by_head is not None and by_head.size == by_get.size else by_get


def _mismatch(url: str, expected: str, found: str) -> DigestMismatchError:
    return DigestMismatchError(
        shown(url),
        f"{shown(url)!r} does not have the digest that its server publishes: expected the SHA-256 {expected}, found "
        f"{found}. The file was discarded. Fetch it again; if that does not help, report it to its publisher.",
        expected=expected,
        found=found,
    )
