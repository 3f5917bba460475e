"""Manifests of remote checkpoints, read from their index and headers only.

The same code reads local files. Here each read costs a round trip, so the first read of a file requests as many bytes
as its header probably has, and shards are read concurrently.
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
from lading.formats.folder import (
    METADATA_NAME,
    checkpoint_file,
    is_index,
    is_other_format,
    is_torch_format,
    not_supported,
    some_names,
)
from lading.formats.manifest import Manifest
from lading.formats.safetensors import PREFIX_SIZE, Part, join, read_header
from lading.formats.shard_index import join_shards, read_index

MAX_READ = 256_000_000
"""The most bytes read of one checkpoint. The headers of the largest published ones have some 30 MB together."""

MAX_THREADS = 16
"""The most files that are read concurrently."""

_GUESS = 1 << 18
"""The bytes of the first read if no index lists the tensors of a file: enough for some 2,000 of them."""

_LARGEST_GUESS = 1 << 24
_METADATA_SIZE = 1 << 12
_ENTRY_SIZE = 128
"""The bytes of a tensor's entry in a header, without its name: 75 to 115 by most writers."""


class NotByHeadersError(NotSupportedError):
    """A checkpoint that cannot be indexed before it is fetched, as its tensors are not listed in a header."""


class Files(Protocol):
    """The files of a checkpoint. Their content is not trusted, and their names are only compared."""

    @property
    def label(self) -> str:
        """The address of the folder that holds them, for errors."""

    def names(self) -> Collection[str]:
        """Return the names of all files, with forward slashes for those in folders."""

    def size(self, name: str) -> int:
        """Return the size in bytes of a file among :meth:`names`."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read exactly ``size`` bytes of a file, starting at ``offset``. Several threads call it.

        :raises LadingError: the bytes cannot be read.
        """


def index_files(files: Files, *, name: str | None = None) -> Manifest:
    """Return the manifest of a checkpoint, in the order (shard, offset).

    It equals the result of :func:`lading.formats.index` for a folder with these files.

    :param name: a safetensors file among ``files``, an index of several, or a folder; default: the folder of all.

    :raises CheckpointNotFoundError: the file does not exist, or that folder holds no checkpoint.
    :raises NotByHeadersError: ``torch.save`` wrote it.
    :raises NotSupportedError: its format is not supported.
    :raises CorruptModelCheckpointError: a file breaks the rules of its format, or has another size than stated; a file
        that the index names is missing; or headers and index have more than :data:`MAX_READ` bytes together.

    Errors of ``files.read`` are passed on.
    """
    names = frozenset(files.names())
    folder, file = find_checkpoint(files.label, names, name)
    where = f"{files.label.rstrip('/')}/{folder}{file}"
    if is_torch_format(file):
        raise _not_by_headers(where)
    if file == METADATA_NAME:
        raise NotSupportedError(
            f"{where}: expected a safetensors checkpoint, found one of `torch.distributed.checkpoint`, which can only "
            "be read locally. Fetch the folder, and give its path."
        )
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

    :param guess: the bytes of the first read; if they hold the whole header, no other read follows.

    :raises NotByHeadersError: ``torch.save`` wrote the file.
    """
    first = file.read(0, min(guess, file.size))
    if format_of(first[:SIZE], name=file.name, label=file.label) == "torch":
        raise _not_by_headers(file.label)

    return read_header(file, first=first)


def _not_by_headers(where: str) -> NotByHeadersError:
    return NotByHeadersError(
        f"{where}: expected a safetensors checkpoint, found a file of `torch.save`, which can only be read locally. "
        "Fetch it, and index the local file."
    )


def index_names(files: Files, *, name: str | None = None) -> list[str]:
    """Return the names, among ``files``, of the shards that a checkpoint's index lists; none for a single file.

    Raises what :func:`index_files` does.
    """
    folder, file = find_checkpoint(files.label, frozenset(files.names()), name)
    if not is_index(file):
        return []

    return [folder + shard for shard in read_index(_Reader(files, folder).open(file)).tensors]


def find_checkpoint(label: str, names: Collection[str], name: str | None) -> tuple[str, str]:
    """Return the folder of a checkpoint, with a slash at its end unless it is the top one, and the file to read first.

    The parameters and errors are those of :func:`index_files`.

    :param label: the address of the folder that holds ``names``.
    """
    if name is not None and name in names:
        folder, slash, file = name.rpartition("/")
        return folder + slash, file

    folder = "" if name is None else f"{name.strip('/')}/"
    inside = [each.removeprefix(folder) for each in names if each.startswith(folder)]
    if name is not None and not inside:
        raise CheckpointNotFoundError(
            f"{label.rstrip('/')}/{name}",
            f"{label}: expected {name!r}, found {some_names(sorted(names)) or 'no files'}.",
        )

    return folder, checkpoint_file(inside, where=f"{label.rstrip('/')}/{folder}".rstrip("/"), torch=True)


def _header_size(tensors: Iterable[str]) -> int:
    """Estimate the bytes of the header of a file with these tensors, on the high side."""
    size = PREFIX_SIZE + _METADATA_SIZE + sum(len(name.encode()) + _ENTRY_SIZE for name in tensors)

    return min(size, _LARGEST_GUESS)


class _Reader:
    """A reader of the files in a folder, which checks the number of bytes of each read and in total."""

    def __init__(self, files: Files, folder: str) -> None:
        self._files = files
        self._folder = folder
        self._left = MAX_READ
        self._lock = Lock()

    def open(self, name: str) -> File:
        """Open a file of the folder.

        :raises CorruptModelCheckpointError: its size is negative. Its ``read`` raises it if a read returns another
            number of bytes, or if too many bytes are read in total.
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
                    hint="Fetch it, and index the local files.",
                )

        data = self._files.read(path, offset, size)
        if len(data) != size:
            raise corrupt(label, f"bytes {offset} to {offset + size}", expected=f"{size} bytes", found=f"{len(data)}")

        return data
