"""diagnose: nothing changes; planted layers are named and no others; recommended steps help the layer they are for."""

import copy
import math

import pytest
import torch
from models import build, llama
from torch import nn

import mxcompile
from mxcompile.diagnostics.diagnosis import Diagnosis
from mxcompile.diagnostics.measure import Measure
from mxcompile.errors import PipelineError
from mxcompile.graph.printer import print_program
from mxcompile.pipeline.pipeline import Pipeline

FORMATS = "weight=mxint4,activation=mxint8"
ROUND = f"round-weights{{format=mxint4}} | lower-mx{{{FORMATS}}}"


def tokens(seed, rows=4):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 128, (rows, 64), generator=generator)}


def diagnosed(model, batches=None, text="diagnose"):
    """(the traced program, the program after the pass, the diagnosis)"""
    batches = [tokens(0), tokens(1)] if batches is None else batches
    program = mxcompile.trace(model, {"input_ids": batches[0]["input_ids"][:2, :16]})
    after = Pipeline.parse(text).run(program, batches)
    return program, after, Diagnosis.of(after.ledger)


def test_it_changes_nothing():
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    program, after, _ = diagnosed(model)
    assert print_program(after) == print_program(program)
    (record,) = after.ledger
    assert (record.rewrites, record.misses, record.preserved_db) == (0, (), math.inf)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_twice_is_once():
    (first, second) = Pipeline.parse("diagnose | diagnose").run(*_program_and_batches()).ledger
    assert first.numbers == second.numbers


def _program_and_batches():
    return mxcompile.trace(build("llama"), tokens(0, 2)), [tokens(0)]


def test_numbers_of_every_layer_and_no_more():
    _, after, diagnosis = diagnosed(llama(2))
    numbers = after.ledger[0].numbers
    names = [f"model.layers.{i}.{part}.weight" for i in range(2) for part in _PARTS]
    assert list(numbers) == names
    assert [value.name.replace("model.layers.0.", "") for value in diagnosis.values[:4]] == [
        "self_attn.q_proj, k_proj, v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj, up_proj",
        "mlp.down_proj",
    ]
    assert diagnosis.outliers == ()
    for layer in numbers.values():
        assert all(math.isfinite(number) for number in layer.values())
        assert 1 <= layer["input_in_block"] <= 32
        assert layer["bits_db"] > 10  # four more bits in the weights


_PARTS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


class Branch(nn.Module):
    """A linear for the rows above a threshold, which no row may exceed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        y = torch.tanh(self.first(x))
        rows = (y.amax(-1) > 2).nonzero().flatten()
        return y.index_add(0, rows, self.second(y[rows]))


def test_a_layer_that_no_token_reaches_is_a_miss():
    torch.manual_seed(0)
    program = mxcompile.trace(Branch(), torch.randn(6, 32))
    (record,) = Pipeline.parse("diagnose").run(program, torch.randn(6, 32)).ledger
    assert list(record.numbers) == ["first.weight"]
    (miss,) = record.misses
    assert "no calibration token reaches it" in str(miss)


def plant_some(model):
    """Two channels of some norms 32 times larger, and the weights that read them smaller; returns those weights."""
    planted = []
    with torch.no_grad():
        for index, attention in ((0, True), (1, False), (3, True), (3, False)):
            layer = model.model.layers[index]
            names = ("q_proj", "k_proj", "v_proj") if attention else ("gate_proj", "up_proj")
            norm = layer.input_layernorm if attention else layer.post_attention_layernorm
            part = "self_attn" if attention else "mlp"
            norm.weight[[7, 40]] *= 32
            for name in names:
                getattr(getattr(layer, part), name).weight[:, [7, 40]] /= 32
                planted.append(f"model.layers.{index}.{part}.{name}.weight")
    return planted


@pytest.fixture(scope="module")
def harder():
    """(the planted layers, the traced program, its diagnosis)"""
    model = llama(4)
    planted = plant_some(model)
    program, _, diagnosis = diagnosed(model)
    return planted, program, diagnosis


def test_all_planted_layers_are_named_and_no_others(harder):
    planted, _, diagnosis = harder
    assert list(diagnosis.outliers) == planted


@pytest.mark.slow
def test_recommended_steps_improve_the_layers_that_they_are_for(harder):
    """Each step by the pass that does it, judged on other tokens."""
    planted, program, diagnosis = harder
    local = {
        step: _local_db(program, text)
        for step, text in {
            "": ROUND,
            "fold": f"awq-fold{{{FORMATS},through_linears=true}} | {ROUND}",
            "permute": f"permute | {ROUND}",
            "rotate": f"rotate{{{FORMATS}}} | {ROUND}",
        }.items()
    }
    advised = [(value.advice.step, layer) for value in diagnosis.values if value.advice for layer in value.layers]
    assert {layer for step, layer in advised if step == "fold"} >= set(planted)
    better = [local[step][layer] > local[""][layer] for step, layer in advised]
    assert sum(better) >= 0.9 * len(better)


def _local_db(program, text):
    record = Pipeline.parse(text).run(program, [tokens(0), tokens(1)], [Measure(tokens(2))]).ledger[-1]
    return {name: layer.local_db for name, layer in record.measured.layers.items()}


class Odd(nn.Module):
    """Inputs of 33 and of 1 channel, a weight of zeros, and an input of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(33, 1), nn.Linear(1, 40), nn.Linear(40, 8)
        nn.init.zeros_(self.third.weight)

    def forward(self, x):
        return self.third(torch.relu(self.second(self.first(x))) * 0)


def test_odd_shapes_and_zeros():
    torch.manual_seed(0)
    program = mxcompile.trace(Odd(), torch.randn(5, 33), allow_partial=True)
    numbers = (
        Pipeline.parse("diagnose{weight=mxfp4,activation=none}").run(program, torch.randn(5, 33)).ledger[0].numbers
    )
    assert list(numbers) == ["first.weight", "second.weight", "third.weight"]
    assert all(math.isfinite(number) for layer in numbers.values() for number in layer.values())
    assert "rotate_db" not in numbers["first.weight"]


def test_it_runs_before_lowering_alone():
    assert (
        str(Pipeline.parse(f"round-weights{{format=mxint4}} | diagnose | lower-mx{{{FORMATS}}}")).count("diagnose") == 1
    )
    with pytest.raises(PipelineError, match="diagnose cannot run after lower-mx"):
        Pipeline.parse(f"lower-mx{{{FORMATS}}} | diagnose")
