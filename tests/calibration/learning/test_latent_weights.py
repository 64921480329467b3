"""Weights in training: they begin as they were rounded, stay MX values, and move by their gradients."""

import pytest
import torch
from torch import Tensor

from mxcompile.calibration.learning.latent_weights import FAR, LatentWeight, Trained
from mxcompile.formats import MXFP4, MXFP8_E4M3, MXINT4, MXINT8, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.exact_packing import pack_exactly
from mxcompile.numerics.importance import round_rows

FORMATS = [MXINT4, MXFP4, MXINT8, MXFP8_E4M3, MXINT4.with_block(16)]


def weight(rows: int = 8, size: int = 96, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def latent(rows: Tensor, fmt: MXFormat, trained: Trained = Trained.ROUNDING, **options) -> LatentWeight:
    values, scales = round_rows(rows, fmt, ScaleRule.MSE)
    return LatentWeight(rows, values, scales, fmt, trained, **options)


def check_packs(trained: LatentWeight, fmt: MXFormat) -> None:
    """Raises InexactError unless the values are numbers of the format with the scales."""
    pack_exactly(trained.values(), trained.scales(), fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", Trained)
@pytest.mark.parametrize("size", [96, 40])
def test_begins_as_it_was_rounded(fmt, kind, size):
    """Also from values that are not the nearest: up to two steps away, as GPTQ may leave them."""
    rows = weight(size=size)
    values, scales = round_rows(rows + 0.1 * weight(size=size, seed=1), fmt, ScaleRule.MSE)
    for inside in (0.49, FAR):
        trained = LatentWeight(rows, values, scales, fmt, kind, None, inside)
        assert torch.equal(trained.values(), values)
        assert torch.equal(trained.scales(), scales)


def test_latents_of_a_block_move_alike():
    """By the mean distance of neighbouring elements: 2^-9 around zero in E4M3, 32 around the largest."""
    rows = torch.cat([torch.zeros(1, 31), torch.full((1, 1), 448.0), torch.full((1, 32), 448.0)], -1)
    trained = latent(rows, MXFP8_E4M3, Trained.WEIGHTS)
    trained.backward(torch.ones(1, 64))
    mean = (31 * 2.0**-9 + 32.0) / 32
    assert torch.equal(trained.parameter.grad.flatten(), torch.tensor([mean] * 32 + [32.0] * 32))
    with torch.no_grad():
        trained.parameter.fill_(-1.0)
    assert torch.equal(trained.values(), reference.round_elements(rows - trained.parameter.grad.flatten(), MXFP8_E4M3))
    directions = latent(rows, MXFP8_E4M3, Trained.ROUNDING)
    with torch.no_grad():
        directions.parameter.fill_(-1.0)
    assert directions.values()[0, :2].tolist() == [-(2.0**-9)] * 2


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_elements_move_against_the_sign_of_the_gradient(fmt):
    rows = weight()
    trained = latent(rows, fmt, bound=0.5)
    before = trained.values()
    direction = torch.where(weight(seed=2) > 0, 1.0, -1.0)
    trained.backward(direction * weight(seed=3).abs())
    assert torch.equal(trained.parameter.grad.flatten(-2), direction)
    with torch.no_grad():
        trained.parameter -= 3.0 * trained.parameter.grad
    trained.keep_bound()
    assert trained.parameter.abs().max() == 0.5
    moved = trained.values() - before
    assert ((moved == 0) | (moved.sign() == -direction)).all()
    assert (moved != 0).float().mean() > 0.4
    check_packs(trained, fmt)


@pytest.mark.parametrize("kind", [Trained.WEIGHTS, Trained.CLIP])
def test_gradients_are_those_of_the_values(kind):
    """Of latents exactly those of `2^e step (w + v)`; of exponents, that of the block's values at fixed elements."""
    rows, fmt = weight(), MXINT4
    trained = latent(rows, fmt, kind)
    gradient = weight(seed=4)
    trained.backward(gradient)
    scales = reference.scale_values(trained.scales()).unsqueeze(-1)
    blocks = reference.to_blocks(gradient, fmt)
    if kind is Trained.WEIGHTS:
        assert torch.allclose(trained.parameter.grad, blocks * scales * 2.0**-fmt.mantissa_bits, rtol=1e-6)
        return
    floats, rounded = reference.to_blocks(rows, fmt), reference.to_blocks(trained.values(), fmt)
    nearest = (floats - rounded).abs() < scales * 2.0**-fmt.mantissa_bits / 2
    inside = floats.abs() < fmt.max_value * scales
    slope = (rounded - torch.where(nearest & inside, floats, rounded * 0 + floats * inside)) * blocks
    expected = slope.sum(-1, keepdim=True) * torch.log(torch.tensor(2.0))
    assert torch.allclose(trained.parameter.grad, expected, rtol=0.05, atol=0.05 * float(expected.abs().mean()))


def test_exponents_are_chosen_by_importance():
    """A block with an outlier in a channel that does not matter gets a smaller scale, and loses it."""
    rows = weight() * 0.1
    rows[:, 5] = 1.1
    trained = latent(rows, MXINT4)
    importance = torch.ones(96)
    importance[5] = 1e-6
    before = trained.scales().clone()
    assert trained.choose_exponents(importance) >= 8
    after = trained.scales()
    assert (after[:, 0] == before[:, 0] - 1).all()
    check_packs(trained, MXINT4)
    assert trained.choose_exponents(importance) == 0  # nothing better is left


def test_scales_stay_in_the_range_of_the_dtype():
    """The largest float16 stays finite, and zeros and subnormals stay what they were."""
    rows = weight(dtype=torch.float16)
    rows[0] = 65504.0
    rows[1] = 0.0
    rows[2] = 6e-8
    trained = latent(rows, MXFP4, Trained.CLIP)
    with torch.no_grad():
        trained.parameter += 1.0
    assert trained.values().isfinite().all()
    check_packs(trained, MXFP4)
    assert (trained.values()[1] == 0).all()
