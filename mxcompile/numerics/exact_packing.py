"""Pack values that a format holds exactly, with scales that are known: of a weight that has been rounded before."""

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat
from mxcompile.numerics import packing, reference
from mxcompile.numerics.row_slices import row_wise


class InexactError(MXCompileError):
    """A value is not representable in the format with the scale of its block."""


def pack_exactly(rows: Tensor, scales: Tensor, fmt: MXFormat) -> Tensor:
    """Packed elements `[..., bytes]` of values `[..., in]` with E8M0 scales `[..., blocks]`, a few rows at a time.

    On the meta device, only the shape of the result. Raises InexactError if they do not decode to the values.
    """
    if rows.is_meta:
        return scales.new_empty((*scales.shape[:-1], scales.shape[-1] * fmt.block_bytes))

    def encode(part: Tensor, exponents: Tensor) -> tuple[Tensor]:
        codes = reference.quantize_on_scales(part, exponents, fmt)
        if not torch.equal(reference.dequantize(codes, exponents, fmt, part.shape[-1], part.dtype), part):
            raise InexactError(f"values to pack are not {fmt} numbers with these scales")
        return (packing.pack(codes, fmt),)

    return row_wise(encode, rows, scales)[0]
