"""The header of a GGUF file, as llama.cpp reads it: the number of its tensors, and their types.

lading does not load these files. Of a header that is longer than :data:`MAX_HEADER_BYTES`, or that is not as the format
has it behind its counts, the types stay unknown.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the numbers of the types are those of ``ggml.h``.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from lading.formats.files import File, corrupt, refuse_lfs_pointer

GGUF = b"GGUF"
"""The first bytes of a GGUF file; ollama's blobs have no suffix."""

MAX_HEADER_BYTES: Final = 64 << 20
"""The most bytes of a header to read; a vocabulary of 250,000 words takes 10 MB."""

_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""The types of tensors."""

_FIXED: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""The sizes in bytes of the types of values that have one."""
_TEXT, _ARRAY = 8, 9
"""The types of the other values."""

_MAX_DIMS = 4

_LEAST_TENSOR = {1: 20, 2: 24, 3: 24}
"""The fewest bytes that describe a tensor, by the version of the format."""
_LEAST_PAIR = {1: 9, 2: 13, 3: 13}
"""The fewest bytes of a key and its value."""


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The tensors of a GGUF file."""

    tensors: int
    """The number of them."""
    elements: Counter[str] = field(default_factory=Counter)
    """The number of elements of each type; empty if the types are unknown."""


def read_gguf_header(file: File) -> GGUFHeader:
    """Read the header of a GGUF file.

    :raises CorruptModelCheckpointError: it is not one, or states more tensors than the file has bytes for.
    :raises OSError: it cannot be read.
    """
    head = file.read(0, 24)
    refuse_lfs_pointer(head, file.label)
    if not head.startswith(GGUF) or len(head) < 24:
        found = repr(head[:16]) if head else "an empty file"
        raise corrupt(file.label, "", expected="the header of a GGUF file, of at least 24 bytes", found=found)
    # A version that is large in one order of bytes is small in the other one.
    order = "<" if struct.unpack_from("<H", head, 4)[0] else ">"
    (version,) = struct.unpack_from(f"{order}I", head, 4)
    if version not in _LEAST_TENSOR:
        raise corrupt(file.label, "the header", expected="a version of GGUF from 1 to 3", found=str(version))
    count = f"{order}{'I' if version == 1 else 'Q'}"
    tensors, pairs = (struct.unpack_from(count, head, 8 + i * struct.calcsize(count))[0] for i in range(2))
    least = tensors * _LEAST_TENSOR[version] + pairs * _LEAST_PAIR[version]
    if least > file.size:
        raise corrupt(
            file.label,
            "the header",
            expected=f"at least {least:,} bytes, as it states {tensors:,} tensors and {pairs:,} keys",
            found=f"a file of {file.size:,} bytes",
        )

    start = 8 + 2 * struct.calcsize(count)
    body = file.read(start, min(file.size - start, MAX_HEADER_BYTES))
    try:
        return GGUFHeader(tensors, _Body(body, order, count).elements(tensors, pairs))
    except _UnknownError:
        return GGUFHeader(tensors)


class _UnknownError(Exception):
    """The header is not as the format has it, or it ends too early."""


class _Body:
    """The header behind its counts: keys with values, and then the tensors."""

    def __init__(self, data: bytes, order: str, count: str) -> None:
        self._data = data
        self._at = 0
        self._word, self._count = struct.Struct(f"{order}I"), struct.Struct(count)

    def elements(self, tensors: int, pairs: int) -> Counter[str]:
        """Return the number of elements of each type."""
        for _ in range(pairs):
            self._skip_text()
            self._skip_value(self._number(self._word))

        found: Counter[str] = Counter()
        for _ in range(tensors):
            self._skip_text()
            dims = self._number(self._word)
            if dims > _MAX_DIMS:
                raise _UnknownError
            size = math.prod(self._number(self._count) for _ in range(dims))
            kind = self._number(self._word)
            found[_TYPES.get(kind, f"type {kind}")] += size
            self._skip(8)  # its offset

        return found

    def _number(self, kind: struct.Struct) -> int:
        if self._at > len(self._data) - kind.size:
            raise _UnknownError
        (value,) = kind.unpack_from(self._data, self._at)
        self._at += kind.size

        return int(value)

    def _skip(self, size: int) -> None:
        self._at += size

    def _skip_text(self) -> None:
        self._skip(self._number(self._count))

    def _skip_value(self, kind: int, *, inside: bool = False) -> None:
        if kind in _FIXED:
            self._skip(_FIXED[kind])
        elif kind == _TEXT:
            self._skip_text()
        elif kind == _ARRAY and not inside:
            each, length = self._number(self._word), self._number(self._count)
            if each in _FIXED:
                self._skip(length * _FIXED[each])
            else:
                for _ in range(length):  # ends with the data, as each text takes some of it
                    self._skip_value(each, inside=True)
        else:
            raise _UnknownError
