"""Conversions of weights a few rows at a time give what the conversion of the whole weight gives."""

import pytest
import torch

from mxcompile.formats import MXFP4, ScaleRule
from mxcompile.numerics import reference, row_slices


@pytest.mark.parametrize("shape", [(1, 40), (7, 33), (3, 5, 64), (2, 0, 32), (0, 32), (2, 300)])
@pytest.mark.parametrize("values", [1, 64, 1000])
def test_equals_the_whole(shape, values, monkeypatch):
    monkeypatch.setattr(row_slices, "SLICE_VALUES", values)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given = row_slices.row_wise(lambda part: reference.quantize(part, MXFP4, ScaleRule.MSE), x)
    for one, other in zip(given, reference.quantize(x, MXFP4, ScaleRule.MSE), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_slices_several_tensors_alike(monkeypatch):
    monkeypatch.setattr(row_slices, "SLICE_VALUES", 8)
    x, scales = torch.arange(24.0).view(6, 4), torch.arange(6.0).view(6, 1)
    (product,) = row_slices.row_wise(lambda a, b: (a * b,), x, scales)
    assert torch.equal(product, x * scales)
