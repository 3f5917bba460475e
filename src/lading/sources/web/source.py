"""The source of ``https://`` URIs: files on any web server, kept in lading's own cache.

A URI names one file, or the index of a checkpoint whose other files are in the same folder. HTTP has no revisions, so
:attr:`Snapshot.revision` is always empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import quote, urlunsplit

from lading.errors import CheckpointNotFoundError, FetchError
from lading.sources.cache import Cache
from lading.sources.source import RemoteFile, Snapshot
from lading.sources.web.address import WebAddress, is_plain
from lading.sources.web.cached_source import CachedSource
from lading.sources.web.download import Concurrency
from lading.sources.web.netrc import authorization
from lading.sources.web.redirects import shown
from lading.sources.web.transport import Location, Timeouts


class HttpSource(CachedSource):
    """The source at an ``https://`` URI; a :class:`~lading.sources.source.Source`."""

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
        self._parts, self._name = WebAddress.from_uri(uri)
        self.inner: str | None = self._name
        super().__init__(uri, cache=cache, offline=offline, timeouts=timeouts, concurrency=concurrency)

    def address(self, name: str) -> str:
        """Return the URI of a file in the folder of the URI's file."""
        if name == self._name:
            return self.uri
        folder = self._parts.path.rpartition("/")[0]

        return urlunsplit(self._parts._replace(path=f"{folder}/{quote(name, safe='')}", fragment=""))

    def locate(self, name: str) -> Location:
        """Return the URI of the file, with the user's credentials for its server."""
        credentials = authorization(self._parts.hostname or "")

        return Location(url=self.address(name), headers={"Authorization": credentials} if credentials else {})

    def snapshot(self) -> Snapshot:
        """Return the file that the URI names; offline, as it was last fetched."""
        (file,) = self.describe([self._name])
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

        found = [file for file in self.describe(wanted) if isinstance(file, RemoteFile)]

        return replace(snapshot, files=(*snapshot.files, *found))
