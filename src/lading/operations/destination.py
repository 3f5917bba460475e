"""The places that models are exported to: a folder, or a folder of an object store.

Either is complete or absent, for those who look for a checkpoint there. A folder is written beside its place and then
renamed. In an object store, each object appears complete, in the order in which they are written: the index of the
shards and ``config.json`` last.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from lading.errors import LadingError, NotSupportedError
from lading.formats.config_json import CONFIG_NAME
from lading.formats.folder import some_names
from lading.formats.safetensors_writer import Output
from lading.operations.atomic_folder import atomic_folder, require_empty
from lading.sources.cloud.address import SCHEMES, CloudAddress
from lading.sources.cloud.bucket import Bucket
from lading.sources.disk import require_space
from lading.system.uris import shown_uri, uri_path

Place = Path | str
"""A folder, or the address of a folder in an object store."""


class Destination(Protocol):
    """A place that files are written to."""

    def require_space(self, size: int) -> None:
        """Require that the place has room for ``size`` bytes, as far as that is known.

        :raises OSError: it has not.
        """

    def create(self, name: str, size: int) -> AbstractContextManager[Output]:
        """Create a file of about ``size`` bytes, which is complete at the end of the block, or absent after an error.

        :raises OSError: the disk is full, or cannot be written.
        :raises FetchError: the object store cannot be reached.
        :raises PolicyError: it refuses the credentials.
        """

    def sizes(self) -> Mapping[str, int]:
        """Return the sizes in bytes of the files that are there, by name."""


def place_of(place: Path | str) -> Place:
    """Return the place that an argument means: the address of an object store, or else a path.

    :raises AddressError: the address is not valid.
    :raises NotSupportedError: it is one that nothing can be exported to.
    """
    if isinstance(place, Path):
        return place
    scheme, colon, _ = place.partition("://")
    if not colon:
        return Path(place)
    if (path := uri_path(place)) is not None:
        return path
    if scheme.lower() not in SCHEMES:
        raise NotSupportedError(
            f"Expected a folder, or a folder of an object store such as s3://bucket/folder, found {shown_uri(place)!r}."
        )
    uri = place.rstrip("/")

    # With the suffix of a file, only a slash at its end makes it the address of a folder.
    return f"{uri}/" if CloudAddress.from_uri(uri).is_file else uri


def require_new(place: Place) -> None:
    """Require that nothing is at a place, or an empty folder.

    :raises FileExistsError: something else is.
    :raises FetchError: the object store cannot be reached.
    :raises PolicyError: it refuses the credentials.
    """
    if isinstance(place, Path):
        require_empty(place)
        return
    found = _CloudFolder(place).sizes()
    if found:
        left = "" if CONFIG_NAME in found else f" without {CONFIG_NAME}, as an export that was broken off leaves it"
        names = some_names(sorted(found))
        raise FileExistsError(
            errno.EEXIST,
            f"expected no objects there, but found {names}{left}; remove them, or choose another place",
            place,
        )


@contextmanager
def new_place(place: Place) -> Iterator[Place]:
    """Yield the place to write to, for :func:`open_destination` on all ranks. One rank calls this.

    :raises FileExistsError: something is there, see :func:`require_new`.
    :raises OSError: the disk is full, or cannot be written.
    """
    if isinstance(place, Path):
        with atomic_folder(place) as temporary:
            yield temporary
        return
    require_new(place)
    yield place


@contextmanager
def open_destination(place: Place) -> Iterator[Destination]:
    """Open the place of :func:`new_place`. If the block ends with an exception, what it wrote there is removed."""
    if isinstance(place, Path):
        yield _Folder(place)
        return
    folder = _CloudFolder(place)
    try:
        yield folder
    except BaseException:
        folder.remove_created()
        raise


class _Folder:
    """A new folder, which its owner removes after an error."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def require_space(self, size: int) -> None:
        require_space(self._folder, size)

    @contextmanager
    def create(self, name: str, size: int) -> Iterator[Output]:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def sizes(self) -> Mapping[str, int]:
        files = [path for path in sorted(self._folder.rglob("*")) if path.is_file()]

        return {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in files}


class _CloudFolder:
    """A folder of an object store."""

    def __init__(self, uri: str) -> None:
        self._address = CloudAddress.from_uri(uri)
        self._bucket = Bucket(self._address)
        self._created: list[str] = []

    def require_space(self, size: int) -> None:
        pass  # a bucket has no bounds

    @contextmanager
    def create(self, name: str, size: int) -> Iterator[Output]:
        key = self._address.key_of(name)
        self._created.append(key)
        with self._bucket.create(key, size) as file:
            yield file

    def sizes(self) -> Mapping[str, int]:
        return {file.name: file.size or 0 for file in self._bucket.files(self._address.folder)}

    def remove_created(self) -> None:
        # In the reverse order: what makes others a checkpoint goes first.
        with suppress(LadingError):  # the error that led here says more
            self._bucket.delete(self._created[::-1])
