"""Metrics: values on cases that can be computed by hand, and their limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.numerics.metrics import (
    kl_divergence,
    negative_log_likelihood,
    perplexity,
    sqnr_db,
    top1_agreement,
)

examples = settings(derandomize=True, deadline=None, database=None, max_examples=50)
ROUNDING = 1e-6  # float32 log-softmax over a handful of entries


def test_sqnr_by_hand():
    signal = torch.tensor([3.0, 4.0])
    assert sqnr_db(signal, torch.tensor([3.0, 4.5])) == pytest.approx(20.0, abs=1e-12)  # 25 / 0.25
    assert sqnr_db(signal, torch.zeros(2)) == 0.0
    assert sqnr_db(signal, -signal) == pytest.approx(-20 * math.log10(2), abs=1e-12)


def test_sqnr_at_its_limits():
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sqnr_is_computed_in_float64(dtype):
    largest = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    assert sqnr_db(largest, largest / 2) == pytest.approx(20 * math.log10(2), abs=1e-2)  # max / 2 is rounded in half
    assert math.isfinite(sqnr_db(largest, -largest))


@examples
@given(st.floats(-100, 100), st.integers(0, 2**32 - 1))
def test_sqnr_does_not_depend_on_scale(exponent, seed):
    x, noise = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scale = 2.0 ** round(exponent)
    assert sqnr_db(scale * x, scale * (x + noise)) == pytest.approx(sqnr_db(x, x + noise), abs=1e-9)


def test_top1_by_hand():
    reference = torch.tensor([[0.0, 1.0], [1.0, 0.0], [5.0, 4.0], [0.0, 9.0]])
    other = torch.tensor([[0.0, 8.0], [0.0, 1.0], [2.0, 1.0], [1.0, 0.0]])
    assert top1_agreement(reference, other) == 0.5
    assert top1_agreement(reference, reference) == 1.0
    assert top1_agreement(reference, -reference) == 0.0


def test_kl_by_hand():
    half, skewed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(half, skewed) == pytest.approx(expected, abs=ROUNDING)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence(skewed, half) == pytest.approx(reverse, abs=ROUNDING)
    assert kl_divergence(torch.cat([half, half]), torch.cat([half, skewed])) == pytest.approx(
        expected / 2, abs=ROUNDING
    )


@examples
@given(st.integers(0, 2**32 - 1), st.floats(-30, 30))
def test_kl_is_a_divergence_of_distributions(seed, shift):
    logits, other = 4 * torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(seed))
    assert kl_divergence(logits, logits) == 0.0
    assert kl_divergence(logits, other) > 0.0
    # a constant added to all logits changes nothing, but for its own rounding: 30 has a step of 2**-19
    assert kl_divergence(logits, other + shift) == pytest.approx(kl_divergence(logits, other), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_measures_of_half_precision_are_those_of_its_values_in_float32(dtype):
    logits, other = (4 * torch.randn(2, 5, 16)).to(dtype)
    assert kl_divergence(logits, other) == kl_divergence(logits.float(), other.float())
    assert top1_agreement(logits, other) == top1_agreement(logits.float(), other.float())


def test_negative_log_likelihood_is_a_sum_over_tokens():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    expected = math.log(4 / 3) + math.log(2)
    assert negative_log_likelihood(logits, torch.tensor([1, 0])) == pytest.approx(expected, abs=ROUNDING)
    assert math.isnan(negative_log_likelihood(logits + math.inf, torch.tensor([1, 0])))


def test_perplexity_of_a_mean_likelihood_and_where_it_overflows():
    assert perplexity(math.log(50)) == pytest.approx(50, rel=1e-12)
    assert math.isfinite(perplexity(709.0))
    assert perplexity(710.0) == perplexity(math.inf) == math.inf
