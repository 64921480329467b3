"""The planar layout holds exactly the values of the packed one, and names weights that it cannot hold."""

import pytest
import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import FORMATS, MXFP4, MXFP8_E5M2, MXINT4, MXINT8, MXFormat, ScaleRule
from mxcompile.kernels.layout.planes import from_planes, plane_layout, scale_range, scaling_for, to_planes
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack, unpack


def why_not(elements: Tensor, scales: Tensor, fmt: MXFormat) -> str | None:
    """The reason why a weight cannot be planar, None if it can."""
    try:
        scaling_for(*scale_range(elements, scales, fmt), fmt)
    except MXCompileError as error:
        return str(error)
    return None


def packed(fmt: MXFormat, out: int, size: int) -> tuple[Tensor, Tensor]:
    values = torch.randn(out, size, generator=torch.Generator().manual_seed(out))
    values[0] = 0
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    return pack(codes, fmt), scales


def values_of(elements: Tensor, scales: Tensor, fmt: MXFormat, size: int) -> Tensor:
    return reference.dequantize(unpack(elements, fmt), scales, fmt, size, torch.float32)


@pytest.mark.parametrize(("out", "size"), [(1, 1), (64, 256), (70, 300), (130, 77)])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_there_and_back(fmt: MXFormat, block: int, out: int, size: int) -> None:
    fmt = fmt.with_block(block)
    elements, scales = packed(fmt, out, size)
    planes = to_planes(elements, scales, fmt, size)
    again, scales_again = from_planes(planes)
    assert torch.equal(again, elements)
    assert torch.equal(values_of(again, scales_again, fmt, size), values_of(elements, scales, fmt, size))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_every_bit_of_every_word_is_used_once(fmt: MXFormat) -> None:
    layout = plane_layout(fmt)
    used = [
        (field.word, (bit + field.rotation) % 16)
        for fields in layout.fields
        for field in fields
        for bit in range(16)
        if field.mask >> bit & 1
    ]
    assert sorted(used) == [(word, bit) for word in range(layout.words) for bit in range(16)]


@pytest.mark.parametrize("fmt", [MXINT4, MXINT8, MXFP4], ids=str)
def test_large_scales_are_lifted(fmt: MXFormat) -> None:
    elements, scales = packed(fmt, 20, 96)
    scales = torch.where(scales > 0, scales + 110, scales)
    planes = to_planes(elements, scales, fmt, 96)
    assert planes.lift > 0 or fmt is MXINT4
    again, scales_again = from_planes(planes)
    assert torch.equal(values_of(again, scales_again, fmt, 96), values_of(elements, scales, fmt, 96))


def test_what_planes_cannot_hold_is_said() -> None:
    elements, scales = packed(MXINT8, 4, 64)
    elements[1, 3] = 0x80
    assert "codes (Inf, NaN, or -128)" in str(why_not(elements, scales, MXINT8))
    elements, scales = packed(MXFP8_E5M2, 4, 64)
    elements[1, 3] = 0x7C
    assert "codes (Inf, NaN, or -128)" in str(why_not(elements, scales, MXFP8_E5M2))
    elements, scales = packed(MXFP4, 4, 64)
    assert why_not(elements, scales, MXFP4) is None
    scales[2, 1] = 255
    assert why_not(elements, scales, MXFP4) == "the weight has a NaN scale"
    scales[2] = torch.tensor([1, 254])
    assert "scales span" in str(why_not(elements, scales, MXFP4))
    with pytest.raises(MXCompileError, match="scales span"):
        to_planes(elements, scales, MXFP4, 64)
    assert "blocks of 32 or more" in str(why_not(*packed(MXFP4.with_block(16), 4, 64), MXFP4.with_block(16)))
