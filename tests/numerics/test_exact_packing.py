"""Rounded values are packed to the elements that they came from; others are refused."""

import pytest
import torch

from mxcompile.formats import FORMATS, ScaleRule
from mxcompile.numerics import packing, reference, row_slices
from mxcompile.numerics.exact_packing import InexactError, pack_exactly


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_equals_the_elements_before(fmt, is_transposed, monkeypatch):
    monkeypatch.setattr(row_slices, "SLICE_VALUES", 256)
    codes, scales = reference.quantize(torch.randn(3, 20, 50), fmt, ScaleRule.FLOOR)
    values = reference.dequantize(codes, scales, fmt, 50, torch.float32)
    if is_transposed:
        values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(pack_exactly(values, scales, fmt), packing.pack(codes, fmt))


def test_refuses_a_value_between_two_elements():
    fmt = FORMATS["mxint4"]
    codes, scales = reference.quantize(torch.randn(2, 64), fmt, ScaleRule.FLOOR)
    values = reference.dequantize(codes, scales, fmt, 64, torch.float32)
    values[1, 3] += values.abs().max() / 1000
    with pytest.raises(InexactError, match="mxint4"):
        pack_exactly(values, scales, fmt)
