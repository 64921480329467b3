"""Factor search: the error is that of the later rounding, factors of 1 are always tried, candidates are finite."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import inputs, llama, outliers
from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import ScaleGroup, find_groups, fold
from mxcompile.analysis.segments import find_segments
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.runs.altered_run import AlteredRun
from mxcompile.calibration.runs.run import BoundBatch, Runner
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.calibration.searches.factor_search import (
    Operand,
    normalize_factors,
    output_error,
    per_channel,
    power_candidates,
    search_factors,
)
from mxcompile.calibration.searches.fold_search import FoldSearchResult
from mxcompile.calibration.searches.group_facts import GroupFacts, first_batches
from mxcompile.calibration.statistics.observers import ChannelImportance, TokenSample
from mxcompile.formats import MXFP4, MXINT4, MXINT8, MXFormat, activation_rule
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.numerics import reference
from mxcompile.numerics.importance import round_weighted, token_weights

examples = settings(derandomize=True, deadline=None, database=None, max_examples=60)
W4A8 = Quantizers(MXINT4, MXINT8)
magnitudes = st.lists(st.floats(0.0, 1e4, width=32), min_size=1, max_size=40).map(torch.tensor)


# Errors


def operand(width: int = 64, outlier: float = 30.0) -> Operand:
    """40 tokens with an outlier channel, a weight of 24 rows, a factor for every channel but the last."""
    x, weight = torch.randn(40, width), torch.randn(24, width)
    x[:, 5] *= outlier
    channels = torch.arange(width)
    channels[-1] = -1
    return Operand(x, x.square().mean(0), [weight], channels)


@pytest.mark.parametrize("activation", [MXINT8, None], ids=str)
@pytest.mark.parametrize("weight", [MXINT4, MXFP4], ids=str)
def test_factors_of_one_make_the_error_of_rounding(weight: MXFormat, activation: MXFormat | None):
    """|| (Q(X) Q(W)^T - X W^T) c ||^2, summed over operands; W with the weights' own scales, c the tokens' counts."""
    operands, wanted = [operand(), operand(96)], 0.0
    for o in operands:
        rounded, _ = round_weighted(o.weights[0], o.importance, weight, (-1, 0))
        x = o.inputs
        if activation is not None:
            x = reference.quantize_dequantize(x, activation, activation_rule(activation))
        error = (x @ rounded.T - o.inputs @ o.weights[0].T).square().sum(-1)
        wanted += (error * token_weights(o.inputs).squeeze(-1)).sum().item()
    found = output_error(operands, Quantizers(weight, activation))(torch.ones(95))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_power_of_two_for_all_channels_changes_nothing():
    """One factor for all channels scales blocks and scales alike: the same elements, the same error."""
    o = operand()
    o = Operand(o.inputs, o.importance, o.weights, torch.zeros(64, dtype=torch.int64))
    error = output_error([o], W4A8)
    assert error(torch.tensor([8.0])) == error(torch.ones(1)) > 0


def test_a_factor_that_takes_an_outlier_away_loses_less():
    o = operand()
    factors = torch.ones(64)
    factors[5] = 16.0
    error = output_error([o], Quantizers(MXINT8, MXINT4))
    assert error(factors) < 0.5 * error(torch.ones(64))


def test_channels_without_a_factor_keep_theirs():
    assert per_channel(torch.tensor([2.0, 4.0]), torch.tensor([1, -1, 0, 1])).tolist() == [4.0, 1.0, 2.0, 4.0]


# Candidates


def test_the_least_error_is_found_and_one_is_among_the_tried():
    target = torch.tensor([2.0, 1.0])
    candidates = [torch.tensor([4.0, 1.0]), target, torch.tensor([2.0, 8.0])]

    def error(factors: Tensor) -> float:
        return (factors - target).abs().sum().item()

    found = search_factors(candidates, error, 2)
    assert (found.factors.tolist(), found.error, found.error_before) == ([2.0, 1.0], 0.0, 1.0)
    assert search_factors([torch.tensor([9.0, 9.0])], error, 2).factors.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("error", [1.0, math.nan], ids=["no gain", "NaN"])
def test_what_does_not_gain_is_not_folded(error, traced):
    program = traced("mlp")
    group = find_groups(program, choose(program).matmuls)[0][0]
    found, before = FoldSearchResult(), program.tensor("up.weight")
    found.add(program, group, search_factors([torch.full((64,), 2.0)], lambda factors: error, group.count))
    assert [miss.reason for miss in found.misses] == ["no candidate factors reduce the error"]
    assert found.folds == []
    assert program.tensor("up.weight") is before


@examples
@given(magnitudes)
def test_normalized_factors(magnitude):
    """Around 1: extremes inverse to each other, at most 2^10 apart, in the order of the magnitudes."""
    factors = normalize_factors(magnitude)
    assert factors.isfinite().all()
    assert factors.min() >= 2.0**-5
    assert factors.max() <= 2.0**5
    assert (factors.max() * factors.min()).item() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(factors[magnitude.argsort()], factors.sort().values)


@examples
@given(magnitudes, st.integers(1, 12), st.booleans())
def test_candidates_for_any_magnitudes(magnitude, grid, both):
    """As many as asked for, positive and finite; the last is of the activations alone."""
    found = list(power_candidates(magnitude, magnitude.flip(0), grid, activation_alone=both))
    assert len(found) == (2 * grid - 1 if both else grid)
    assert all((factors > 0).all() and factors.isfinite().all() for factors in found)
    torch.testing.assert_close(
        found[-1],
        normalize_factors(magnitude.clamp(min=1e-5), (magnitude > 0) & (magnitude.flip(0) > 0)),
        rtol=1e-5,
        atol=0,
    )


def test_candidates_are_the_papers_factors():
    """x^a / w^(1-a) at a = 1/2 and 1, up to a factor common to all."""
    x, w = torch.rand(8) + 0.5, torch.rand(8) + 0.5
    half, one = power_candidates(x, w, 2, activation_alone=False)
    for found, wanted in ((half, (x / w).sqrt()), (one, x)):
        torch.testing.assert_close(found / found[0], wanted / wanted[0], rtol=1e-5, atol=0)


# The error of a block


@pytest.fixture(scope="module")
def scene() -> tuple[Program, GroupFacts, ScaleGroup]:
    """An MLP of a llama with outliers, its batches and statistics, and the group of gate and up."""
    given = inputs("llama", 4, 16)
    program = trace(outliers(), given)
    matmuls = choose(program).matmuls
    groups, _ = find_groups(program, matmuls)
    attention, mlp = find_segments(program, matmuls, [group.values for group in groups])
    sweep = Sweep(program, [program.example])
    sweep.advance(attention)
    before = first_batches(sweep.batches, mlp)
    observers = {value: [ChannelImportance(), TokenSample()] for value in mlp.inputs}
    sweep.advance(mlp, observers)
    known = {value: {type(o): o.value for o in kinds} for value, kinds in observers.items()}
    (group,) = (group for group in groups if group.value is mlp.inputs[0])
    return program, GroupFacts(mlp, before, known), group


def random_factors(group: ScaleGroup) -> Tensor:
    return torch.exp2(torch.rand(group.count) * 6 - 3)


@pytest.mark.parametrize("factors", [lambda group: torch.ones(group.count), random_factors], ids=["1", "random"])
def test_block_error_is_that_of_folding_and_rounding(factors, scene):
    """Nothing is folded to find it, and it is the error of the residual stream if it were."""
    program, facts, group = scene
    found = facts.block_error(program, group, W4A8)(chosen := factors(group))
    assert facts.encloses(group)
    folded, prepare = program.copy(), {}
    fold(folded, group, chosen)
    for matmul, channels in group.matmuls:
        importance = facts.statistics[matmul.activation][ChannelImportance] / per_channel(chosen, channels).square()
        folded.set_tensor(matmul.parameter, W4A8.round_weight(folded.tensor(matmul.parameter).detach(), importance))
        prepare[matmul] = W4A8.round_input
    (stream,) = facts.segment.outputs
    runs = Runner(program), AlteredRun(folded, prepare)
    exact, given = (
        run.run_nodes(facts.segment.nodes, facts.block_inputs[0], None, [stream])[stream].flatten(0, -2) for run in runs
    )
    wanted = ((given - exact).square() * token_weights(exact)).sum().item()
    assert found == pytest.approx(wanted, rel=1e-3)
    assert found > 0


def test_inputs_are_rounded_once_for_all_their_readers(scene):
    class Counting(Quantizers):
        calls = 0

        def round_input(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            return super().round_input(x)

    program, facts, group = scene
    error = facts.block_error(program, group, Counting(MXINT4, MXINT8))
    for _ in range(3):
        error(torch.ones(group.count))
    assert Counting.calls == 3


def test_first_batches_hold_2048_tokens():
    """Whole batches until there are enough, all of them if there never are."""
    program = trace(llama(1), inputs("llama"))
    segment, *_ = find_segments(program, choose(program).matmuls)
    states = [BoundBatch.of(program, {segment.inputs[0]: torch.zeros(8, 128, 64)}) for _ in range(5)]
    assert len(first_batches(states, segment)) == 2
    assert len(first_batches(states[:1], segment)) == 1
    assert len(first_batches([BoundBatch.of(program, {segment.inputs[0]: torch.zeros(1, 2000, 64)})] * 5, segment)) == 2
