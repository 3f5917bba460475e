"""The pickles inside torch's checkpoints, read as data without importing or calling anything that they name.

A pickle is a program for a small machine, and one of its instructions calls any function of any module. This is
Python's machine, ``pickle._Unpickler``, without all that could act: it refuses an instruction that is not listed here,
a name stays a name (:class:`Global`), and a call returns a value of this module. A tensor becomes a
:class:`StoredTensor`, which has the place of its bytes. The machine refuses what a state dict does not need; with
``restrict=False``, that becomes an :class:`Inert` value instead.

Only the machine in pure Python has a table of instructions to choose from; the one in C also allocates as much memory
as an index of its memo states. Its ``dispatch``, ``stack``, ``metastack`` and ``append`` are not documented, and are
the same in Python 3.11 to 3.14.

All of it is linear in the size of the pickle, and nothing recurses: neither the reader nor the users of the result,
since a dict keeps only items with a string or an :class:`Instance` as their key, and is never hashed or compared.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, TypeGuard

from lading.errors import RefusedPickleError
from lading.formats.files import corrupt
from lading.formats.manifest import BITS
from lading.formats.safetensors import MAX_RANK

MAX_PICKLE_SIZE = 100_000_000
"""The most bytes of a pickle, as for the header of a safetensors file."""

MAX_READS = 25_000_000
"""The most reads of a pickle, one for each instruction and each of its arguments: a state dict of 400,000 tensors takes
some 20 million."""

MAX_OBJECTS = 4_000_000
"""The most lists, dicts, tuples and marks that a pickle makes, and the most values that it keeps: an instruction of a
byte makes one that takes 100 bytes of memory. A state dict has 8 and 10 for each tensor."""

_MAX_LINE = 512
"""The most bytes of a name, or of a number in decimal digits."""

ITEM_SIZES = {dtype: bits // 8 for dtype, bits in BITS.items() if bits >= 8} | {
    "C32": 4, "C128": 16, "quint8": 1, "qint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1,
}  # fmt: skip
"""The bytes per element, by the manifest's names; torch's own where the manifest has no name."""

_STORAGES = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32",
    "DoubleStorage": "F64", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128",
    "QUInt8Storage": "quint8", "QInt8Storage": "qint8", "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}  # fmt: skip

_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex32": "C32", "complex64": "C64", "complex128": "C128", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e8m0fnu": "F8_E8M0", "quint8": "quint8", "qint8": "qint8", "qint32": "qint32", "quint4x2": "quint4x2",
    "quint2x4": "quint2x4",
}  # fmt: skip

_TENSOR_TYPES = {("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer")}

_HARMLESS = _TENSOR_TYPES | {
    ("torch", "device"), ("torch.serialization", "_get_layout"), ("_codecs", "encode"), ("collections", "Counter"),
    ("_io", "BytesIO"),  # the state of modules of Transformer Engine
    ("torch._utils", "_rebuild_qtensor"), ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"), ("torch._utils", "_rebuild_nested_tensor"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex")),
    *(("torch", name) for name in ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine",
                                   "per_channel_symmetric", "per_channel_affine_float_qparams")),
}  # fmt: skip
"""Names that a state dict may have although the reader needs nothing of them."""


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes that contains tensors, as a persistent id describes it."""

    key: str
    dtype: str | None
    """A key of :data:`ITEM_SIZES`; ``None`` for a storage of bytes."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the place of its elements."""

    storage: Storage
    dtype: str
    """A key of :data:`ITEM_SIZES`."""
    offset: int
    """The place of its first element in the storage, in elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """The strides in elements."""


@dataclass(frozen=True, slots=True)
class Inert:
    """A value of another kind, which does nothing and only has a description."""

    what: str
    is_tensor: bool = False

    def append(self, value: object) -> None:
        """Ignore an item, or several."""

    extend = append


@dataclass(slots=True, eq=False)
class Instance:
    """An object of a class in a vocabulary: the name of the class, and what the pickle says of the object."""

    kind: str
    state: object = None
    """The attributes, as the class's own ``__setstate__`` would take them."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name of a function, a class or a constant. It stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def describe(value: object) -> str:
    """Return a short description of a value for an error; never its ``repr``, which may be endless."""
    if type(value) in (str, bytes):
        return repr(value[:80])  # type: ignore[index]
    if type(value) is int and abs(value) >= 1 << 64:
        return "a number of more than 64 bits"
    if value is None or type(value) in (int, float, bool):
        return repr(value)
    if isinstance(value, Inert):
        return value.what
    if isinstance(value, Global):
        return str(value)[:200]
    if isinstance(value, Instance):
        return f"an object of the class {value.kind}"

    return f"a {type(value).__name__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pickle:
    """The content of a pickle."""

    value: object
    size: int
    """The bytes of the pickle."""
    storages: Mapping[str, Storage]
    """All storages that it names, by their keys, also those of tensors outside of ``value``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The names that a kind of pickle may have."""

    calls: Mapping[tuple[str, str], Callable[..., object]]
    """The functions and classes that it calls, and in their place functions that make values of this module."""
    names: Collection[tuple[str, str]]
    """All of its names, those of ``calls`` included."""
    content: str
    """The expected content of the pickle, for the error."""
    remedy: str
    """The advice of the error: a way to get such a pickle."""
    scale: int = 1
    """The factor by which it may exceed :data:`MAX_READS` and :data:`MAX_OBJECTS`."""


def read_pickle(
    stream: BinaryIO,
    *,
    label: str,
    where: str,
    restrict: bool,
    limit: int = MAX_PICKLE_SIZE,
    vocabulary: Vocabulary | None = None,
) -> Pickle:
    """Read the pickle at the position of ``stream``, which is after the pickle then.

    Its value consists of ``dict``, ``list``, ``tuple``, ``str``, ``bytes``, ``int``, ``float``, ``bool`` and ``None``,
    and of the classes above. It may be nested as deeply as the pickle is long, and may contain itself.

    :param label: the path or the address of the file, for the error.
    :param where: the part of the file, for the error.
    :param restrict: refuse a pickle that names something that is not in the vocabulary.
    :param limit: the most bytes to read.
    :param vocabulary: default: that of state dicts.

    :raises CorruptModelCheckpointError: it is not a pickle, or not one that torch writes.
    :raises RefusedPickleError: it would import something else, and ``restrict`` is set.
    :raises OSError: the stream cannot be read.
    """
    vocabulary = vocabulary or _STATE_DICTS
    source = _Source(stream, limit, MAX_READS * vocabulary.scale)
    machine = _Machine(source, vocabulary, label=label, where=where, restrict=restrict)
    try:
        value = machine.load()
        if machine.stack or machine.metastack:
            raise _DamageError("one value", "more")
    except _DamageError as error:
        expected, found = error.args
    except (pickle.UnpicklingError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        expected, found = "a pickle that `torch.save` writes", f"{type(error).__name__}: {str(error)[:200]}"
    else:
        return Pickle(value=value, size=source.taken, storages=machine.storages)

    raise corrupt(label, f"{where}, byte {source.taken}", expected=expected, found=found)


# --- the machine ------------------------------------------------------------------------------------------------------


class _DamageError(Exception):
    """A pickle that is not as torch writes it, with the expected and the found value."""


class _Source:
    """The bytes of a pickle, with a limit on reads and on memory."""

    def __init__(self, stream: BinaryIO, limit: int, most_reads: int) -> None:
        self._stream = stream
        self._limit = limit
        self._most_reads = most_reads
        self._reads = 0
        self.taken = 0

    def read(self, size: int, /) -> bytes:
        self._reads += 1
        self.taken += size
        if self.taken > self._limit or self._reads > self._most_reads:
            self.taken -= size
            self.require(size)
            raise _DamageError(f"at most {self._most_reads} instructions and arguments", "more")
        data = self._stream.read(size)
        if len(data) != size:
            self.taken += len(data) - size
            raise _DamageError(f"{size} bytes", f"{len(data)}, and the end of it")

        return data

    def readline(self) -> bytes:
        data = self._stream.readline(min(_MAX_LINE, self._limit - self.taken))
        self.taken += len(data)
        if not data.endswith(b"\n"):
            raise _DamageError(f"a name of at most {_MAX_LINE} bytes and the end of its line", repr(data[:80]))

        return data

    def require(self, size: int) -> None:
        if size > self._limit - self.taken:
            raise _DamageError(f"at most {self._limit} bytes", f"{size} more at {self.taken}")


class _Instructions(dict[int, Callable[[Any], None]]):
    """The instructions that a pickle may have."""

    def __missing__(self, code: int) -> NoReturn:
        if code in b"FVSdgipP":
            # Storages of protocol 0 are texts that even torch does not read.
            raise _DamageError("a pickle of protocol 1 to 5", f"the instruction {chr(code)!r} of protocol 0")
        raise _DamageError("an instruction of a pickle that torch writes", f"the byte {code:#04x}")


_MOVES = b".01NILJKMGXTUBCaehjcQ\x88\x89\x8a\x8b\x8c\x8d\x8e\x93"
"""The instructions that Python's machine executes: they read plain values, and move values."""

_MAKES, _KEEPS = b"(])}tl\x85\x86\x87", b"qr\x94"
"""Those that it executes, too, but only so many times: they make a value of several, and keep a value."""


def _limited(step: Callable[[Any], None], made: int) -> Callable[[Any], None]:
    """Return an instruction that makes so many values, and fails above the limits."""

    def limited(machine: _Machine) -> None:
        step(machine)
        machine.made += made
        most = machine.most_objects
        if machine.made > most or len(machine.memo) > most:
            raise _DamageError(f"at most {most} lists, dicts and tuples, and as many kept values", "more")

    return limited


class _Machine(pickle._Unpickler):
    memo: dict[int, Any]
    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, source: _Source, vocabulary: Vocabulary, *, label: str, where: str, restrict: bool) -> None:
        super().__init__(source, encoding="latin-1")
        self._source = source
        self._vocabulary = vocabulary
        self._label = label
        self._where = where
        self._restrict = restrict
        self._copied = 0
        self.made = 0
        self.most_objects = MAX_OBJECTS * vocabulary.scale
        self.storages: dict[str, Storage] = {}

    def load_proto(self) -> None:
        (version,) = self._source.read(1)
        if self._source.taken != 2 or not 2 <= version <= 5:
            raise _DamageError("one protocol, of 2 to 5, at the beginning", f"{version}")

    def load_frame(self) -> None:
        # A frame only states how much to read at once.
        self._source.require(int.from_bytes(self._source.read(8), "little"))

    def load_empty_set(self) -> None:
        self.append(Inert("a set"))

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Inert("a set"))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            # Other keys cannot name a tensor, and an attacker could make the hash of a nested one take any time.
            target.update((k, v) for k, v in zip(items[::2], items[1::2], strict=True) if type(k) in (str, Instance))
        elif not isinstance(target, Inert):
            raise _DamageError("a dict to set items of", describe(target))

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(self._call(function, args))

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by keyword
        self.load_reduce()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Instance:
            target.state = state
            return
        # Of other objects, the attributes are hooks and versions of modules. None of them is a tensor.
        if not isinstance(target, (dict, Inert, StoredTensor)):
            raise _DamageError("an object to set attributes of", describe(target))

    def find_class(self, module: str, name: str) -> Global:
        named = Global(module, name)
        if self._restrict and (module, name) not in self._vocabulary.names:
            shown = repr(str(named)[:200])
            raise RefusedPickleError(
                self._label,
                f"{self._label}: {self._where}: expected {self._vocabulary.content}, found {shown}, which to unpickle "
                f"would import and may run code. {self._vocabulary.remedy}, or read the tensors alone with "
                "`--no-restrict` (in Python: `restrict=False`): lading then passes over such objects, and imports "
                "nothing that they name.",
            )

        return named

    def persistent_load(self, pid: object) -> Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise _DamageError("('storage', type, key, location, size)", describe(pid))
        _, kind, key, location, size, *view = pid
        dtype = _storage_dtype(kind) if type(kind) is Global else ""
        known = dtype != "" and type(key) is str and type(location) is str and is_size(size)
        # Before torch 0.4, a storage could be part of another one.
        if not known or any(part is not None for part in view):
            raise _DamageError("a storage with its key, location and size", ", ".join(map(describe, pid[1:])))

        storage = Storage(key, dtype, size * (ITEM_SIZES[dtype] if dtype else 1))
        self.storages[key] = storage

        return storage

    def _call(self, function: object, args: object) -> object:
        """Return the result of a call, with a value of this module in place of each object."""
        if type(args) is not tuple:
            raise _DamageError("the arguments of a call", describe(args))
        if isinstance(function, Inert):
            return function  # the result of a name that the machine ignores
        if type(function) is not Global:
            raise _DamageError("the name of a function to call", describe(function))

        known = self._vocabulary.calls.get((function.module, function.name))
        if known is None:
            is_tensor = function.module == "torch._utils"
            kind = "a tensor" if is_tensor else "an object"
            return Inert(f"{kind} that {str(function)[:200]!r} makes", is_tensor)
        if known is _ordered_dict and args and type(args[0]) in (list, tuple):
            # Two bytes request a kept value again, regardless of its length: so no copies of copies of copies.
            self._copied += len(args[0])
            if self._copied > self._source.taken:
                raise _DamageError("no more items than the pickle has bytes", f"{self._copied}, by copies of copies")
        try:
            return known(*args)
        except TypeError:
            found = ", ".join(map(describe, args[:8])) or "none"
            raise _DamageError(f"arguments of {function} as torch writes them", found) from None

    # Python's own `BYTEARRAY8` allocates the memory before it reads.
    dispatch = _Instructions(
        {code: pickle._Unpickler.dispatch[code] for code in _MOVES}
        | {code: _limited(pickle._Unpickler.dispatch[code], 1) for code in _MAKES}
        | {code: _limited(pickle._Unpickler.dispatch[code], 0) for code in _KEEPS}
        | {
            pickle.PROTO[0]: load_proto,
            pickle.FRAME[0]: load_frame,
            pickle.EMPTY_SET[0]: _limited(load_empty_set, 1),
            pickle.FROZENSET[0]: _limited(load_frozenset, 1),
            pickle.ADDITEMS[0]: pickle._Unpickler.dispatch[pickle.APPENDS[0]],
            pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_reduce,  # as `OrderedDict` comes where a subclass of it would
            pickle.NEWOBJ_EX[0]: load_newobj_ex,
            pickle.BUILD[0]: load_build,
        }
    )


def _storage_dtype(kind: Global) -> str | None:
    """Return the dtype of a class of storages; ``None`` if it counts bytes, an empty string for another class."""
    if kind == Global("torch.storage", "UntypedStorage"):
        return None

    return _STORAGES.get(kind.name, "") if kind.module in ("torch", "torch.cuda") else ""


def is_size(value: object) -> TypeGuard[int]:
    """Return whether a value is a number of elements or of bytes."""
    return type(value) is int and 0 <= value < 2**63


# --- the functions that state dicts are made with ---------------------------------------------------------------------
# Each takes the arguments of torch's own, and raises a TypeError for any others.

_PENDING = Inert("a tensor whose conjugation or negation is pending", True)
"""A tensor whose values differ from its bytes."""


def _tensor(storage: Any, dtype: str | None, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    good = type(storage) is Storage and dtype is not None and is_size(offset) and is_shape(shape)
    if not good or dtype is None or not is_shape(strides) or len(shape) != len(strides):
        raise TypeError

    return StoredTensor(storage, dtype, offset, shape, strides)


def is_shape(value: object) -> TypeGuard[tuple[int, ...]]:
    """Return whether a value is a tuple of sizes, or of strides."""
    return type(value) is tuple and len(value) <= MAX_RANK and all(map(is_size, value))


def dtype_of(value: object) -> str | None:
    """Return the dtype that a name in a pickle stands for, a key of :data:`ITEM_SIZES`; ``None`` for another value."""
    return _DTYPES.get(value.name) if type(value) is Global and value.module == "torch" else None


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> object:
    dtype = storage.dtype if type(storage) is Storage else None

    return _PENDING if metadata else _tensor(storage, dtype, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> object:
    return _PENDING if metadata else _tensor(storage, dtype_of(dtype), offset, shape, strides)


def _rebuild_parameter(data: Any, grad: Any = None, hooks: Any = None, state: Any = None) -> object:
    if not isinstance(data, (StoredTensor, Inert)):
        raise TypeError

    return data


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> object:
    if type(function) is not Global or type(kind) is not Global or type(args) is not tuple:
        raise TypeError
    call = _CALLS.get((function.module, function.name))
    # A subclass of tensors may store its numbers in its own form.
    if (kind.module, kind.name) not in _TENSOR_TYPES or call is None or call is _rebuild_from_type:
        return Inert(f"a tensor of the type {str(kind)[:200]!r}", True)

    return call(*args)


def _ordered_dict(pairs: Any = ()) -> object:
    if type(pairs) not in (list, tuple):
        return {}
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError

    return {key: value for key, value in pairs if type(key) is str}


def shape_of(sizes: Any) -> object:
    """Return the value of a call of ``torch.Size``."""
    if type(sizes) is not tuple:
        raise TypeError

    return sizes


_CALLS: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): shape_of,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}

DTYPE_NAMES = frozenset(("torch", name) for name in _DTYPES)
"""The names of dtypes."""

_STATE_DICTS = Vocabulary(
    calls=_CALLS,
    names={
        *_CALLS,
        *_HARMLESS,
        *DTYPE_NAMES,
        *((module, name) for module in ("torch", "torch.cuda") for name in _STORAGES),
        ("torch.storage", "UntypedStorage"),
    },
    content="a state dict, which holds tensors and plain values only",
    remedy="Save `model.state_dict()` instead",
)
