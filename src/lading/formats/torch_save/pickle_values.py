"""What the pickle of a state dict is made of here: names, and where the bytes of tensors lie."""

from __future__ import annotations

from dataclasses import dataclass

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "C32": 4, "C64": 8, "C128": 16,
    "F8_E5M2": 1, "F8_E4M3": 1, "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1, "F8_E8M0": 1,
    "quint8": 1, "qint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1,
}  # fmt: skip
"""Bytes per element, by the manifest's names; torch's own where the manifest has none."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes that tensors lie in, by what a persistent id says of it."""

    key: str
    dtype: str | None
    """A key of :data:`ITEM_SIZES`; ``None`` where it is in bytes."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, by where its elements lie."""

    storage: Storage
    dtype: str
    """A key of :data:`ITEM_SIZES`."""
    offset: int
    """Of its first element in the storage, in elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""


@dataclass(frozen=True, slots=True)
class Inert:
    """Anything else. It does nothing, and all that is known of it is what it would be."""

    what: str
    is_tensor: bool = False


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle speaks of: of a function, a class or a constant. It stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def describe(value: object) -> str:
    """What a value is, in an error; never its ``repr``, which may be endless."""
    if type(value) in (str, bytes):
        return repr(value[:80])  # type: ignore[index]
    if value is None or type(value) in (int, float, bool):
        return repr(value)
    if isinstance(value, Inert):
        return value.what
    if isinstance(value, Global):
        return str(value)[:200]

    return f"a {type(value).__name__}"
