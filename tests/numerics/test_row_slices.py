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


def test_transposed_experts_are_sliced_without_a_copy(monkeypatch):
    monkeypatch.setattr(row_slices, "SLICE_VALUES", 16)
    x = torch.randn(3, 8, 5).transpose(-1, -2)
    parts = [part for (part,) in row_slices.row_slices(x)]
    assert all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in parts)
    assert torch.equal(torch.cat(parts), x.flatten(0, 1))
    assert torch.equal(row_slices.row_wise(lambda part: (part * 2,), x)[0], x * 2)


def test_columns_of_experts_are_taken_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(row_slices, "SLICE_VALUES_ON_GPU", 1)
    sizes: list[tuple[int, ...]] = []

    def largest(part):
        sizes.append(tuple(part.shape))
        return part.abs().amax(0)

    x = torch.randn(3, 8, 40)
    assert torch.equal(row_slices.column_wise(largest, x), x.abs().flatten(0, 1).amax(0))
    assert sizes == [(24, 16), (24, 16), (24, 8)]


def test_finite_without_a_mask():
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.zeros(2, 3)
        x[1, 1] = value
        assert not row_slices.all_finite(x)
    assert row_slices.all_finite(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert row_slices.all_finite(torch.zeros(0, 3))
