"""The functions that state dicts are made with, by their names, and what each of them would return."""

from __future__ import annotations

from collections.abc import Callable

from lading.formats.safetensors import MAX_RANK
from lading.formats.torch_save.pickle_values import Global, Inert, Storage, StoredTensor, describe

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

_HARMLESS = {
    ("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer"), ("torch", "device"),
    ("torch.serialization", "_get_layout"), ("_codecs", "encode"), ("collections", "Counter"),
    ("torch._utils", "_rebuild_qtensor"), ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"), ("torch._utils", "_rebuild_nested_tensor"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex")),
    *(("torch", name) for name in ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine",
                                   "per_channel_symmetric", "per_channel_affine_float_qparams")),
}  # fmt: skip
"""What a state dict may name although nothing of it is needed here."""


class ArgumentError(Exception):
    """A call whose arguments are not those that torch writes."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found


def is_known(named: Global) -> bool:
    """Whether a state dict may name this."""
    key = (named.module, named.name)

    return (
        key in _CALLS
        or key in _HARMLESS
        or storage_dtype(named) != ""
        or (named.module == "torch" and named.name in _DTYPES)
    )


def call(function: Global, args: tuple[object, ...]) -> object:
    """What a call would return: an :class:`Inert` value, where nothing of it is needed here.

    :raises ArgumentError: the arguments are not those that torch writes.
    """
    known = _CALLS.get((function.module, function.name))
    if known is not None:
        return known(args)

    is_tensor = function.module == "torch._utils"
    kind = "a tensor" if is_tensor else "an object"

    return Inert(f"{kind} that {str(function)[:200]!r} makes", is_tensor)


def num_copied(function: Global, args: tuple[object, ...]) -> int:
    """How many items a call would copy."""
    copies = _CALLS.get((function.module, function.name)) in (_ordered_dict, _size)

    return len(args[0]) if copies and args and isinstance(args[0], (list, tuple)) else 0


def storage_dtype(kind: Global) -> str | None:
    """The dtype of a class of storages; ``None`` where it counts bytes, an empty string where it is none."""
    if kind == Global("torch.storage", "UntypedStorage"):
        return None

    return _STORAGES.get(kind.name, "") if kind.module in ("torch", "torch.cuda") else ""


def is_size(value: object) -> bool:
    """Whether a value can be a number of elements."""
    return type(value) is int and 0 <= value < 2**63


def _sizes(value: object) -> tuple[int, ...] | None:
    return value if type(value) is tuple and len(value) <= MAX_RANK and all(map(is_size, value)) else None


def _tensor(storage: object, dtype: str | None, offset: object, shape: object, strides: object) -> StoredTensor:
    sizes, steps = _sizes(shape), _sizes(strides)
    if (
        type(storage) is not Storage
        or dtype is None
        or type(offset) is not int
        or not is_size(offset)
        or sizes is None
        or steps is None
        or len(sizes) != len(steps)
    ):
        given = ", ".join(map(describe, (storage, offset, shape, strides)))
        raise ArgumentError("are a storage, an offset, sizes and strides", given)

    return StoredTensor(storage, dtype, offset, sizes, steps)


def _rebuild_tensor(args: tuple[object, ...]) -> object:
    _require(4 <= len(args) <= 7, args)
    storage, offset, shape, strides, *rest = args
    if len(rest) == 3 and rest[2]:
        # Complex conjugation, or negation, that was put off: the bytes are not what the tensor holds.
        return Inert("a tensor whose conjugation or negation is pending", True)

    return _tensor(storage, storage.dtype if type(storage) is Storage else None, offset, shape, strides)


def _rebuild_tensor_v3(args: tuple[object, ...]) -> object:
    _require(7 <= len(args) <= 8, args)
    storage, offset, shape, strides, _, _, dtype, *metadata = args
    if metadata and metadata[0]:
        return Inert("a tensor whose conjugation or negation is pending", True)
    known = _DTYPES.get(dtype.name) if type(dtype) is Global and dtype.module == "torch" else None

    return _tensor(storage, known, offset, shape, strides)


def _rebuild_parameter(args: tuple[object, ...]) -> object:
    _require(len(args) in (1, 2, 3, 4) and isinstance(args[0], (StoredTensor, Inert)), args)

    return args[0]


def _rebuild_from_type(args: tuple[object, ...]) -> object:
    _require(len(args) == 4, args)
    function, kls, inner, _ = args
    if type(function) is not Global or type(kls) is not Global or type(inner) is not tuple:
        raise ArgumentError("are a function, a type, arguments and a state", ", ".join(map(describe, args)))
    call = _CALLS.get((function.module, function.name))
    # A subclass of tensors may hold its numbers in a form of its own.
    plain = (kls.module, kls.name) in _TENSOR_TYPES and call is not None and call is not _rebuild_from_type

    return call(inner) if plain and call is not None else Inert(f"a tensor of the type {str(kls)[:200]!r}", True)


def _ordered_dict(args: tuple[object, ...]) -> object:
    _require(len(args) <= 1, args)
    made: dict[str, object] = {}
    for pair in args[0] if args and type(args[0]) in (list, tuple) else ():  # type: ignore[attr-defined]
        _require(type(pair) in (list, tuple) and len(pair) == 2, args)
        if type(pair[0]) is str:
            made[pair[0]] = pair[1]

    return made


def _size(args: tuple[object, ...]) -> object:
    _require(len(args) == 1 and type(args[0]) in (list, tuple), args)

    return tuple(args[0])  # type: ignore[arg-type]


def _require(good: bool, args: tuple[object, ...]) -> None:
    if not good:
        raise ArgumentError("fit", ", ".join(map(describe, args[:8])) or "none")


_TENSOR_TYPES = {("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer")}

_CALLS: dict[tuple[str, str], Callable[[tuple[object, ...]], object]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}
