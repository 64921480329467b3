"""Names of dtypes: torch's own (`float32`), safetensors' (`F32`), and the short ones of graph dumps (`f32`)."""

from typing import Final

import torch

SAFETENSORS_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes that a safetensors file can hold, by the names in its header."""


def torch_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32, as `config.json` and our index write it."""
    return str(dtype).removeprefix("torch.")


FLOAT_DTYPES: Final = {torch_name(d): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
"""The dtypes that a float weight, and so an MXWeight, may have, by torch's name."""


def short_name(dtype: torch.dtype) -> str:
    """`f32` for torch.float32 and `b8` for torch.bool; torch's name for a dtype without a short one."""
    return "b8" if dtype == torch.bool else SAFETENSORS_NAMES.get(dtype, torch_name(dtype)).lower()
