"""lading's own cache of fetched files, addressed by their content and readable without a catalog.

::

    blobs/ab/abcd….safetensors    a file, under its SHA-256 and an extension that lading chose; read-only
    entries/0123….4567….json      the files that a catalog fetched from a URI: their digests, sizes and validators
    tmp/                          files that are being written, or were when their process ended
    locks/                        advisory locks on URIs, if the file system supports locks

Correctness does not depend on locks. A file appears under its name by a rename, once it is complete and on the disk;
entries are replaced by renames, too. Files that a crash leaves in ``tmp`` are resumed or removed later.

Several catalogs may share a cache. Each one writes and removes only its own entries; a file is removed with the last
entry that refers to it. A file state recorded by another catalog is not trusted: the bytes are hashed once.

No file name in the cache comes from a server, the cache holds no links, and no entry holds the secrets of an address.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lading.errors import LadingError
from lading.sources.partial import advisory_lock, temporary_file
from lading.sources.sha256 import sha256_file
from lading.system.filesystem import FileStat, sync_folder
from lading.system.uris import shown_uri

_EXTENSIONS = {"safetensors", "json", "pt", "pth", "bin", "ckpt", "tar", "model", "txt"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOB = re.compile(r"([0-9a-f]{64})\.([a-z]+)")
_ENTRY = re.compile(r"([0-9a-f]{64})(?:\.([0-9a-f]{16}))?\.json")
_MAX_ENTRY = 64 << 20
"""The most bytes of an entry; a thousand shards need 400 KB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedFile:
    """A fetched file, as its entry records it."""

    sha256: str
    size: int
    etag: str | None
    """The validator of the file when it was fetched."""
    published: bool
    """True if the source published the digest."""
    stat: FileStat | None
    """The state in which the file had the digest; ``None`` if it must be hashed again."""
    fetched_at: float
    """The time of the fetch, in seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The files that one catalog fetched from one URI."""

    uri: str
    """The URI without its secrets."""
    key: str
    """The SHA-256 of the complete URI, which identifies the entry."""
    catalog: str = ""
    """The catalog that fetched it, see :attr:`lading.system.settings.Settings.catalog_id`; empty if unknown."""
    files: Mapping[str, CachedFile]
    """The files, by their names within the source."""


class Cache:
    """A folder of fetched files, as one catalog uses it. The folder is created when a file is added."""

    def __init__(self, folder: Path, *, catalog: str = "") -> None:
        """:param catalog: the catalog whose entries are read and written, see
        :attr:`lading.system.settings.Settings.catalog_id`.
        """
        self.folder = folder
        self.catalog = catalog

    # --- files -------------------------------------------------------------------------------------------------------

    def blob(self, sha256: str, name: str) -> Path:
        """Return the path for the file with this digest; the server's ``name`` only determines the extension."""
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"`sha256` must be 64 lower-case hexadecimal digits, but is {sha256!r}.")
        extension = name.rpartition(".")[2].lower()

        return self.folder / "blobs" / sha256[:2] / f"{sha256}.{extension if extension in _EXTENSIONS else 'blob'}"

    def find(self, sha256: str) -> Path | None:
        """Return the path of the file with this digest; ``None`` if it is not here. Its bytes are not read."""
        if not _SHA256.fullmatch(sha256):
            return None
        folder = self.folder / "blobs" / sha256[:2]
        for extension in ("safetensors", "json", *sorted(_EXTENSIONS - {"safetensors", "json"}), "blob"):
            path = folder / f"{sha256}.{extension}"
            with suppress(OSError):
                if stat.S_ISREG(os.lstat(path).st_mode):
                    return path

        return None

    def put(self, fd: int, path: Path, sha256: str, name: str) -> Path:
        """Move the complete file ``path``, open as ``fd``, to its place in the cache.

        :returns: the new path.
        """
        blob = self.blob(sha256, name)
        # An existing file may be in use, and be recorded with its state, so it stays unless it is damaged.
        with suppress(LadingError, OSError):
            if sha256_file(blob)[0] == sha256:
                path.unlink()
                return blob

        _make_folder(blob.parent)
        os.fchmod(fd, 0o444)
        os.fsync(fd)
        path.rename(blob)
        sync_folder(blob.parent)

        return blob

    def repacked_files(self) -> list[Path]:
        """Return the files that ``lading repack`` made before it was removed; no load reads them."""
        return sorted(path for path in _files(self.folder / "repacked") if path.suffix == ".safetensors")

    # --- entries -----------------------------------------------------------------------------------------------------

    def entry(self, uri: str) -> Entry | None:
        """Return the entry of this catalog for ``uri``; ``None`` without one, or if it cannot be read."""
        entry = self._read_entry(self._entry_path(entry_key(uri)))

        return entry if entry is not None and entry.uri == shown_uri(uri) else None

    def others(self, uri: str) -> Iterator[Entry]:
        """Yield the entries of other catalogs for ``uri``, without the states of their files."""
        key = entry_key(uri)
        for path in self._entry_files():
            if path.name.startswith(key) and path != self._entry_path(key) and (entry := self._read_entry(path)):
                yield entry

    def entries(self) -> Iterator[Entry]:
        """Yield all entries in arbitrary order, except damaged ones."""
        for path in self._entry_files():
            if (entry := self._read_entry(path)) is not None:
                yield entry

    def has_unknown_entries(self) -> bool:
        """Return whether there may be entries that cannot be read: damaged, or not accessible to this user."""
        try:
            os.scandir(self.folder / "entries").close()
        except FileNotFoundError:
            return False
        except OSError:
            return True

        return any(self._read_entry(path) is None for path in self._entry_files())

    def files_of_others(self) -> set[str]:
        """Return the SHA-256 of other users' files, if there may be entries that cannot be read; else nothing."""
        if not self.has_unknown_entries():
            return set()

        return {path.name[:64] for path, found in self._blobs() if found.st_uid != os.geteuid()}

    def add(self, uri: str, files: Mapping[str, CachedFile]) -> None:
        """Record the files that this catalog fetched from ``uri``, and keep the records of others.

        If two processes do so at once, one record may be lost; its file is then found by its content or fetched again.
        """
        before = self.entry(uri)
        if before is not None:
            files = {**before.files, **files}

        path = self._entry_path(entry_key(uri))
        _make_folder(path.parent)
        with temporary_file(self.tmp, "entry") as (file, name):
            # Whatever the umask, others must not write to it: entries that others can write are not trusted.
            mode = 0o600 if shown_uri(uri) != uri else stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o644
            os.fchmod(file.fileno(), mode)
            file.write(json.dumps(_to_json(uri, files), indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
            name.rename(path)
        sync_folder(path.parent)

    def remove(self, uri: str | Entry, *, also: Collection[str] = (), keep: Collection[str] = ()) -> int:
        """Remove the entry of this catalog for ``uri``, and the files that no other entry refers to.

        :param also: the SHA-256 of other files to remove, even if the entry does not list them.
        :param keep: the SHA-256 of files to keep.

        :returns: the number of bytes freed.
        """
        paths = self.removable(uri, also=also, keep=keep)
        # The entry goes first: after a crash in between, a file without an entry is harmless.
        with suppress(FileNotFoundError):
            self._entry_path(uri.key if isinstance(uri, Entry) else entry_key(uri)).unlink()
            sync_folder(self.folder / "entries")

        return sum(map(_unlink, paths))

    def removable(self, uri: str | Entry, *, also: Collection[str] = (), keep: Collection[str] = ()) -> list[Path]:
        """Return the files that :meth:`remove` removes."""
        key = uri.key if isinstance(uri, Entry) else entry_key(uri)
        entry = self._read_entry(self._entry_path(key))
        wanted = set(also) | (set() if entry is None else {file.sha256 for file in entry.files.values()})
        needed = {
            file.sha256
            for other in self.entries()
            if (other.key, other.catalog) != (key, self.catalog)
            for file in other.files.values()
        }
        gone = wanted - needed - set(keep)
        if gone:
            gone -= self.files_of_others()

        return [path for path in self.files() if path.name[:64] in gone] if gone else []

    def files(self) -> list[Path]:
        """Return all fetched files, including those without an entry."""
        return [path for path, _ in self._blobs()]

    def digest_of(self, path: Path) -> str | None:
        """Return the SHA-256 under which ``path`` is kept; ``None`` if it is not a file of this cache."""
        inside = path.parent.parent == self.folder / "blobs" and _BLOB.fullmatch(path.name) is not None

        return path.name[:64] if inside else None

    # --- temporary files and locks -----------------------------------------------------------------------------------

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    @contextmanager
    def lock(self, key: str) -> Iterator[bool]:
        """Keep other processes from fetching the same file, on a best-effort basis, to save bandwidth.

        They wait as long as this process gives signs of life.

        :returns: whether this process had to wait.
        """
        with advisory_lock(self.folder / "locks", key, written=self.tmp) as waited:
            yield waited

    def _blobs(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in sorted(_folders(self.folder / "blobs")):
            for path in sorted(_files(folder)):
                if _BLOB.fullmatch(path.name):
                    with suppress(FileNotFoundError):
                        yield path, os.lstat(path)

    def _entry_path(self, key: str) -> Path:
        return self.folder / "entries" / f"{key}{self.catalog and '.'}{self.catalog}.json"

    def _entry_files(self) -> list[Path]:
        return sorted(path for path in _files(self.folder / "entries") if _ENTRY.fullmatch(path.name))

    def _read_entry(self, path: Path) -> Entry | None:
        entry = _read_entry(path)
        if entry is None or entry.catalog == self.catalog:
            return entry

        return _without_states(entry)


def entry_key(uri: str) -> str:
    """Return the key of the entries for a URI, which does not reveal the URI."""
    return hashlib.sha256(uri.encode()).hexdigest()


def _without_states(entry: Entry) -> Entry:
    """Return the entry without file states, which are not trusted if others could have written them."""
    return replace(entry, files={name: replace(file, stat=None) for name, file in entry.files.items()})


def _to_json(uri: str, files: Mapping[str, CachedFile]) -> dict[str, Any]:
    def to_json(file: CachedFile) -> dict[str, Any]:
        state = None if file.stat is None else [file.stat.mtime_ns, file.stat.ctime_ns, file.stat.inode]
        return {**asdict(file), "stat": state}

    return {
        "uri": shown_uri(uri),
        "whole": shown_uri(uri) == uri,
        "revision": "",  # earlier versions of lading expect it
        "files": {name: to_json(file) for name, file in files.items()},
    }


def _read_entry(path: Path) -> Entry | None:
    """Read an entry; return ``None`` if it is not valid, so that its files are fetched again."""
    match = _ENTRY.fullmatch(path.name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            if match is None or not stat.S_ISREG(found.st_mode):
                return None
            document = json.loads(file.read(_MAX_ENTRY))
        uri = document["uri"]
        if entry_key(uri) != match[1] and document["whole"] is not False:
            return None
        files = {str(name): _file_from_json(value) for name, value in document["files"].items()}
        entry = Entry(uri=uri, key=match[1], catalog=match[2] or "", files=files)
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RecursionError):
        return None

    ours = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    return entry if ours else _without_states(entry)


def _file_from_json(value: dict[str, Any]) -> CachedFile:
    sha256, size, etag, state = value["sha256"], value["size"], value["etag"], value["stat"]
    if not _SHA256.fullmatch(sha256) or type(size) is not int or not isinstance(etag, str | None):
        raise ValueError(value)

    return CachedFile(
        sha256=sha256,
        size=size,
        etag=etag,
        published=value["published"] is True,
        stat=None if state is None else FileStat(size, *map(int, state)),
        fetched_at=float(value["fetched_at"]),
    )


def _make_folder(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent)


def _unlink(path: Path) -> int:
    """Remove a file if it exists; return the number of bytes freed."""
    try:
        size = os.lstat(path).st_size
        path.unlink()
    except FileNotFoundError:
        return 0

    return size


def _files(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(folder) as entries:
        yield from [Path(entry.path) for entry in entries if entry.is_file(follow_symlinks=False)]


def _folders(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(folder) as entries:
        yield from [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
