"""Where elements were before they were rounded: kept in a byte each."""

import pytest
import torch

from mxcompile.formats import MXFP4, MXFP6_E3M2, MXFP8_E4M3, MXINT4, MXINT8, ScaleRule
from mxcompile.numerics.importance import round_rows
from mxcompile.numerics.rounding_offsets import offsets_of, unrounded_by

FORMATS = [MXINT4, MXFP4, MXINT8, MXFP6_E3M2, MXFP8_E4M3, MXINT4.with_block(16)]


def rows(size: int = 96, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(16, size, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("size", [96, 40])
@pytest.mark.parametrize("scale", [1.0, 2.0**-120, 2.0**100])
def test_the_weight_comes_back(fmt, size, scale):
    """To a 508th of the distance of neighbours, at most 2^(1 - mantissa bits) of the element; rounded, it is the same.

    Not for elements beyond the largest, whose offset is half a step.
    """
    weight = rows(size, scale)
    values, scales = round_rows(weight, fmt, ScaleRule.FLOOR)
    offsets = offsets_of(weight, values, scales, fmt)
    assert offsets.dtype == torch.int8
    assert offsets.shape == weight.shape
    again = unrounded_by(offsets, values, scales, fmt)
    steps = (again - values).abs() / (offsets.abs().clamp(min=1) / 254)  # where the offset is not zero
    inside = offsets.abs() < 127
    assert inside.float().mean() > 0.9
    error = (again - weight).abs()
    assert bool((error <= steps / 508 * 1.01)[inside & (offsets != 0)].all())
    assert torch.allclose(again[offsets == 0], values[offsets == 0], rtol=0, atol=0)


def test_offsets_are_in_steps_around_the_element():
    """Elements of MXFP4 near 1 are 0.5 apart, near 4 2 apart; beyond the largest, half a step is the most."""
    weight = torch.zeros(1, 32)
    weight[0, :5] = torch.tensor([6.0, 1.125, 4.5, -1.125, 7.9])
    values, scales = round_rows(weight, MXFP4, ScaleRule.FLOOR)
    assert values[0, :5].tolist() == [6.0, 1.0, 4.0, -1.0, 6.0]
    assert offsets_of(weight, values, scales, MXFP4)[0, :5].tolist() == [0, 64, 64, -64, 127]


def test_zeros_have_none():
    values, scales = round_rows(torch.zeros(2, 64), MXINT4, ScaleRule.MSE)
    offsets = offsets_of(values, values, scales, MXINT4)
    assert not offsets.any()
    assert not unrounded_by(offsets, values, scales, MXINT4).any()
