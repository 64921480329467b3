"""Second moments: the corrected target is the least-squares weight, and the residual of a matmul's output is found."""

import weakref

import pytest
import torch
from models import build, inputs, llama

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.calibration.quantizers import input_roundings
from mxcompile.calibration.runs.twin_run import TwinRun
from mxcompile.calibration.statistics.second_moments import SecondMoments, residual_operand
from mxcompile.formats import MXINT4, MXINT8
from mxcompile.graph.inputs import as_inputs
from mxcompile.numerics.column_rounding import ColumnRounding, IllConditionedError
from mxcompile.numerics.importance import token_weights


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def target(moments: SecondMoments, weights: dict, damping: float, strength: float) -> torch.Tensor:
    return moments.target(weights, ColumnRounding(MXINT4, damping).factor(moments.inputs), strength)


def test_the_target_is_the_least_squares_weight():
    """Exact outputs from inexact inputs plus the residual's error, compared with torch's own solver."""
    exact, weight, lost = values(200, 8), values(5, 8, seed=1), values(200, 5, seed=2)
    x = exact + 0.3 * values(200, 8, seed=3)
    moments = SecondMoments(8, x.device)
    for part in range(0, 200, 50):  # a batch at a time
        rows = slice(part, part + 50)
        moments.update(x[rows], exact[rows], {"linear": lost[rows]})
    counts = torch.cat([(x[i : i + 50].square().sum(1, keepdim=True)) for i in range(0, 200, 50)])
    assert counts.max() < 4 * counts.median()  # no token is capped here
    wanted = torch.linalg.lstsq(x, exact @ weight.T + lost).solution.T
    torch.testing.assert_close(target(moments, {"linear": weight}, 0.0, 1.0), wanted, rtol=1e-4, atol=1e-4)
    half = target(moments, {"linear": weight}, 0.0, 0.5)
    torch.testing.assert_close(half, (weight + wanted) / 2, rtol=1e-4, atol=1e-4)
    assert torch.equal(target(moments, {"linear": weight}, 0.0, 0.0), weight)
    other = values(3, 8, seed=4)
    both = target(moments, {"other": other, "linear": weight}, 0.0, 1.0)
    alone = torch.linalg.lstsq(x, exact @ other.T).solution.T
    torch.testing.assert_close(both, torch.cat((alone, wanted)), rtol=1e-4, atol=1e-4)


def test_outputs_say_the_same_as_inputs():
    """Y - W H = W D; sizes of one panel and of several, the last one narrower."""
    for size in (8, 300, 600):
        exact, weight = values(2 * size, size), values(5, size, seed=1)
        x = exact + 0.3 * values(2 * size, size, seed=3)
        by_input, by_output = (SecondMoments(size, x.device) for _ in range(2))
        for rows in (slice(0, size), slice(size, 2 * size)):
            by_input.update(x[rows], exact[rows])
            by_output.update(x[rows], exact_outputs={"linear": exact[rows] @ weight.T})
        assert torch.equal(by_input.inputs, by_output.inputs)
        assert torch.equal(by_input.inputs, by_input.inputs.T) or size == 8
        found, wanted = (target(moments, {"linear": weight}, 0.01, 1.0) for moments in (by_output, by_input))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_second_moments_are_those_of_all_tokens():
    for size in (1, 130, 513):
        x = values(64, size)
        moments = SecondMoments(size, x.device)
        for part in x.split(24):
            moments.update(part)
        weighted = torch.cat([part * token_weights(part) for part in x.split(24)])
        torch.testing.assert_close(moments.inputs, weighted.T @ x, rtol=1e-5, atol=1e-4)
        assert moments.tokens == 64


def test_a_target_that_cannot_be_solved_for_is_an_error():
    moments = SecondMoments(4, torch.device("cpu"))
    moments.update(torch.eye(4), torch.full((4, 4), torch.inf))
    with pytest.raises(IllConditionedError, match="cannot be solved for"):
        target(moments, {"linear": torch.ones(2, 4)}, 0.01, 1.0)


@pytest.mark.parametrize("size", [2.0**-80, 2.0**80])
def test_the_target_is_the_same_for_values_of_any_size(size):
    """Their squares are beyond float32; powers of two, so that nothing else differs."""
    exact, weight, lost = values(200, 8), values(5, 8, seed=1), values(200, 5, seed=2)
    x = exact + 0.3 * values(200, 8, seed=3)
    plain, scaled = SecondMoments(8, x.device), SecondMoments(8, x.device)
    plain.update(x, exact, {"linear": lost})
    scaled.update(x * size, exact * size, {"linear": lost * size})
    wanted, given = (target(moments, {"linear": weight}, 0.01, 1.0) for moments in (plain, scaled))
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_what_outputs_are_added_to():
    program = mxcompile.trace(build("llama"), inputs("llama"))
    found = {matmul.parameter.split(".")[-2]: residual_operand(matmul) for matmul in choose(program).matmuls}
    assert [name for name, node in found.items() if node is not None] == ["o_proj", "down_proj"]
    (stream,) = [node for node in found["down_proj"].users if node.target is torch.ops.aten.add.Tensor]
    assert stream.args[0] is found["down_proj"]


@pytest.mark.parametrize("activation", [None, MXINT8], ids=["float", "mxint8"])
def test_streams_agree_until_something_is_rounded(activation):
    """No weight rounded: with float activations the input error is zero, with rounded ones small."""
    batches = [inputs("llama", 4, 16, seed=seed) for seed in range(2)]
    program = mxcompile.trace(llama(2), batches[0])
    program.batches = tuple(as_inputs(batch) for batch in batches)
    matmuls = choose(program).matmuls
    twin_run = TwinRun(program, matmuls, input_roundings(program, matmuls, activation), with_exact=True)
    for segment in twin_run.segments:
        (moments,) = twin_run.moments(segment, segment.readers_of(segment.inputs[0]), residual=True)
        assert moments.input_error is not None
        share = (moments.input_error.norm() / moments.inputs.norm()).item()
        assert share == 0 if activation is None else 0 < share < 0.02
        twin_run.advance(segment)


def test_exact_weights_are_let_go_behind_their_segment():
    """Once rounded ones stand in their place, nothing holds them; those read elsewhere too stay."""
    program = mxcompile.trace(build("llama-tied"), inputs("llama-tied"))
    names = [matmul.parameter for matmul in choose(program).matmuls]
    for name in names:
        program.set_tensor(name, program.tensor(name).detach() * 2)
    held = [weakref.ref(program.tensor(name)) for name in names]
    matmuls = choose(program).matmuls
    twin_run = TwinRun(program, matmuls, input_roundings(program, matmuls, None), with_exact=True)
    for segment in twin_run.segments:
        for matmul in segment.matmuls:
            program.set_tensor(matmul.parameter, program.tensor(matmul.parameter).detach() * 3)
        assert all(held[names.index(matmul.parameter)]() is not None for matmul in segment.matmuls)
        twin_run.advance(segment)
        assert all(held[names.index(matmul.parameter)]() is None for matmul in segment.matmuls)
