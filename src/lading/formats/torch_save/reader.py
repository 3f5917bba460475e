"""Checkpoints that ``torch.save`` wrote, as ranges of bytes, found without reading a tensor or running code.

Since torch 1.6 such a file is a zip archive of a pickle, ``data.pkl``, and of one stored record for each storage;
before (and with ``_use_new_zipfile_serialization=False``) it is five pickles and then the storages one after another.
In both, the pickle names for each tensor its storage, offset, sizes and strides, so that a contiguous tensor is a range
of bytes of the file, even if it is a view of a larger one. :mod:`lading.formats.torch_save.unpickle` reads the pickle,
and cannot call anything. lading does not use ``torch.load``, even with ``weights_only=True``: that would import torch
just to get offsets, and with ``mmap=True`` it accepts damaged records.

:mod:`lading.formats.state_dict` finds the state dict. The reader ignores values of it that are not tensors, such as
a dict in a state dict.
"""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, TypeGuard

from lading.errors import NotSupportedError
from lading.formats.files import LFS_POINTER, corrupt, lfs_pointer_error
from lading.formats.manifest import BITS
from lading.formats.safetensors import MAX_NAME_SIZE, Header
from lading.formats.state_dict import find_state_dict, require_name
from lading.formats.torch_save.archive import SIGNATURE, Record, read_directory, read_record
from lading.formats.torch_save.unpickle import (
    ITEM_SIZES,
    MAX_PICKLE_SIZE,
    Inert,
    Pickle,
    Storage,
    StoredTensor,
    describe,
    read_pickle,
)

_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a file that is not a zip archive."""

_PROTOCOL = 1001

_MAX_ORDER = 1_000_000
"""The most bytes of the record of the byte order."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of a state dict, and the bytes of its storage."""

    name: str
    tensor: StoredTensor
    record: Record

    @property
    def offset(self) -> int:
        """The first byte of the tensor, counted from the beginning of the file."""
        return self.record.offset + self.tensor.offset * ITEM_SIZES[self.tensor.dtype]

    @property
    def contiguous(self) -> bool:
        """``True`` if its elements are consecutive, in row-major order."""
        return is_contiguous(self.tensor.shape, self.tensor.strides)


def header_of(placed: list[Placed], *, label: str) -> Header:
    """Return the tensors of a file in the order of their offsets, as in the header of a safetensors file.

    :raises NotSupportedError: a tensor is not contiguous.
    """
    for entry in placed:
        if not entry.contiguous:
            raise NonContiguousError(
                f"{label}: tensor {entry.name!r}: expected elements in row-major order, found the shape "
                f"{list(entry.tensor.shape)} with the strides {list(entry.tensor.strides)}. Its bytes are not one "
                "range of the file: save `tensor.contiguous()`, or give a cache folder to have it rewritten once."
            )

    placed = sorted(placed, key=lambda entry: entry.offset)

    return Header(
        names=[entry.name for entry in placed],
        dtypes=[entry.tensor.dtype for entry in placed],
        shapes=[entry.tensor.shape for entry in placed],
        offsets=array("q", [entry.offset for entry in placed]),
        metadata={},
        format="torch",
    )


class NonContiguousError(NotSupportedError):
    """A tensor whose bytes are not one range of its file."""


def place_tensors(
    file: BinaryIO, *, base: int, size: int, label: str, restrict: bool, state_dict: str | None = None
) -> list[Placed]:
    """Return the tensors of the state dict that ``torch.save`` wrote to the ``size`` bytes of ``file`` at ``base``.

    :param restrict: refuse a file whose pickle names anything that a state dict does not need. Otherwise the reader
        ignores such objects, and imports nothing that they name.
    :param state_dict: the dotted path of the state dict in the file; default: the usual ones.

    :raises CorruptModelCheckpointError: it is another kind of file, is damaged, or contains no state dict.
    :raises CheckpointNotFoundError: it contains no state dict at the path ``state_dict``.
    :raises RefusedPickleError: unpickling it would import what a state dict does not need; or it is an archive of
        TorchScript or torch.package.
    :raises NotSupportedError: a tensor is not dense: quantized, sparse …
    :raises OSError: it cannot be read.
    """
    value, storages = _read_file(file, base, size, label, restrict)
    state = find_state_dict(value, state_dict, label=label, is_tensor=_is_tensor, describe=describe)

    return [_place(name, tensor, storages, label) for name, tensor in state.items() if _is_tensor(tensor)]


def place_tensor(file: BinaryIO, name: str, *, base: int, size: int, label: str) -> Placed:
    """Return the tensor that ``torch.save`` wrote alone to the ``size`` bytes of ``file`` at ``base``.

    :param name: its name in the checkpoint.

    Raises what :func:`place_tensors` does.
    """
    value, storages = _read_file(file, base, size, label, True)
    if not _is_tensor(value):
        raise corrupt(label, f"tensor {name!r}", expected="a tensor", found=describe(value))

    return _place(name, value, storages, label)


def _read_file(file: BinaryIO, base: int, size: int, label: str, restrict: bool) -> tuple[object, _Places]:
    file.seek(base)
    head = file.read(4)
    if head == SIGNATURE:
        return _read_zip(file, base, size, label, restrict)
    if head[:1] == b"\x80":
        return _read_legacy(file, base, size, label, restrict)
    if head == LFS_POINTER[:4]:
        raise lfs_pointer_error(label)

    raise corrupt(label, "", expected="a file that `torch.save` wrote", found=f"{head!r} as its first bytes")


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether elements in row-major order are consecutive; the strides of dims of one element do not matter."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 0:
            return True
        if size != 1:
            if stride != expected:
                # A later dim of zero would still make it empty.
                return 0 in shape
            expected *= size

    return True


# --- the two layouts --------------------------------------------------------------------------------------------------

_Places = Mapping[str, Record]
"""The bytes of each storage in the file, by its key."""


def _read_zip(file: BinaryIO, base: int, size: int, label: str, restrict: bool) -> tuple[object, _Places]:
    records = read_directory(file, base=base, size=size, label=label)

    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise corrupt(label, "", expected="one record FOLDER/data.pkl, as `torch.save` writes", found=f"{len(roots)}")
    (root,) = roots
    if order := records.get(f"{root}/byteorder"):
        if order.size > _MAX_ORDER:
            raise corrupt(label, "byteorder", expected=f"at most {_MAX_ORDER} bytes", found=f"{order.size}")
        _require_little(read_record(file, order, label=label), label)

    pickled = records[f"{root}/data.pkl"]
    if pickled.size > MAX_PICKLE_SIZE:
        raise corrupt(label, "data.pkl", expected=f"at most {MAX_PICKLE_SIZE} bytes", found=f"{pickled.size}")
    data = read_record(file, pickled, label=label)
    pickle = read_pickle(io.BytesIO(data), label=label, where="data.pkl", restrict=restrict)
    if pickle.size != len(data):
        raise corrupt(label, "data.pkl", expected=f"one pickle of {len(data)} bytes", found=f"one of {pickle.size}")

    prefix = f"{root}/data/"

    return pickle.value, {
        name.removeprefix(prefix): record for name, record in records.items() if name.startswith(prefix)
    }


def _require_little(order: bytes, label: str) -> None:
    if order == b"big":
        raise NotSupportedError(
            f"{label}: byteorder: expected 'little', found 'big', as big-endian machines write it. Load it "
            "with `torch.load` and save it again on this machine."
        )
    if order != b"little":
        raise corrupt(label, "byteorder", expected="'little' or 'big'", found=repr(order[:20]))


def _read_legacy(file: BinaryIO, base: int, size: int, label: str, restrict: bool) -> tuple[object, _Places]:
    file.seek(base)
    at = 0

    def read(where: str) -> Pickle:
        nonlocal at
        limit = min(MAX_PICKLE_SIZE, size - at)
        pickle = read_pickle(file, label=label, where=where, restrict=restrict, limit=limit)
        at += pickle.size
        return pickle

    if read("magic number").value != _MAGIC:
        raise corrupt(label, "", expected="a file that `torch.save` wrote", found="another pickle")
    if (protocol := read("protocol").value) != _PROTOCOL:
        raise corrupt(label, "protocol", expected=f"{_PROTOCOL}", found=describe(protocol))
    system = read("system").value
    if type(system) is not dict or system.get("little_endian") is not True:
        big = type(system) is dict and system.get("little_endian") is False
        _require_little(b"big" if big else b"?", label)

    data = read("data")
    keys = read("keys of the storages").value
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise corrupt(label, "keys of the storages", expected="a list of strings", found=describe(keys))

    # The file states the size of an element only by the storages that tensors name.
    return data.value, _legacy_storages(file, base + at, base + size, keys, data.storages, label)


def _legacy_storages(
    file: BinaryIO, at: int, end: int, keys: list[str], storages: Mapping[str, Storage], label: str
) -> _Places:
    places: dict[str, Record] = {}
    for key in keys:
        storage = storages.get(key)
        where = f"storage {key[:80]!r}"
        if storage is None or key in places:
            raise corrupt(label, where, expected="a storage that tensors lie in, once", found="another one")
        file.seek(at)
        count = int.from_bytes(file.read(8), "little")
        nbytes = count * (ITEM_SIZES[storage.dtype] if storage.dtype else 1)
        if nbytes != storage.nbytes or at + 8 + nbytes > end:
            raise corrupt(label, where, expected=f"{storage.nbytes} bytes at {at + 8}", found=f"{nbytes} of {end}")
        places[key] = Record(key, at + 8, nbytes, 0)
        at += 8 + nbytes

    if at != end:
        raise corrupt(label, "", expected=f"a file that ends at {at}, where the last storage does", found=f"{end}")

    return places


# --- the tensors ------------------------------------------------------------------------------------------------------


def _is_tensor(value: object) -> TypeGuard[StoredTensor | Inert]:
    return isinstance(value, StoredTensor) or (isinstance(value, Inert) and value.is_tensor)


def _not_plain(label: str, name: str, found: str) -> NotSupportedError:
    return NotSupportedError(
        f"{label}: tensor {name[:MAX_NAME_SIZE]!r}: expected a dense tensor of one of the dtypes {', '.join(BITS)}, "
        f"found {found}. Convert it, and save it again."
    )


def _place(name: str, tensor: StoredTensor | Inert, storages: _Places, label: str) -> Placed:
    if isinstance(tensor, Inert):
        raise _not_plain(label, name, tensor.what)
    require_name(name, label=label)
    where = f"tensor {name!r}"
    storage = tensor.storage
    if tensor.dtype not in BITS:
        raise _not_plain(label, name, f"{tensor.dtype}")

    record = storages.get(storage.key)
    if record is None:
        raise corrupt(label, where, expected=f"its storage {storage.key[:80]!r} in the file", found="none")
    size = record.size
    if size != storage.nbytes:
        raise corrupt(label, where, expected=f"a storage of {storage.nbytes} bytes", found=f"one of {size}")

    if math.prod(n or 1 for n in tensor.shape) * ITEM_SIZES[tensor.dtype] * 8 >= 2**63:
        raise corrupt(label, where, expected="fewer than 2^63 bits", found=f"the shape {list(tensor.shape)}")
    if math.prod(tensor.shape):
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        if (last + 1) * ITEM_SIZES[tensor.dtype] > size:
            raise corrupt(
                label,
                where,
                expected=f"elements within its storage of {size} bytes",
                found=f"{tensor.dtype} of the shape {list(tensor.shape)} with the strides {list(tensor.strides)} "
                f"from element {tensor.offset} on",
            )
    elif tensor.offset:
        # A tensor without elements may begin anywhere, but the manifest's offsets should lie in the file.
        tensor = StoredTensor(storage, tensor.dtype, 0, tensor.shape, tensor.strides)

    return Placed(name, tensor, record)
