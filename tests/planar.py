"""Random planar weights and tokens for the tests of kernels."""

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.layout.planes import PlanarWeight, to_planes
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack


def weight(fmt: MXFormat, out: int, size: int) -> tuple[PlanarWeight, Tensor]:
    """A random planar weight, and its values."""
    values = torch.randn(out, size, generator=torch.Generator().manual_seed(out * 1000 + size))
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    return to_planes(pack(codes, fmt), scales, fmt, size), reference.dequantize(
        codes, scales, fmt, size, torch.bfloat16
    )


def tokens(rows: int, size: int) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
