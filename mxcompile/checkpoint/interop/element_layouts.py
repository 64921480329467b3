"""Other projects' memory layouts of MX elements <-> the layout of `packing.py`. Scales are E8M0 bytes everywhere.

- 4 bits: byte i holds element 2i in its low nibble and 2i + 1 in its high one (compressed-tensors, gpt-oss).
- 6 bits: four codes in three bytes, little-endian, the first code lowest (compressed-tensors).
- 8 bits: one byte each.
"""

import torch
from torch import Tensor

from mxcompile.errors import CheckpointError
from mxcompile.formats import MXFP4, MXFP6_E2M3, MXFP8_E4M3, SCALE_NAN, MXFormat
from mxcompile.numerics.packing import pack, unpack
from mxcompile.tensor.weight import MXLayout, MXWeight

STORED = {4: MXFP4, 6: MXFP6_E2M3, 8: MXFP8_E4M3}
"""The formats that compressed-tensors has, by bits."""


def to_rows(weight: MXWeight, fmt: MXFormat) -> Tensor:
    """Elements as uint8 `[..., out, in * bits / 8]`, in the layout above; in must be a whole number of blocks."""
    codes = unpack(weight.elements, fmt)
    if fmt.bits == 4:
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    if fmt.bits == 6:
        quads = codes.unflatten(-1, (-1, 4)).int()
        word = quads[..., 0] | (quads[..., 1] << 6) | (quads[..., 2] << 12) | (quads[..., 3] << 18)
        return torch.stack([(word >> shift & 0xFF) for shift in (0, 8, 16)], dim=-1).to(torch.uint8).flatten(-2)
    return codes


def from_rows(name: str, rows: Tensor, scales: Tensor, fmt: MXFormat, layout: MXLayout, dtype: torch.dtype) -> MXWeight:
    """An MXWeight of elements as `to_rows` returns them and scales uint8 `[..., out, blocks]`.

    Raises CheckpointError, naming the weight, if the two do not fit each other.
    """
    expected = [*scales.shape[:-1], scales.shape[-1] * fmt.block_bytes] if scales.dim() else []
    if scales.dtype != torch.uint8 or scales.dim() < 2 or list(rows.shape) != expected or rows.dtype != torch.uint8:
        raise CheckpointError(
            f"{name} has elements {list(rows.shape)} ({rows.dtype}) and scales {list(scales.shape)} ({scales.dtype}), "
            f"which do not form a weight in {fmt}"
        )
    check_scales(name, scales)
    return MXWeight(_packed(rows, fmt), scales, layout, dtype)


def check_scales(name: str, scales: Tensor) -> None:
    """Raise CheckpointError if a scale is NaN: other projects decode that byte as a number."""
    if not scales.is_meta and bool((scales == SCALE_NAN).any()):
        raise CheckpointError(f"{name} has a scale that is NaN: quantize weights that are finite")


def _packed(rows: Tensor, fmt: MXFormat) -> Tensor:
    """Rows in the layout of `packing.py`; of stacked experts one at a time, since codes take a byte each."""
    if rows.dim() < 3:
        return pack(_codes(rows, fmt), fmt)
    packed = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for own, expert in zip(packed, rows, strict=True):
        own.copy_(_packed(expert, fmt))
    return packed


def _codes(rows: Tensor, fmt: MXFormat) -> Tensor:
    if fmt.bits == 4:
        return torch.stack([rows & 0xF, rows >> 4], dim=-1).flatten(-2)
    if fmt.bits == 6:
        triples = rows.unflatten(-1, (-1, 3)).int()
        word = triples[..., 0] | (triples[..., 1] << 8) | (triples[..., 2] << 16)
        return torch.stack([(word >> shift & 0x3F) for shift in (0, 6, 12, 18)], dim=-1).to(torch.uint8).flatten(-2)
    return rows
