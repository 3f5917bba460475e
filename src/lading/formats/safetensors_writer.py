"""Writer of safetensors files, one tensor at a time.

Source: https://github.com/huggingface/safetensors, the section *Format*. :mod:`.safetensors` reads such files, and
explains their rules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from lading.errors import InternalError
from lading.formats.folder import FILE_NAME
from lading.formats.manifest import BITS
from lading.formats.safetensors import MAX_HEADER_SIZE, MAX_NAME_SIZE, PREFIX_SIZE

METADATA: Mapping[str, str] = {"format": "pt"}
"""The metadata that transformers requires in each file: the tensors have the layout of torch."""

_OFFSET_DIGITS = 20
"""More digits than any offset has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor to write."""

    name: str
    dtype: str
    """The dtype, a key of :data:`lading.formats.manifest.BITS`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def size(self) -> int:
        """An upper bound of the bytes that the tensor takes in a file, its header entry included."""
        header = len(json.dumps(self.name)) + len(_entry(self, 0)) + 2 * _OFFSET_DIGITS

        return self.nbytes + header


def shards_of(entries: Sequence[Entry], shard_size: int) -> list[list[int]]:
    """Distribute tensors over files; return the positions in ``entries`` of the tensors of each file.

    Files are filled in the order of ``entries``. Within a file, tensors of wide elements come first, so that all are
    aligned.

    :param shard_size: the most bytes of a file, unless a single tensor has more.
    """
    fixed = PREFIX_SIZE + len(json.dumps({"__metadata__": METADATA})) + 8
    shards: list[list[int]] = [[]]
    size = fixed
    for i, entry in enumerate(entries):
        if shards[-1] and size + entry.size > shard_size:
            shards.append([])
            size = fixed
        shards[-1].append(i)
        size += entry.size

    return [sorted(shard, key=lambda i: -BITS[entries[i].dtype]) for shard in shards]


def shard_names(count: int) -> list[str]:
    """Return the names of ``count`` files, as transformers names them."""
    return [FILE_NAME] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def index_of(shards: Mapping[str, Sequence[Entry]]) -> dict[str, object]:
    """Return the content of the index of a checkpoint of several files.

    :param shards: the tensors of each file, by the file's name.
    """
    entries = [entry for shard in shards.values() for entry in shard]

    return {
        "metadata": {
            "total_parameters": sum(math.prod(entry.shape) for entry in entries),
            "total_size": sum(entry.nbytes for entry in entries),
        },
        "weight_map": {entry.name: name for name, shard in shards.items() for entry in shard},
    }


class Output(Protocol):
    """A file that is being written: on a disk, or in an object store."""

    @property
    def name(self) -> str:
        """Its path or its address, for errors."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Write all bytes of ``data``."""


class Writer:
    """A writer of one file, which writes the header first.

    ::

        with Writer(file, entries) as writer:
            for entry in entries:
                writer.write(data)

    :param file: the file, opened to be written and empty; the caller closes it.
    :param entries: all tensors of the file, in the order of their bytes.

    :raises InternalError: a tensor cannot be written in this format, there are too many of them, or their bytes do not
        match ``entries``.

    Errors of ``file.write`` are passed on.
    """

    def __init__(self, file: Output, entries: Sequence[Entry]) -> None:
        self._entries = entries
        self._next = 0
        self._file = file
        file.write(header_of(entries))

    def write(self, data: memoryview) -> None:
        """Write all bytes of the next tensor, row-major and little-endian."""
        entry = self._entries[self._next] if self._next < len(self._entries) else None
        if entry is None or data.nbytes != entry.nbytes:
            expected = "no further tensor" if entry is None else f"{entry.nbytes} bytes of {entry.name!r}"
            raise InternalError(f"{self._file.name}: expected {expected}, found {data.nbytes} bytes to write")
        self._file.write(data)
        self._next += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._next != len(self._entries):
            raise InternalError(f"{self._file.name}: {len(self._entries) - self._next} tensors were not written")


def header_of(entries: Sequence[Entry]) -> bytes:
    """Return the bytes of a file before those of its tensors.

    :param entries: all tensors of the file, in the order of their bytes.

    :raises InternalError: a tensor cannot be written in this format, or there are too many of them.
    """
    if len({entry.name for entry in entries}) != len(entries):
        raise InternalError("tensors of one file must have unique names")

    parts = [f'"__metadata__":{json.dumps(METADATA)}']
    end = 0
    for entry in entries:
        if len(entry.name.encode()) > MAX_NAME_SIZE or entry.name == "__metadata__" or BITS[entry.dtype] % 8:
            raise InternalError(f"a tensor cannot be written as safetensors: {entry}")
        parts.append(f"{json.dumps(entry.name)}:{_entry(entry, end)}")
        end += entry.nbytes

    text = "{" + ",".join(parts) + "}"
    text += " " * (-len(text) % 8)  # aligns the bytes after the header
    if len(text) > MAX_HEADER_SIZE:
        raise InternalError(f"a header can have at most {MAX_HEADER_SIZE} bytes, but this one has {len(text)}")

    return len(text).to_bytes(PREFIX_SIZE, "little") + text.encode("ascii")


def _entry(entry: Entry, begin: int) -> str:
    return json.dumps(
        {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, begin + entry.nbytes]},
        separators=(",", ":"),
    )
