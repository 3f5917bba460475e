"""The source of ``https://`` URIs: files on any web server, kept in lading's own cache.

A URI names one file, or the index of a checkpoint whose other files are in the same folder. HTTP has no revisions, so
:attr:`Snapshot.revision` is always empty.
"""

from __future__ import annotations

from urllib.parse import quote, urlunsplit

from lading.errors import CheckpointNotFoundError
from lading.sources.cache import Cache
from lading.sources.source import Snapshot
from lading.sources.web.address import WebAddress
from lading.sources.web.cached_source import CachedSource
from lading.sources.web.connection import Timeouts
from lading.sources.web.download import Concurrency
from lading.sources.web.netrc import authorization
from lading.sources.web.transport import Location


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
