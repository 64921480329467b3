"""block_order: exchanges that lower the error expected of blocks."""

import pytest
import torch

from mxcompile.formats import MXFP8_E4M3, MXINT4, MXINT8, ScaleRule
from mxcompile.numerics.block_order import BlockErrors, RoundingErrors, alike, exchanged

INTEGERS = RoundingErrors.of(MXINT4, ScaleRule.MSE), RoundingErrors.of(MXINT8, ScaleRule.FLOOR)


def classes(values: int = 4, channels: int = 128) -> BlockErrors:
    """Every value has its own quarter of the channels with weights a thousandth of the others', spread over blocks."""
    weights = torch.ones(values, channels)
    for value in range(values):
        weights[value, value::values] = 1e-3
    return BlockErrors(weights, 1 / weights, *INTEGERS, 32)


def test_channels_that_are_alike_share_blocks():
    errors, present = classes(), torch.arange(128)
    order = alike(errors.weights, 32)
    assert torch.equal(order.sort().values, present)
    assert [len(block.remainder(4).unique()) for block in order.split(32)] == [1, 1, 1, 1]
    assert errors.total(order) < errors.total(present) / 10
    assert torch.equal(exchanged(errors, order, [present]), order)


def test_exchanges_mend_a_disturbed_order():
    errors, present = classes(), torch.arange(128)
    best = alike(errors.weights, 32)
    disturbed = best.clone()
    disturbed[[0, 40, 70]] = best[[40, 70, 0]]
    order = exchanged(errors, disturbed, [present])
    assert torch.equal(order.sort().values, present)
    assert errors.total(order) == pytest.approx(errors.total(best), rel=1e-5)


def test_places_change_within_their_cells_alone():
    errors, present = classes(), torch.arange(128)
    halves = present[::2], present[1::2]
    order = exchanged(errors, present, halves)
    assert all(torch.equal(order[half].sort().values, half) for half in halves)
    assert errors.total(order) < errors.total(present)


@pytest.mark.parametrize("channels", [40, 1])
def test_a_last_block_may_be_shorter(channels):
    generator = torch.Generator().manual_seed(0)
    energies = torch.rand(2, 3, channels, generator=generator)
    errors, present = BlockErrors(*energies, *INTEGERS, 32), torch.arange(channels)
    order = exchanged(errors, present, [present])
    assert torch.equal(order.sort().values, present)
    assert errors.total(order) <= errors.total(present)


def test_nothing_is_lost_where_nothing_is_rounded():
    exact = RoundingErrors.of(None, ScaleRule.MSE)
    present = torch.arange(128)
    assert BlockErrors(torch.ones(1, 128), torch.rand(1, 128), exact, exact, 32).total(present) == 0


def test_errors_of_formats():
    """Integers lose what is small in its block, floats a share of itself; no more is lost than there is."""
    integer, floating = INTEGERS[0], RoundingErrors.of(MXFP8_E4M3, ScaleRule.RCEIL)
    energies = torch.tensor([1e4, *[1.0] * 31])
    assert integer(energies)[1] == 1.0
    assert 0 < floating(energies)[1] < 1e-2
    assert integer(torch.ones(32))[0] == pytest.approx(0.0147, rel=0.05)  # 18 dB


def test_a_value_of_zeros_has_no_error():
    errors = BlockErrors(torch.zeros(1, 64), torch.zeros(1, 64), *INTEGERS, 32)
    present = torch.arange(64)
    assert errors.total(present) == 0
    assert torch.equal(exchanged(errors, present, [present]), present)
