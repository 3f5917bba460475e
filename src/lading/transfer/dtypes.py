"""The names that manifests give dtypes, and torch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from lading.formats.manifest import FLOAT_NAMES

DType = torch.dtype | Literal["auto", "keep"]
"""The caller's choice: a dtype, that of the checkpoint, or that of each tensor."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The dtypes of torch by name, without sub-byte ones: torch has no tensor of an element smaller than a byte."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_by_name(name: str) -> torch.dtype | None:
    """Return the floating-point dtype of a name such as ``bfloat16``, ``bf16`` or ``torch.bfloat16``, if it is one."""
    found = FLOAT_NAMES.get(name.removeprefix("torch."))

    return None if found is None else TORCH_DTYPES[found]


def parse_dtype(dtype: torch.dtype | str) -> DType:
    """Return what a caller asks for with a dtype, the name of one, ``"auto"`` or ``"keep"``.

    :raises TypeError: it is none of these.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return "auto"
    if dtype == "keep":
        return "keep"
    found = dtype_by_name(dtype) if isinstance(dtype, str) else None
    if found is None:
        names = ", ".join(f'"{name}"' for name in ("auto", "keep", *FLOAT_NAMES))
        raise TypeError(f"`dtype` must be a torch.dtype or one of {names}, but is {dtype!r}")

    return found
