"""``https://``: files of any web server, kept in lading's own cache.

A URI names one file, or the index of a checkpoint whose other files lie beside it. HTTP has no revisions, so
:attr:`Snapshot.revision` is always empty; that all ranges of a file are of one content is known by its strong validator
or by the digest that the server publishes, as far as it has either.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Lock
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
from lading.sources.web.local_files import LocalFile
from lading.sources.web.redirects import shown
from lading.sources.web.responses import BadRanges, HeadRefused, describe
from lading.system.filesystem import FileStat
from lading.system.progress import byte_bar

if TYPE_CHECKING:
    import httpx2 as httpx
    from tqdm import tqdm

_log = logging.getLogger("lading")

_LOOKS = 8
"""Connections over which the files of an index are asked for."""


class HttpSource:
    """The source at an ``https://`` URI. See :class:`lading.sources.source.Source`, whose methods it has."""

    kind: Literal["cache", "hub"] = "cache"
    lists = False

    def __init__(
        self,
        uri: str,
        *,
        cache: Cache,
        offline: bool,
        patience: Timeouts | None = None,
        effort: Concurrency | None = None,
    ) -> None:
        """:param offline: only what is in the cache is there; no socket is opened.

        :raises AddressError: ``uri`` does not name a file.
        """
        self.uri = uri
        self._cache = cache
        self._kept = LocalFile(cache, uri, offline=offline)
        self._offline = offline
        self._patience = patience or Timeouts()
        self._effort = effort or Concurrency()
        self._parts, self._name = WebAddress.from_uri(uri)
        self.inner: str | None = self._name

        self._lock = Lock()
        self._made: Client | None = None
        self._asked: set[RemoteFile] = set()  # as the server describes them

    @property
    def _client(self) -> Client:
        """:raises PolicyError: the URI is of a kind that is not asked."""
        with self._lock:
            if self._made is None:
                self._made = Client(self.uri, patience=self._patience)
                weakref.finalize(self, self._made.close)

            return self._made

    def close(self) -> None:
        """Close the connections; they are opened again when they are needed."""
        if self._made is not None:
            self._made.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what is there -----------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The one file that the URI names. Offline it is what was fetched last.

        :raises FetchError: the server cannot be reached, or answers nonsense; or offline, with nothing in the cache.
        :raises CheckpointNotFoundError: it says that there is no such thing (also a ``FileNotFoundError``).
        :raises PolicyError: it wants credentials, redirects where it may not, or the URI is of a refused kind.
        """
        (file,) = self._describe([self._name])
        if isinstance(file, CheckpointNotFoundError):
            raise file

        return Snapshot(uri=self.uri, revision="", files=(file,))

    def beside(self, snapshot: Snapshot, names: Sequence[str]) -> Snapshot:
        """``snapshot``, and the files of these names that lie beside the one of the URI, in the order given.

        What the server says it does not have is left out. What is not in the cache is an error offline, as there nobody
        says that.

        :raises FetchError: a name is not a plain one (an index names them, which whoever wrote it chose); or as
            ``snapshot`` does, and so for the other errors.
        """
        wanted = [name for name in dict.fromkeys(names) if snapshot.file(name) is None]
        for name in wanted:
            if not is_plain(name):
                raise FetchError(f"{shown(self.uri)!r}: expected plain names of files beside it, found {name[:80]!r}.")

        found = [file for file in self._describe(wanted) if isinstance(file, RemoteFile)]

        return replace(snapshot, files=(*snapshot.files, *found))

    def _describe(self, names: Sequence[str]) -> list[RemoteFile | CheckpointNotFoundError]:
        if not self._offline:
            return self._look_at(names)

        files: list[RemoteFile | CheckpointNotFoundError] = []
        for name in names:
            file = self._kept.described(name)
            if file is None:
                raise self._offline_error(name)
            files.append(file)

        return files

    def _offline_error(self, name: str) -> FetchError:
        return FetchError(
            f"{name!r} of {shown(self.uri)!r} is not in the cache {self._cache.folder}, and it is not fetched, as "
            "LADING_OFFLINE or HF_HUB_OFFLINE is set. Unset it, or fetch the file on a machine that may."
        )

    def _look_at(self, names: Sequence[str]) -> list[RemoteFile | CheckpointNotFoundError]:
        client, waiting, lock = self._client, iter(names), Lock()
        found: dict[str, RemoteFile | CheckpointNotFoundError] = {}

        def look(connection: Connection, stop: Event) -> None:
            while True:
                with lock:
                    name = next(waiting, None)
                if name is None:
                    return
                url = client.parse(self._url(name))
                action = partial(_look, connection, url, name)
                try:
                    found[name] = client.retry(action, what=repr(shown(url)), stop=stop)
                except CheckpointNotFoundError as error:
                    found[name] = error

        if len(names) == 1:
            with client.connection() as connection:
                look(connection, Event())
        else:
            with WorkerGroup() as crew:

                def work() -> None:
                    with client.connection() as connection:
                        crew.connections.append(connection)
                        look(connection, crew.stop)

                for _ in range(min(_LOOKS, len(names))):
                    crew.start(work)
                crew.watch(lambda: None)

        self._asked.update(file for file in found.values() if isinstance(file, RemoteFile))

        return [found[name] for name in names]

    def _url(self, name: str) -> str:
        if name == self._name:
            return self.uri
        folder = self._parts.path.rpartition("/")[0]

        return urlunsplit(self._parts._replace(path=f"{folder}/{quote(name, safe='')}", fragment=""))

    # --- parts of files ----------------------------------------------------------------------------------------------

    def read(self, snapshot: Snapshot, file: RemoteFile, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes of a file, from ``offset`` on. May be called from several threads.

        :raises FetchError: the server cannot be reached, answers nonsense, or has another content by now; or offline.
        """
        if offset < 0 or size < 0 or (file.size is not None and offset + size > file.size):
            raise ValueError(f"{file.name!r} has {file.size} bytes: there are no {size} at {offset}.")
        if size == 0:
            return b""
        here = self._kept.read(file, offset, size)
        if here is not None:
            return here
        if self._offline:
            raise self._offline_error(file.name)

        client = self._client
        url = client.parse(self._url(file.name))

        with client.connection() as connection:
            return client.retry(lambda: read_range(connection, url, file, offset, size), what=repr(shown(url)))

    # --- whole files -------------------------------------------------------------------------------------------------

    def shared(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> list[Path]:
        """Nowhere: lading's own cache is nobody else's."""
        return []

    def local(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> list[Path | None]:
        """Where files are in the cache, found without opening a socket. Their bytes are not checked."""
        return [self._kept.path(file) for file in files]

    def fetch(
        self, snapshot: Snapshot, files: Sequence[RemoteFile], *, known: Known, progress: bool
    ) -> list[FetchedFile]:
        """Bring files into the cache, in the order in which they are asked for. What is here already stays.

        :raises FetchError: the server cannot be reached, answers nonsense, or has another content by now; or offline.
        :raises DigestMismatchError: what came is not what was published.
        :raises PolicyError: it wants credentials, or redirects where it may not.
        :raises OSError: the disk is full, or cannot be written.
        """
        files = self._with_validators(files)
        here = [self._kept.find(file, known) for file in files]
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
                    return [found or self._bring(file, known, bar) for file, found in zip(files, here, strict=True)]
            finally:
                self.close()

    def _with_validators(self, files: Sequence[RemoteFile]) -> Sequence[RemoteFile]:
        """The files with what their server says of their content, where nothing is known that tells it from another.

        Without that, nothing could be used of a fetch that was broken off: neither files that came, nor parts of one.

        :raises FetchError: the server cannot be reached, or the file has another size by now.
        :raises CheckpointNotFoundError: it is gone.
        """
        unknown = [file.name for file in files if file.sha256 is file.etag is None and file not in self._asked]
        if self._offline or not unknown:
            return files

        now = dict(zip(unknown, self._look_at(unknown), strict=True))

        return [self._as_it_is(file, now.get(file.name)) for file in files]

    def _as_it_is(self, file: RemoteFile, now: RemoteFile | CheckpointNotFoundError | None) -> RemoteFile:
        if now is None:
            return file
        if isinstance(now, CheckpointNotFoundError):
            raise now
        if None not in (file.size, now.size) and file.size != now.size:
            raise FetchError(
                f"{shown(self._url(file.name))!r} has changed: expected {file.size} bytes, as it was indexed, but it "
                f"has {now.size} now. Index it anew with `lading index`."
            )

        return replace(file, sha256=now.sha256, etag=now.etag)

    def _bring(self, file: RemoteFile, known: Known, bar: tqdm[Any]) -> FetchedFile:
        identity = Identity(url=self._url(file.name), etag=file.etag, size=file.size, sha256=file.sha256)
        with self._cache.lock(identity.key):
            # Another process may have brought it meanwhile, or another name of the same content was fetched before.
            found = self._kept.find(file, known)
            if found is not None:
                bar.update(file.size or 0)
                return found

            return self._download(file, identity, bar)

    def _download(self, file: RemoteFile, identity: Identity, bar: tqdm[Any]) -> FetchedFile:
        for last in (False, True):
            part = Partial.open(self._cache.tmp, identity)
            resumed = bool(part.done)
            download = Download(self._client, part, effort=self._effort, advance=bar.update)
            try:
                require_space(self._cache.tmp, (file.size or 0) - sum(known.end - known.start for known in part.done))
                ranges = identity.resumable and (resumed or (file.size or 0) > self._effort.piece_of(file.size or 0))
                try:
                    sha256 = download.in_ranges() if ranges and not last else download.as_a_whole()
                except BadRanges as error:
                    _log.info("%s: %s; fetching it as a whole", shown(identity.url), error)
                    part.discard()
                    bar.update(-download.reported)
                    continue
                if file.sha256 not in (None, sha256):
                    if resumed and not last:  # what was there from before may have been damaged
                        part.discard()
                        bar.update(-download.reported)
                        continue
                    raise _mismatch(identity.url, str(file.sha256), sha256)
                path = self._cache.put(part.fd, part.path, sha256, file.name)
            except (OSError, DigestMismatchError):
                # It would only fill the disk further, or is of no use.
                part.discard()
                raise
            except BaseException:
                part.release(download.done)
                raise
            part.finished()

            state = FileStat.from_stat(os.stat(path))
            self._kept.note(file, sha256, state)

            return FetchedFile(name=file.name, path=path, stat=state, sha256=sha256, published=file.sha256 is not None)

        raise AssertionError("the second round ends")


def _look(connection: Connection, url: httpx.URL, name: str) -> RemoteFile:
    """What the server says of a file: by HEAD, or by its first byte where it does not answer that, or not in full."""
    by_head = None
    try:
        with connection.open("HEAD", url, {}) as response:
            by_head = describe(response, name)
    except HeadRefused:
        pass
    if by_head is not None and by_head.size:
        return by_head

    with connection.open("GET", url, {"Range": "bytes=0-0"}) as response:
        by_get = describe(response, name)

    # Some servers say zero where they do not know, and of others it is true.
    return by_head if by_head is not None and by_head.size == by_get.size else by_get


def _mismatch(url: str, expected: str, found: str) -> DigestMismatchError:
    return DigestMismatchError(
        shown(url),
        f"{shown(url)!r} is not what its server publishes: expected the SHA-256 {expected}, found {found}. Nothing of "
        "it was kept. Fetch it again; if that does not help, tell its publisher.",
        expected=expected,
        found=found,
    )
