"""The source of ``s3://``, ``gs://`` and ``az://`` URIs: objects in a bucket, kept in lading's own cache.

A URI names one file, as one of a web server, or a folder, whose objects are listed. obstore signs the URLs at which the
transport gets the bytes; they are renewed when they expire. Objects that cannot be had at a URL are read by obstore.

Buckets have no revisions that lading follows, so :attr:`Snapshot.revision` is always empty: the validator of an object
shows that all its ranges have the same content.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from lading.errors import CheckpointNotFoundError, LadingError, PolicyError
from lading.sources.cache import Cache
from lading.sources.cloud.address import CloudAddress
from lading.sources.cloud.bucket import VALID, Bucket
from lading.sources.cloud.calls import result_of
from lading.sources.disk import require_space
from lading.sources.hub.address import is_file_name
from lading.sources.partial import Identity, temporary_file
from lading.sources.source import FetchedFile, RemoteFile, Snapshot
from lading.sources.web.cached_source import CachedSource
from lading.sources.web.connection import Timeouts
from lading.sources.web.download import Concurrency
from lading.sources.web.responses import Answer
from lading.sources.web.transport import Location
from lading.system.filesystem import FileStat

if TYPE_CHECKING:
    from tqdm import tqdm

_PIECE = 8 << 20
_PARALLEL = 8
"""The pieces of an object that obstore reads at a time, where the transport cannot."""


class CloudSource(CachedSource):
    """The source at the URI of an object store; a :class:`~lading.sources.source.Source`."""

    def __init__(
        self,
        uri: str,
        *,
        inner_path: str | None = None,
        cache: Cache,
        offline: bool,
        timeouts: Timeouts | None = None,
        concurrency: Concurrency | None = None,
    ) -> None:
        """
        :param inner_path: the checkpoint, relative to ``uri`` if that names a folder.
        :param offline: whether to use only the cache and open no socket.

        :raises AddressError: the URI is not valid.
        :raises NotSupportedError: obstore is not installed.
        :raises PolicyError: ``inner_path`` leads out of the folder.
        """
        super().__init__(uri, cache=cache, offline=offline, timeouts=timeouts, concurrency=concurrency)
        self._address = CloudAddress.from_uri(uri)
        self.lists = not self._address.is_file
        self.inner = _inner(self._address, inner_path)

    @cached_property
    def _bucket(self) -> Bucket:
        return Bucket(self._address)

    def address(self, name: str) -> str:
        """Return the URI of a file in the folder."""
        return self._address.uri_of(name)

    def locate(self, name: str) -> Location:
        """Return a URL by which the object can be had for a while."""
        url = self._bucket.url(self._address.key_of(name))
        assert url is not None  # see `_has_urls`

        return Location(url=url, expires=time.time() + VALID.total_seconds())

    def refused(self, response: Answer) -> LadingError:
        """Return the error for a response, with the name of the object and without the signature."""
        key = unquote(response.url.path or "").lstrip("/").removeprefix(f"{self._address.bucket}/")

        return self._bucket.refusal(f"{self._bucket.uri}/{key}", response.status)

    @cached_property
    def _has_urls(self) -> bool:
        """True if objects can be had at URLs; else obstore reads them."""
        return self._bucket.url(self._address.key_of("any")) is not None

    def close(self) -> None:
        """End all requests, as :meth:`CachedSource.close` does."""
        super().close()
        if (bucket := vars(self).get("_bucket")) is not None:  # no request has needed it otherwise
            bucket.close()

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the objects in the folder, or the one that the URI names; offline, those that were fetched."""
        if not self.lists and self.inner is not None:
            names = [self.inner]
        elif self._offline:
            names = self._local.names()
        else:
            files = self._bucket.files(self._address.folder)
            if not files:
                raise CheckpointNotFoundError(
                    self.uri,
                    f"{self.uri}: expected a folder of an object store, found no objects whose keys begin with "
                    f"{self._address.folder + '/'!r}. Check the address.",
                )
            return Snapshot(uri=self.uri, revision="", files=tuple(files))

        found = self.describe(names)
        if not found:
            raise self._offline_error(self._address.folder)
        for file in found:
            if isinstance(file, CheckpointNotFoundError):
                raise file
        files = [file for file in found if isinstance(file, RemoteFile)]

        return Snapshot(uri=self.uri, revision="", files=tuple(files), partial=self.lists)

    def _request_description(self, name: str, stop: threading.Event) -> RemoteFile:
        return self._bucket.describe(self._address.key_of(name), name)

    # --- bytes -------------------------------------------------------------------------------------------------------

    def _read_range(self, file: RemoteFile, offset: int, into: memoryview) -> None:
        if self._has_urls:
            super()._read_range(file, offset, into)
        else:
            self._bucket.read(self._address.key_of(file.name), offset, into, file.etag)

    def _download(self, file: RemoteFile, identity: Identity, bar: tqdm[Any]) -> FetchedFile:
        if self._has_urls:
            return super()._download(file, identity, bar)
        size = file.size
        if size is None:
            size = self._bucket.describe(self._address.key_of(file.name), file.name).size
        assert size is not None  # obstore always states it
        require_space(self._cache.tmp, size)
        hasher = sha256()
        with temporary_file(self._cache.tmp, "object") as (opened, path), ThreadPoolExecutor(_PARALLEL) as pool:

            def piece(start: int) -> bytearray:
                data = bytearray(min(_PIECE, size - start))
                self._read_range(file, start, memoryview(data))
                return data

            try:
                for first in range(0, size, _PIECE * _PARALLEL):
                    starts = range(first, min(first + _PIECE * _PARALLEL, size), _PIECE)
                    for data in map(result_of, [pool.submit(piece, start) for start in starts]):
                        hasher.update(data)
                        opened.write(data)
                        bar.update(len(data))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._bucket.close()  # or the end of the block would wait for all answers
                raise
            opened.flush()
            path = self._cache.put(opened.fileno(), path, hasher.hexdigest(), file.name)
            state = FileStat.from_stat(os.stat(path))
        self._local.note(file, hasher.hexdigest(), state)

        return FetchedFile(name=file.name, path=path, stat=state, sha256=hasher.hexdigest(), published=False)


def _inner(address: CloudAddress, inner_path: str | None) -> str | None:
    if address.is_file:
        return address.name
    inner = None if inner_path is None else inner_path.rstrip("/")
    if inner is not None and not is_file_name(inner):
        raise PolicyError(f"`checkpoint_path` must be a path inside the checkpoint, but is {inner_path!r}.")

    return inner
