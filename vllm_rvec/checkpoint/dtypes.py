"""safetensors' names of dtypes, and torch's."""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["DTYPE_NAMES", "TORCH_DTYPES"]

TORCH_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtype for each that safetensors names and checkpoints use."""

DTYPE_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""The way back."""
