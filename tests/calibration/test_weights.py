"""The weight of a batch: every statistic, search and loss counts its tokens that many times."""

import pytest
import torch
from models import inputs, llama, outliers
from torch import Tensor, nn

from mxcompile.analysis.choice import choose
from mxcompile.analysis.segments import find_segments
from mxcompile.calibration.learning.distillation import Distillation
from mxcompile.calibration.runs.altered_run import AlteredRun
from mxcompile.calibration.runs.run import BoundBatch, Request, gather_statistics
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.calibration.searches.group_facts import first_batches
from mxcompile.calibration.statistics.observers import (
    ChannelAbsMax,
    ChannelImportance,
    ChannelMeanAbs,
    Observer,
    RotatedObserver,
    TokenSample,
    observe,
)
from mxcompile.calibration.statistics.second_moments import SecondMoments
from mxcompile.errors import InputError
from mxcompile.graph.inputs import Inputs, WeightedBatch, as_inputs
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.pipeline.pipeline import Pipeline

MEANS = {
    "abs max": ChannelAbsMax,
    "mean magnitude": ChannelMeanAbs,
    "importance": ChannelImportance,
    "rotated": lambda: RotatedObserver(ChannelMeanAbs(), 4),
}
GPTQ = "gptq{format=mxint4,activation=mxint8,correction=0.5,residual=true}"
SEARCHES = {
    "gptq": GPTQ,
    "gptq without correction": "gptq{format=mxint4}",
    "awq-fold": "awq-fold{weight=mxint4,grid=3}",
    "awq-fold on blocks": "awq-fold{weight=mxint4,grid=3,objective=block}",
    "rotate": "rotate{weight=mxint4,activation=mxint4}",
    "round-weights": "round-weights{format=mxint4,weighted=true}",
    "tune-vectors": "round-weights{format=mxint4} | tune-vectors{activation=mxint8,steps=4}",
}


@pytest.mark.parametrize("kind", MEANS)
def test_a_weight_of_three_is_three_copies(kind):
    first, second = torch.randn(5, 8), torch.randn(3, 8)
    weighted, copied = MEANS[kind](), MEANS[kind]()
    observe(weighted, first, 1.0)
    observe(weighted, second, 3.0)
    for rows in (first, second, second, second):
        copied.update(rows)
    torch.testing.assert_close(weighted.value, copied.value, rtol=1e-6, atol=0)


def test_second_moments_with_a_weight_are_those_of_copies():
    """Of the input, of its error and of the exact outputs; the number of tokens is that of the tokens seen."""
    weighted, copied = (SecondMoments(8, torch.device("cpu")) for _ in range(2))
    first, second = torch.randn(5, 8), torch.randn(3, 8)
    residual = {"linear": torch.randn(3, 4)}
    weighted.update(first, first * 2)
    weighted.update(second, second.relu(), residual, weight=3.0)
    copied.update(first, first * 2)
    for _ in range(3):
        copied.update(second, second.relu(), residual)
    torch.testing.assert_close(weighted.inputs, copied.inputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weighted.input_error, copied.input_error, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weighted.residual_errors, copied.residual_errors, rtol=1e-5, atol=1e-5)
    assert (weighted.tokens, copied.tokens) == (8, 14)


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75), (1 / 3, 0.25)])
def test_a_sample_draws_tokens_in_proportion_to_their_weights(weight, share):
    """Of 4000 tokens of weight 1 in channel 0, and as many of another weight in channel 1."""
    sample = TokenSample()
    for channel in range(2):
        tokens = torch.zeros(4000, 2)
        tokens[:, channel] = 1.0
        observe(sample, tokens, weight if channel else 1.0)
    drawn = sample.value[TokenSample.LARGEST :, 1].mean().item()
    assert drawn == pytest.approx(share, abs=0.06)  # three standard deviations of 480 draws


class Plain:
    """An observer of a user's, which knows no weights."""

    def __init__(self) -> None:
        self.rows = torch.empty(0)

    def update(self, x: Tensor) -> None:
        self.rows = x

    def merge(self, other: Observer) -> None:
        raise NotImplementedError

    @property
    def value(self) -> Tensor:
        return self.rows


def test_an_observer_that_takes_no_weights():
    program = trace(llama(1), inputs("llama"))
    (node,) = (node for node in program.graph.nodes if node.name == "linear")
    gather_statistics(program, [Request(node.name, Plain)], [as_inputs(inputs("llama"))])
    assert len(program.statistics[node.name, "Plain"])
    program.statistics.clear()
    with pytest.raises(InputError, match="the observer Plain takes none: give its `update` a parameter `weight`"):
        gather_statistics(program, [Request(node.name, Plain)], [as_inputs(WeightedBatch(inputs("llama"), 2.0))])


def weighted(*weights: float) -> list[WeightedBatch]:
    return [WeightedBatch(inputs("llama", 4, 16, seed=seed), weight) for seed, weight in enumerate(weights)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return outliers()


@pytest.fixture(scope="module")
def program(model) -> Program:
    return trace(model, inputs("llama", 4, 16))


def outcome(program: Program, recipe: str, *weights: float) -> list[Tensor]:
    result = Pipeline.parse(recipe).run(program, weighted(*weights))
    return [result.tensor(name) for name in result.parameter_names()]


@pytest.mark.parametrize("recipe", [GPTQ, SEARCHES["awq-fold"], SEARCHES["round-weights"]])
def test_only_the_ratio_of_weights_matters(recipe, program):
    """Powers of two change nothing, to the bit."""
    plain, same = outcome(program, recipe, 1, 1, 1), outcome(program, recipe, 0.25, 0.25, 0.25)
    assert all(map(torch.equal, plain, same))


@pytest.mark.parametrize("recipe", SEARCHES.values(), ids=SEARCHES)
def test_every_search_counts_weights(recipe, program):
    """With other weights a pass measures something else on the same batches."""
    runs = [Pipeline.parse(recipe).run(program, weighted(*weights)) for weights in ((1, 1, 9, 1), (9, 1, 1, 9))]
    assert runs[0].ledger[-1].numbers != runs[1].ledger[-1].numbers


def test_a_loss_is_a_weighted_mean(program):
    rounded = Pipeline.parse("round-weights{format=mxint4}").run(program)
    distillation = Distillation(rounded, AlteredRun(rounded, {}), program)
    batches = [as_inputs(batch) for batch in weighted(1.0, 1.0)]
    first, second = (distillation.mean_loss({}, [batch]) for batch in batches)
    both = distillation.mean_loss({}, [as_inputs(batch) for batch in weighted(3.0, 1.0)])
    assert first != second
    assert both == pytest.approx((3 * first + second) / 4, rel=1e-6)


def test_a_block_search_sees_every_weight(program):
    """Of many batches the first 2048 tokens, and one batch of each weight."""
    segment, *_ = find_segments(program, choose(program).matmuls)
    value = {segment.inputs[0]: torch.zeros(8, 256, 64)}
    states = [BoundBatch.of(program, value, weight) for weight in (1.0, 1.0, 4.0, 4.0, 2.0)]
    assert [state.visibility.weight for state in first_batches(states, segment)] == [1.0, 4.0, 2.0]


def test_a_batch_keeps_its_weight(program):
    batch = WeightedBatch(inputs("llama", 1, 8), 2.5)
    kept = [
        as_inputs(batch),
        as_inputs(batch).cloned(),
        as_inputs(batch).with_doubled_batch(),
        as_inputs(batch.to("cpu")),
        as_inputs(batch).to(torch.device("cpu")),
    ]
    assert [one.weight for one in kept if one is not None] == [2.5] * 5
    assert as_inputs(dict(batch)).weight == Inputs().weight == 1.0
    assert [bound.visibility.weight for bound in Sweep(program, kept[:1]).batches] == [2.5]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_are_positive(weight):
    with pytest.raises(InputError, match="the weight of a batch is a positive number"):
        WeightedBatch({}, weight)
