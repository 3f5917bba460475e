"""``https://``: files of any web server, kept in lading's own cache.

A URI names one file, or the index of a checkpoint whose other files lie beside it. HTTP has no revisions, so
:attr:`Snapshot.revision` is always empty; that all ranges of a file are of one content is known by its strong validator
or by the digest that the server publishes, as far as it has either.
"""

from __future__ import annotations

import logging
import os
import stat
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from lading.errors import DigestMismatchError, FetchError, LadingError
from lading.fetch.answers import BadRanges, HeadRefused, describe, require_range, require_same
from lading.fetch.cache import Cache, CachedFile, Entry
from lading.fetch.client import Client, Connection, Patience, chunks
from lading.fetch.download import Crew, Download, Effort, require_space
from lading.fetch.partial import Identity, Partial, sweep
from lading.fetch.redirects import shown
from lading.fetch.source import FetchedFile, Known, RemoteFile, Snapshot
from lading.fetch.verify import sha256_file
from lading.filesystem import FileStat

if TYPE_CHECKING:
    import httpx2 as httpx
    from tqdm import tqdm

_log = logging.getLogger("lading")

_MAX_NAME = 255
"""Bytes; the limit of the common file systems."""
_MAX_SKIP = 64 << 20
"""Bytes that are read past where a server does not do ranges."""
_LOOKS = 8
"""Connections over which the files of an index are asked for."""


class HttpSource:
    """The source at an ``https://`` URI. See :class:`lading.fetch.source.Source`, whose methods it has."""

    kind: Literal["cache", "hub"] = "cache"
    lists = False

    def __init__(
        self,
        uri: str,
        *,
        cache: Cache,
        offline: bool,
        patience: Patience | None = None,
        effort: Effort | None = None,
    ) -> None:
        """:param offline: only what is in the cache is there; no socket is opened.

        :raises FetchError: ``uri`` does not name a file.
        """
        self.uri = uri
        self._cache = cache
        self._offline = offline
        self._patience = patience or Patience()
        self._effort = effort or Effort()
        self._parts = urlsplit(uri)
        self._name = unquote(self._parts.path.rpartition("/")[2])
        if not is_plain(self._name):
            raise FetchError(f"{shown(uri)!r} does not name a file: its path must end in a plain file name.")
        self.inner: str | None = self._name

        self._lock = Lock()
        self._made: Client | None = None

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
        return self.beside(Snapshot(uri=self.uri, revision="", files=()), [self._name])

    def beside(self, snapshot: Snapshot, names: Sequence[str]) -> Snapshot:
        """``snapshot``, and the files of these names that lie beside the one of the URI, in the order given.

        :raises FetchError: a name is not a plain one (an index names them, which whoever wrote it chose); or as
            ``snapshot`` does, and so for the other errors.
        """
        wanted = [name for name in dict.fromkeys(names) if snapshot.file(name) is None]
        for name in wanted:
            if not is_plain(name):
                raise FetchError(f"{shown(self.uri)!r}: expected plain names of files beside it, found {name[:80]!r}.")

        if self._offline:
            entry = self._cache.entry(self.uri)
            found = [self._remembered(entry, name) for name in wanted]
        else:
            found = self._look_at(wanted)

        return replace(snapshot, files=(*snapshot.files, *found))

    def _remembered(self, entry: Entry | None, name: str) -> RemoteFile:
        record = None if entry is None else entry.files.get(name)
        if record is None:
            raise self._offline_error(name)

        return RemoteFile(
            name=name, size=record.size, sha256=record.sha256 if record.published else None, etag=record.etag
        )

    def _offline_error(self, name: str) -> FetchError:
        variable = next((v for v in ("LADING_OFFLINE", "HF_HUB_OFFLINE") if os.environ.get(v)), "LADING_OFFLINE")

        return FetchError(
            f"{name!r} of {shown(self.uri)!r} is not in the cache {self._cache.folder}, and it is not fetched, as "
            f"{variable} is set. Unset it, or fetch the file on a machine that may."
        )

    def _look_at(self, names: Sequence[str]) -> list[RemoteFile]:
        client, waiting, lock = self._client, iter(names), Lock()
        found: dict[str, RemoteFile] = {}

        def look(connection: Connection, stop: Event) -> None:
            while True:
                with lock:
                    name = next(waiting, None)
                if name is None:
                    return
                url = client.parse(self._url(name))
                found[name] = client.retry(
                    lambda name=name, url=url: _look(connection, url, name),  # type: ignore[misc]
                    what=repr(shown(url)),
                    stop=stop,
                )

        if len(names) == 1:
            with client.connection() as connection:
                look(connection, Event())
        else:
            with Crew() as crew:

                def work() -> None:
                    with client.connection() as connection:
                        crew.connections.append(connection)
                        look(connection, crew.stop)

                for _ in range(min(_LOOKS, len(names))):
                    crew.start(work)
                crew.watch(lambda: None)

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
        if self._offline:
            raise self._offline_error(file.name)

        client = self._client
        url = client.parse(self._url(file.name))

        with client.connection() as connection:
            return client.retry(
                lambda: _read(connection, url, file, offset, size, self._patience), what=repr(shown(url))
            )

    # --- whole files -------------------------------------------------------------------------------------------------

    def local(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> list[Path | None]:
        """Where files are in the cache, found without opening a socket. Their bytes are not checked."""
        entry = self._cache.entry(self.uri)
        paths: list[Path | None] = []
        for file in files:
            record = self._record(entry, file)
            sha256 = file.sha256 if record is None else record.sha256
            paths.append(None if sha256 is None else self._cache.find(sha256))

        return paths

    def fetch(
        self, snapshot: Snapshot, files: Sequence[RemoteFile], *, known: Known, progress: bool
    ) -> list[FetchedFile]:
        """Bring files into the cache, in the order in which they are asked for. What is here already stays.

        :raises FetchError: the server cannot be reached, answers nonsense, or has another content by now; or offline.
        :raises DigestMismatchError: what came is not what was published.
        :raises PolicyError: it wants credentials, or redirects where it may not.
        :raises OSError: the disk is full, or cannot be written.
        """
        here = [self._here(file, known) for file in files]
        missing = [file for file, found in zip(files, here, strict=True) if found is None]
        if not missing:
            return [file for file in here if file is not None]
        if self._offline:
            raise self._offline_error(missing[0].name)

        from tqdm import tqdm

        sweep(self._cache.tmp)
        sizes = [file.size for file in missing]
        bar: tqdm[Any]
        with tqdm(
            total=None if None in sizes else sum(size or 0 for size in sizes),
            unit="B",
            unit_scale=True,
            desc="fetch",
            disable=not progress,
            leave=False,
            delay=0.5,
        ) as bar:
            try:
                return [found or self._bring(file, known, bar) for file, found in zip(files, here, strict=True)]
            finally:
                self.close()

    def _bring(self, file: RemoteFile, known: Known, bar: tqdm[Any]) -> FetchedFile:
        identity = Identity(url=self._url(file.name), etag=file.etag, size=file.size, sha256=file.sha256)
        with self._cache.lock(identity.key):
            # Another process may have brought it meanwhile, or another name of the same content was fetched before.
            found = self._here(file, known)
            if found is not None:
                bar.update(file.size or 0)
                return found

            return self._download(file, identity, bar)

    def _download(self, file: RemoteFile, identity: Identity, bar: tqdm[Any]) -> FetchedFile:
        for last in (False, True):
            partial = Partial.open(self._cache.tmp, identity)
            resumed = bool(partial.done)
            download = Download(self._client, partial, effort=self._effort, advance=bar.update)
            try:
                require_space(self._cache.tmp, (file.size or 0) - sum(end - start for start, end in partial.done))
                ranges = identity.resumable and (resumed or (file.size or 0) > self._effort.piece_of(file.size or 0))
                try:
                    sha256 = download.in_ranges() if ranges and not last else download.as_a_whole()
                except BadRanges as error:
                    _log.info("%s: %s; fetching it as a whole", shown(identity.url), error)
                    partial.discard()
                    bar.update(-download.reported)
                    continue
                if file.sha256 not in (None, sha256):
                    if resumed and not last:  # what was there from before may have been damaged
                        partial.discard()
                        bar.update(-download.reported)
                        continue
                    raise _mismatch(identity.url, str(file.sha256), sha256)
                path = self._cache.put(partial.fd, partial.path, sha256, file.name)
            except (OSError, DigestMismatchError):
                # It would only fill the disk further, or is of no use.
                partial.discard()
                raise
            except BaseException:
                partial.release(download.done)
                raise
            partial.finished()

            state = FileStat.from_stat(os.stat(path))
            self._note(file, sha256, state)

            return FetchedFile(name=file.name, path=path, stat=state, sha256=sha256, published=file.sha256 is not None)

        raise AssertionError("the second round ends")

    def _note(self, file: RemoteFile, sha256: str, state: FileStat) -> None:
        record = CachedFile(
            sha256=sha256,
            size=state.size,
            etag=file.etag,
            published=file.sha256 is not None,
            stat=state,
            fetched_at=time.time(),
        )
        try:
            self._cache.add(self.uri, "", {file.name: record})
        except OSError as error:
            # The file is here and good; it is only found with more effort the next time.
            _log.warning("The cache %s cannot be written, so it forgets %r: %s", self._cache.folder, file.name, error)

    def _here(self, file: RemoteFile, known: Known) -> FetchedFile | None:
        """The file, if it is on this machine: by the cache's notes, by its content, or by what the catalog knows."""
        record = self._record(self._cache.entry(self.uri), file)
        sha256 = file.sha256 if record is None else record.sha256
        if sha256 is None:
            return None

        path = self._cache.find(sha256)
        if path is not None and (state := _verified(path, sha256, None if record is None else record.stat)):
            if record is None or record.stat != state:
                self._note(file, sha256, state)
            return FetchedFile(name=file.name, path=path, stat=state, sha256=sha256, published=file.sha256 is not None)

        if file.sha256 is not None and (path := known(file.sha256)) is not None:
            try:
                found = os.stat(path)
            except OSError:
                return None
            if stat.S_ISREG(found.st_mode) and file.size in (None, found.st_size):
                return FetchedFile(
                    name=file.name, path=path, stat=FileStat.from_stat(found), sha256=sha256, published=True
                )

        return None

    def _record(self, entry: Entry | None, file: RemoteFile) -> CachedFile | None:
        """What was fetched under the name of ``file``, if that is known to be the same content."""
        record = None if entry is None else entry.files.get(file.name)
        if record is None or file.size not in (None, record.size):
            return None
        if file.sha256 is not None:
            return record if record.sha256 == file.sha256 else None
        # Offline there is nothing but the entry, of which `file` was made.
        same = file.etag == record.etag and (file.etag is not None or self._offline)

        return record if same else None


def is_plain(name: str) -> bool:
    """Whether ``name`` is nothing but the name of a file: no path, nothing that hides what it says."""
    return (
        name.isprintable()
        and name.strip() == name
        and name not in ("", ".", "..")
        and not set(name) & set("/\\")
        and len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME
    )


def _look(connection: Connection, url: httpx.URL, name: str) -> RemoteFile:
    """What the server says of a file: by HEAD, or by its first byte where it does not answer that, or not in full."""
    try:
        with connection.open("HEAD", url, {}) as response:
            file = describe(response, name)
            if file.size is not None:
                return file
    except HeadRefused:
        pass

    with connection.open("GET", url, {"Range": "bytes=0-0"}) as response:
        return describe(response, name)


def _read(
    connection: Connection, url: httpx.URL, file: RemoteFile, offset: int, size: int, patience: Patience
) -> bytes:
    headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
    if file.etag is not None:
        headers["If-Range"] = file.etag

    with connection.open("GET", url, headers) as response:
        require_same(response, file.etag, url)
        skip = 0
        try:
            require_range(response, offset, offset + size, file.size)
        except BadRanges as error:
            # The start of a file can be had without ranges, too.
            skip = offset
            if response.status_code != 200 or offset + size > _MAX_SKIP:
                raise FetchError(
                    f"{shown(url)!r} cannot be read in parts: {error}. Fetch the whole file instead."
                ) from error
        data = bytearray()
        for chunk in chunks(response, patience):
            data += chunk
            if len(data) >= skip + size:
                break

    if len(data) < skip + size:
        raise FetchError(f"{shown(url)!r} ends early: expected {size} bytes at {offset}, found {len(data) - skip}.")

    return bytes(data[skip : skip + size])


def _verified(path: Path, sha256: str, state: FileStat | None) -> FileStat | None:
    """The state of a file of the cache if it has the content that its name says; ``state`` is known to have it."""
    try:
        now = FileStat.from_stat(os.stat(path))
        if now == state:
            return now
        found, now = sha256_file(path)
    except (OSError, LadingError) as error:
        _log.warning("%s cannot be used: %s", path, error)
        return None
    if found != sha256:
        _log.warning("%s is damaged: its bytes are not the ones that were fetched. It is fetched again.", path)
        return None

    return now


def _mismatch(url: str, expected: str, found: str) -> DigestMismatchError:
    return DigestMismatchError(
        shown(url),
        f"{shown(url)!r} is not what its server publishes: expected the SHA-256 {expected}, found {found}. Nothing of "
        "it was kept. Fetch it again; if that does not help, tell its publisher.",
        expected=expected,
        found=found,
    )
