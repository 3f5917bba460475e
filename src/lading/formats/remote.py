"""Checkpoints that are elsewhere: their manifest, by reading their index and headers only.

The rules are those for files on this machine, in the same code. What differs is the way of the bytes: a read costs a
round trip, so the first one of a file asks for as much as its header is likely to have, and shards are read at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Protocol

from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.formats.files import File, corrupt
from lading.formats.first_bytes import SIZE, format_of
from lading.formats.folder import checkpoint_file, is_index, is_other_format, is_torch_format, not_supported, some
from lading.formats.manifest import Manifest
from lading.formats.safetensors import PREFIX_SIZE, Part, join, read_header
from lading.formats.shard_index import join_shards, read_index

MAX_READ = 256_000_000
"""Bytes that are read of one checkpoint, in all. The largest that are published have headers of some 30 MB together."""

MAX_THREADS = 16
"""Files that are read at once."""

_GUESS = 1 << 18
"""Bytes of the first read where no index tells how many tensors a file holds: good for some 2,000."""

_LARGEST_GUESS = 1 << 24
_METADATA_SIZE = 1 << 12
_ENTRY_SIZE = 128
"""Bytes of a tensor in a header, its name apart: from 75 to 115, as most writers write it."""


class NotByHeadersError(NotSupportedError):
    """A checkpoint of which nothing is known before it was fetched: where its tensors are takes a read for each."""


class Files(Protocol):
    """The files of a checkpoint, wherever they are. What they say is not trusted, and their names are only compared."""

    @property
    def label(self) -> str:
        """The address of the folder that holds them, for errors."""

    def names(self) -> Collection[str]:
        """All files, with forward slashes where some are in folders."""

    def size(self, name: str) -> int:
        """The bytes of a file among :meth:`names`."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes of a file, from ``offset`` on, all of them within its size. Called by several threads.

        :raises LadingError: it cannot.
        """


def index_files(files: Files, *, name: str | None = None) -> Manifest:
    """The manifest of a checkpoint, with its columns in the order (shard, offset).

    It is the one that :func:`lading.formats.index` gives of a folder with these files.

    :param name: a safetensors file among ``files``, an index of several, or a folder; default: the folder of all.

    :raises CheckpointNotFoundError: there is no such file, or no checkpoint in that folder.
    :raises NotByHeadersError: it was written by ``torch.save``.
    :raises NotSupportedError: what is there is of a format that is not read here.
    :raises CorruptModelCheckpointError: a file breaks the rules of its format, or has other bytes than was said; one
        that the index names is missing; or headers and index together have more than :data:`MAX_READ` bytes.

    Whatever ``files.read`` raises is passed on.
    """
    names = frozenset(files.names())
    folder, file = find_checkpoint(files.label, names, name)
    where = f"{files.label.rstrip('/')}/{folder}{file}"
    if is_torch_format(file):
        raise _not_by_headers(where)
    if is_other_format(file):
        raise not_supported(where, repr(file))

    reader = _Reader(files, folder)
    if not is_index(file):
        return join([_read_part(reader.open(file), _GUESS)])

    index = read_index(reader.open(file))

    def read_shard(shard: str, tensors: Sequence[str]) -> Part | None:
        if folder + shard not in names:
            return None
        return _read_part(reader.open(shard), _header_size(tensors))

    with ThreadPoolExecutor(min(MAX_THREADS, len(index.tensors)), thread_name_prefix="lading-index") as pool:
        try:
            parts = list(pool.map(read_shard, index.tensors.keys(), index.tensors.values()))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    return join_shards(index, parts)


def _read_part(file: File, guess: int) -> Part:
    """Read the header of a safetensors file.

    :param guess: bytes to read at first. Where the header ends within them, one read is all.

    :raises NotByHeadersError: its first bytes say that ``torch.save`` wrote it.
    """
    first = file.read(0, min(guess, file.size))
    if format_of(first[:SIZE], name=file.name, label=file.label) == "torch":
        raise _not_by_headers(file.label)

    return read_header(file, first=first)


def _not_by_headers(where: str) -> NotByHeadersError:
    return NotByHeadersError(
        f"{where}: expected a safetensors checkpoint, found a file of `torch.save`, which is read on this machine "
        "only. Fetch it, and index it here."
    )


def index_names(files: Files, *, name: str | None = None) -> list[str]:
    """The names, among ``files``, of the shards that a checkpoint's index speaks of; none where it is a single file.

    Raises what :func:`index_files` does.
    """
    folder, file = find_checkpoint(files.label, frozenset(files.names()), name)
    if not is_index(file):
        return []

    return [folder + shard for shard in read_index(_Reader(files, folder).open(file)).tensors]


def find_checkpoint(label: str, names: Collection[str], name: str | None) -> tuple[str, str]:
    """The folder, with a slash behind it unless it is that of all files, and the file in it to begin with.

    Takes and raises what :func:`index_files` does.

    :param label: the address of the folder that holds ``names``.
    """
    if name is not None and name in names:
        folder, slash, file = name.rpartition("/")
        return folder + slash, file

    folder = "" if name is None else f"{name.strip('/')}/"
    inside = [each.removeprefix(folder) for each in names if each.startswith(folder)]
    if name is not None and not inside:
        raise CheckpointNotFoundError(
            f"{label.rstrip('/')}/{name}", f"{label}: expected {name!r}, found {some(sorted(names)) or 'no files'}."
        )

    return folder, checkpoint_file(inside, where=f"{label.rstrip('/')}/{folder}".rstrip("/"), torch=True)


def _header_size(tensors: Iterable[str]) -> int:
    """Bytes that the header of a file with these tensors is unlikely to exceed."""
    size = PREFIX_SIZE + _METADATA_SIZE + sum(len(name.encode()) + _ENTRY_SIZE for name in tensors)

    return min(size, _LARGEST_GUESS)


class _Reader:
    """Reads files of a folder, and makes sure that no more and no other comes than what was asked for."""

    def __init__(self, files: Files, folder: str) -> None:
        self._files = files
        self._folder = folder
        self._left = MAX_READ
        self._lock = Lock()

    def open(self, name: str) -> File:
        """A file of the folder.

        :raises CorruptModelCheckpointError: (its ``read``, too) it has other bytes than was said, or too many.
        """
        path = self._folder + name
        label = f"{self._files.label.rstrip('/')}/{path}"
        size = self._files.size(path)
        if size < 0:
            raise corrupt(label, "", expected="a size of 0 bytes or more", found=f"{size}")

        return File(name=name, label=label, size=size, read=partial(self._read, path, label))

    def _read(self, path: str, label: str, offset: int, size: int) -> bytes:
        if size == 0:
            return b""

        with self._lock:
            self._left -= size
            if self._left < 0:
                raise corrupt(
                    label,
                    "",
                    expected=f"a checkpoint whose headers and index have at most {MAX_READ} bytes together",
                    found="more",
                    hint="Fetch it, and index the files on this machine.",
                )

        data = self._files.read(path, offset, size)
        if len(data) != size:
            raise corrupt(label, f"bytes {offset} to {offset + size}", expected=f"{size} bytes", found=f"{len(data)}")

        return data
