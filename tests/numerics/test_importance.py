"""Channel importance from sampled inputs, and scales of least weighted error."""

import pytest
import torch

from mxcompile.formats import FORMATS, MXFP4, MXINT4, MXINT8, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.importance import floored, round_weighted, token_weights
from mxcompile.numerics.metrics import sqnr_db


def rounded(rows, importance, fmt):
    values, scales = round_weighted(rows, importance, fmt)
    codes = reference.quantize_on_scales(rows.nan_to_num(), scales.clamp(max=254), fmt)
    again = reference.dequantize(codes, scales, fmt, rows.shape[-1], rows.dtype)
    torch.testing.assert_close(values, again, rtol=0, atol=0, equal_nan=True)  # values lie on the scales
    return values


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [32, 50, 64])
def test_no_rule_has_less_weighted_error(name, size):
    fmt, generator = FORMATS[name], torch.Generator().manual_seed(0)
    rows, importance = torch.randn(16, size, generator=generator), torch.rand(size, generator=generator) ** 4

    def error(values):
        return ((values - rows).square() * importance).sum().item()

    least = error(rounded(rows, importance, fmt))
    for rule in (ScaleRule.FLOOR, ScaleRule.RCEIL, ScaleRule.MSE):
        assert least <= error(reference.quantize_dequantize(rows, fmt, rule)) * (1 + 1e-6)


def test_a_channel_that_matters_alone_is_kept():
    """One weight of 7 among small ones that matter: the scale follows the small ones."""
    rows = torch.full((1, 32), 0.25)
    rows[0, 0] = 7.0
    importance = torch.ones(32)
    importance[0] = 1e-6
    assert torch.equal(rounded(rows, importance, MXINT4)[0, 1:], rows[0, 1:])
    assert rounded(rows, torch.ones(32), MXINT4)[0, 0] > 6


def test_nan_stays_nan_and_zeros_zero():
    rows = torch.zeros(2, 32)
    rows[0, 3] = torch.nan
    values = rounded(rows, torch.ones(32), MXINT4)
    assert values[0].isnan().all()
    assert torch.equal(values[1], rows[1])


def test_a_token_of_great_energy_counts_four_times_the_median():
    x = torch.ones(9, 4)
    x[0] *= 100
    assert token_weights(x)[1:].eq(1).all()
    torch.testing.assert_close((x.square() * token_weights(x)).sum(-1)[0].item(), 16.0, rtol=1e-6, atol=0)
    padded = torch.cat((x, torch.zeros(30, 4)))
    assert torch.equal(token_weights(padded)[:9], token_weights(x))
    assert floored(torch.zeros(4)).gt(0).all()


@pytest.mark.parametrize("fmt", [MXINT4, MXINT8, MXFP4], ids=str)
def test_weights_near_the_limits_of_their_dtype(fmt):
    """Finite, and as exact as the plain rounding with scales of least squared error."""
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    for weight in (rows * 1e-38, rows * 1e38, (rows * 32752).half()):
        values, _ = round_weighted(weight, torch.ones(64), fmt)
        plain = reference.quantize_dequantize(weight, fmt, ScaleRule.MSE)
        assert values.isfinite().all()
        assert sqnr_db(weight.double(), values.double()) > sqnr_db(weight.double(), plain.double()) - 0.1


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_token_weights_of_values_whose_squares_are_beyond_float32(size):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    x[0] *= 100
    torch.testing.assert_close(token_weights(x * size), token_weights(x), rtol=1e-4, atol=0)
