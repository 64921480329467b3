"""Padded batches give what the same tokens without padding give: weights, losses, measures, and the layers to blame.

Every batch holds one text, so that both are the same tokens; what they differ in is the rounding of sums over other
sizes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crossed import varied
from models import build, outliers
from torch import Tensor, nn

import mxcompile
from mxcompile.calibration.runs.run import Request, gather_statistics
from mxcompile.calibration.statistics import observers
from mxcompile.diagnostics.measure import Measure
from mxcompile.graph.inputs import as_inputs
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.pipeline.pipeline import Pipeline

LENGTHS, ROOM = (24, 33, 40, 17), 48
SUMS = 2e-3  # relative, of losses and errors: a few elements are rounded to the other side
FLIPPED = 0.01  # share of elements that sums in another order round to the other side
RECIPES = {
    "gptq": "gptq{format=mxint4,activation=mxint8,correction=0.5,residual=true}",
    "gptq without correction": "gptq{format=mxint4}",
    "tune-vectors": "round-weights{format=mxint4} | tune-vectors{activation=mxint8,steps=4}",
    "smooth-quant": "smooth-quant{alpha=none,weight=mxint4,grid=2} | round-weights{format=mxint4,weighted=true}",
    "awq-fold": "awq-fold{weight=mxint4,grid=2,objective=block} | rotate{weight=mxint4} | round-weights{format=mxint4}",
}


def right(ids: Tensor, room: int) -> dict[str, Tensor]:
    """Filler behind the text."""
    filler = torch.randint(2, 64, (1, room - ids.shape[1]))
    return {
        "input_ids": torch.cat([ids, filler], 1),
        "attention_mask": (torch.arange(room) < ids.shape[1]).long()[None],
    }


def left(ids: Tensor, room: int) -> dict[str, Tensor]:
    """Filler in front of the text."""
    return {name: value.flip(1) for name, value in right(ids.flip(1), room).items()}


def left_with_positions(ids: Tensor, room: int) -> dict[str, Tensor]:
    """As `generate` pads: the first token of the text has position 0."""
    batch = left(ids, room)
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def in_a_batch(ids: Tensor, room: int) -> dict[str, Tensor]:
    """Beside a row that is padding altogether."""
    batch = left(ids, room)
    return {
        "input_ids": batch["input_ids"].repeat(2, 1),
        "attention_mask": torch.cat([batch["attention_mask"] * 0, batch["attention_mask"]]),
    }


def added_to_scores(ids: Tensor, room: int) -> dict[str, Tensor]:
    """A mask of four dimensions, causal, in float."""
    batch = right(ids, room)
    seen = torch.ones(room, room, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None]
    return batch | {"attention_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min)}


Form = Callable[[Tensor, int], dict[str, Tensor]]
FORMS: list[Form] = [left_with_positions, right, left, in_a_batch, added_to_scores]


def batches(form: Form, padded: bool) -> list[dict[str, Tensor]]:
    texts = [torch.randint(2, 64, (1, length), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    return [form(ids, ROOM if padded else ids.shape[1]) for ids in texts]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return outliers()


def traced(model: nn.Module, form: Form) -> Program:
    return trace(model, batches(form, padded=True)[0])


def tensors(program: Program) -> dict[str, Tensor]:
    return {name: program.tensor(name).detach() for name in program.parameter_names()}


def check_same(program: Program, padded: Program, unpadded: Program) -> None:
    """Changed by the passes, and alike but for elements on the edge between two values."""
    one, other, before = tensors(padded), tensors(unpadded), tensors(program)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in one.items() if name in before)
    for name, tensor in one.items():
        apart = ~torch.isclose(tensor.float(), other[name].float(), rtol=SUMS, atol=1e-6)
        assert apart.float().mean() < FLIPPED, name
    pairs = zip(padded.ledger, unpadded.ledger, strict=True)
    for here, there in pairs:
        assert here.rewrites == there.rewrites
        assert here.numbers.keys() == there.numbers.keys()
        for name, numbers in here.numbers.items():
            assert numbers == pytest.approx(there.numbers[name], rel=0.02), name


@pytest.mark.parametrize(("recipe", "form"), varied(RECIPES, FORMS))
def test_passes(recipe, form, model):
    program = traced(model, form)
    results = [Pipeline.parse(RECIPES[recipe]).run(program, batches(form, padded)) for padded in (True, False)]
    check_same(program, *results)


@pytest.mark.slow
@pytest.mark.parametrize("form", [right, left])
def test_experts(form):
    """Hidden tokens are sent to experts, too, and count for none of them."""
    program = trace(build("mixtral"), batches(form, padded=True)[0])
    results = [Pipeline.parse(RECIPES["gptq"]).run(program, batches(form, padded)) for padded in (True, False)]
    one, other = map(tensors, results)
    for name, tensor in one.items():
        apart = ~torch.isclose(tensor.float(), other[name].float(), rtol=SUMS, atol=1e-6)
        assert apart.float().mean() < 5 * FLIPPED, name
    assert [record.misses for record in results[0].ledger] == [record.misses for record in results[1].ledger]


def test_absolute_positions():
    """GPT-2 adds a vector for the place of a token: with its positions, padding in front changes nothing."""
    model = build("gpt2")
    program = trace(model, batches(left_with_positions, padded=True)[0])
    recipe = RECIPES["gptq"]
    check_same(program, *(Pipeline.parse(recipe).run(program, batches(left_with_positions, p)) for p in (True, False)))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_observers(form, model):
    """Every observer of a value in front of a linear and of one behind the attention."""
    kinds: list[Any] = [observers.ChannelAbsMax, observers.ChannelMeanAbs, observers.ChannelImportance]
    values: list[dict[Any, Tensor]] = []
    for padded in (True, False):
        program = traced(model, form)
        linears = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
        requests = [
            Request(n.all_input_nodes[0].name, kind) for n in linears for kind in (*kinds, observers.TokenSample)
        ]
        gather_statistics(program, requests, [as_inputs(batch) for batch in batches(form, padded)])
        values.append({request.key: request.result(program) for request in requests})
    for key, of_padded in values[0].items():
        pair = [of_padded, values[1][key]]
        if key[1] == "TokenSample":
            assert len(pair[0]) == len(pair[1]) == sum(LENGTHS)
            pair = [sample.square().sum(0) for sample in pair]  # a sample has no order
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_measures(form, model):
    """What a dump says of each layer on a padded probe."""
    program, recipe = traced(model, form), Pipeline.parse("round-weights{format=mxint4} | lower-mx{weight=mxint4}")
    measured = []
    for padded in (True, False):
        (probe, *_) = batches(form, padded)
        measured.append([record.measured for record in recipe.run(program, None, [Measure(probe)]).ledger])
    for padded_numbers, numbers in zip(*measured, strict=True):
        assert padded_numbers.output_db == pytest.approx(numbers.output_db, abs=0.05)
        assert padded_numbers.kl == pytest.approx(numbers.kl, rel=SUMS)
        assert padded_numbers.layers.keys() == numbers.layers.keys()
        for name, layer in padded_numbers.layers.items():
            assert layer.local_db == pytest.approx(numbers.layers[name].local_db, abs=0.05)
            assert layer.accumulated_db == pytest.approx(numbers.layers[name].accumulated_db, abs=0.05)


def test_bisection(model):
    form = left_with_positions
    found = [
        mxcompile.bisect(
            model,
            batches(form, padded)[0],
            recipe="gptq{format=mxint4,activation=mxint8} | lower-mx{weight=mxint4,activation=mxint8}",
            kl=0.002,
            probe=batches(form, padded),
            calibration=batches(form, padded),
        )
        for padded in (True, False)
    ]
    one, other = found
    assert one.scores == pytest.approx(other.scores, rel=0.05, abs=1e-6)
    assert one.culprit == other.culprit is not None
    assert one.guilty == other.guilty
    assert one.contributions is not None
