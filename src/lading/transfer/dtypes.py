"""The names that manifests give dtypes, and torch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

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

FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
"""The dtypes of plain weights, between which a load may cast."""
