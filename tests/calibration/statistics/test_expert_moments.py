"""Second moments of experts: own tokens, all tokens, and between; the tokens of each expert are counted."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mxcompile
from mxcompile.calibration.runs.twin_run import TwinRun
from mxcompile.calibration.statistics.expert_moments import ExpertStatistics, ExpertTokens, expert_rows, rows_of_all
from mxcompile.calibration.statistics.second_moments import SecondMoments
from mxcompile.graph.inputs import as_inputs

SIZE = 8


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(*rows: torch.Tensor) -> SecondMoments:
    moments = SecondMoments(SIZE, torch.device("cpu"))
    for each in rows:
        moments.update(each)
    return moments


@pytest.mark.parametrize("tokens", [0, 1, 16, 64])
@pytest.mark.parametrize("unit", [1.0, 2.0**-80, 2.0**80])
def test_shrunk_moments_are_those_of_further_tokens_like_all(tokens, unit):
    """H_e + n0 mean H_all; without tokens of its own, an expert has the mean of all."""
    own, everyone = values(tokens, SIZE) * unit, values(100, SIZE, seed=1) * unit
    statistics = ExpertStatistics(shrinkage=2)
    combined = statistics.combine(moments_of(own), moments_of(everyone))
    expected = moments_of(own / unit).inputs + 2 * SIZE * moments_of(everyone / unit).inputs / 100
    torch.testing.assert_close(combined.inputs, expected * (unit * (combined._scale or 1.0)) ** 2, rtol=1e-5, atol=1e-5)
    assert (combined.tokens, combined.borrowed) == (tokens, 2 * SIZE)


def test_units_that_differ():
    """Values so small that they have a unit of their own, among those of others that have not: they vanish there."""
    own, everyone = values(20, SIZE) * 2.0**-60, values(100, SIZE, seed=1)
    combined = ExpertStatistics(shrinkage=1).combine(moments_of(own), moments_of(everyone))
    assert combined._scale > 1
    expected = SIZE * moments_of(everyone).inputs / 100
    torch.testing.assert_close(combined.inputs / combined._scale**2, expected, rtol=1e-5, atol=1e-6)


def test_many_tokens_are_their_own():
    own, everyone = values(100_000, SIZE), 3 * values(100, SIZE, seed=1)
    combined = ExpertStatistics().combine(moments_of(own), moments_of(everyone))
    mean = moments_of(own).inputs / 100_000
    assert (combined.inputs / (100_000 + 2 * SIZE) - mean).norm() < 0.01 * mean.norm()  # of all: 9 times as large


def test_own_alone_and_all():
    own, everyone = moments_of(values(5, SIZE)), moments_of(values(100, SIZE, seed=1))
    before = own.inputs.clone()
    alone = ExpertStatistics(shrinkage=0)
    assert not alone.uses_all
    assert torch.equal(alone.combine(own, None).inputs, before)
    every = ExpertStatistics(ExpertTokens.ALL)
    assert not every.uses_own
    for count in (0, 7):
        combined = every.combine(SimpleNamespace(tokens=count, owner=None), everyone)
        assert torch.equal(combined.inputs, everyone.inputs)
        assert (combined.tokens, combined.borrowed) == (count, 100)


def test_nothing_to_borrow():
    own = ExpertStatistics().combine(moments_of(), moments_of())
    assert (own.tokens, own.borrowed) == (0, 0)


def test_shrinking_commutes_with_merging():
    """Both are sums: the parts of two processes, added, are what one process sees."""
    parts = [values(12, SIZE, seed=seed) for seed in range(2)]
    statistics = ExpertStatistics()
    whole = statistics.combine(moments_of(*parts), moments_of(*parts)).inputs
    sums = sum(moments_of(part).inputs for part in parts)
    torch.testing.assert_close(whole, sums + 2 * SIZE * sums / 24)


def test_rows_of_experts():
    x = values(6, 4)
    parts = expert_rows(x, torch.tensor([2, 2, 5]), 3)
    assert [len(part) for part in parts] == [2, 0, 3]
    assert torch.equal(rows_of_all(parts), x[:5])  # the last row is of no expert
    kept = torch.tensor([True, False, True, True, False, True])
    assert torch.equal(rows_of_all(expert_rows(x, torch.tensor([2, 2, 5]), 3, kept)), x[[0, 2, 3]])


def test_rows_of_zeros_are_of_other_experts():
    x = values(3, 5, 4)
    x[1, 2:] = 0.0
    parts = expert_rows(x, None, 3)
    assert [len(part) for part in parts] == [5, 2, 5]
    assert torch.equal(parts[1], x[1, :2])
    masked = expert_rows(x, None, 3, torch.arange(15).view(3, 5) % 5 != 0)
    assert [len(part) for part in masked] == [4, 1, 4]


def test_an_input_that_all_experts_read_counts_once():
    for mask, count in ((None, 7), (torch.arange(7) > 2, 4)):
        parts = expert_rows(values(7, 4), None, 3, mask)
        assert [len(part) for part in parts] == [count] * 3
        assert len(rows_of_all(parts)) == count


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(values(count, 32, 16))

    def forward(self, x):
        return torch.bmm(x, self.weight)


@pytest.mark.parametrize("tokens", list(ExpertTokens))
def test_groups_of_experts_have_the_moments_of_all_at_once(monkeypatch, tokens):
    """All experts' tokens are gathered once, whatever the number of experts at a time."""
    batches = [values(5, 10, 32, seed=seed) for seed in range(2)]
    batches[1][3] = 0.0
    program = mxcompile.trace(Experts(5).eval(), batches[0])
    program.batches = tuple(as_inputs(batch) for batch in batches)

    def gathered(at_once: int) -> list[SecondMoments]:
        monkeypatch.setattr("mxcompile.calibration.runs.twin_run._experts_at_once", lambda _: at_once)
        (matmul,) = mxcompile.analysis.choice.choose(program).matmuls
        run = TwinRun(program, [matmul], {matmul: lambda x: x}, with_exact=False)
        (segment,) = (each for each in run.segments if matmul in each.matmuls)
        return list(run.moments(segment, [matmul], False, ExpertStatistics(tokens)))

    expected = gathered(5)
    assert [each.tokens for each in expected] == [20, 20, 20, 10, 20]
    for at_once in (1, 2):
        actual = gathered(at_once)
        assert [each.tokens for each in actual] == [20, 20, 20, 10, 20]
        assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(actual, expected, strict=True))
    same = torch.equal(expected[0].inputs, expected[3].inputs)
    assert same == (tokens is ExpertTokens.ALL)
