"""Measure: local and accumulated error of every layer after every pass, folds included."""

import math
from dataclasses import dataclass

import pytest
import torch
from models import LANGUAGE_MODELS, MODELS, build, inputs, llama, output
from torch.nn import functional as F

import mxcompile
from mxcompile import Measure, Miss, Pass, PassResult, Pipeline
from mxcompile.analysis.choice import choose
from mxcompile.calibration.runs.run import Runner
from mxcompile.formats import MXINT4, MXINT8, ScaleRule
from mxcompile.graph.printer import print_program
from mxcompile.numerics import reference
from mxcompile.numerics.metrics import kl_divergence, sqnr_db, top1_agreement

ROUND = "round-weights{format=mxint4}"
LOWER = "lower-mx{weight=mxint4,activation=mxint8}"
EXACT = 100.0


def measured(program, text, probe=None, passes=()):
    """What was measured after each pass."""
    pipeline = Pipeline.parse(text, passes=passes)
    return [record.measured for record in pipeline.run(program, instruments=[Measure(probe)]).ledger]


@dataclass(frozen=True)
class Shrink(Pass):
    """A lossy pass on the float graph: one weight gets smaller."""

    name = "shrink"

    def run(self, program):
        matmul = choose(program).matmuls[0]
        program.set_tensor(matmul.parameter, program.tensor(matmul.parameter).detach() * 0.9)
        return PassResult(1, (Miss("somewhere", "no reason"),))


# Values


def test_numbers_of_a_layer_by_hand(traced):
    """The layer `down`, MXINT4 on MXINT8: on its input in the float model and on its current input."""
    model, x = build("mlp"), inputs("mlp")["x"]
    rounded, lowered = measured(traced("mlp"), f"{ROUND} | {LOWER}")

    def weight(layer):
        return reference.quantize_dequantize(layer.weight.detach(), MXINT4, ScaleRule.MSE)

    def prepared(value):
        return reference.quantize_dequantize(value, MXINT8, ScaleRule.FLOOR)

    with torch.no_grad():
        exact = F.relu(model.up(model.norm(x)))
        now = F.relu(F.linear(prepared(model.norm(x)), weight(model.up), model.up.bias))
        wanted = model.down(exact)
        local, along = (F.linear(prepared(value), weight(model.down), model.down.bias) for value in (exact, now))
    found = lowered.layers["down.weight"]
    assert (found.weight, found.activation) == ("mxint4", "mxint8")
    assert found.weight_db == pytest.approx(sqnr_db(model.down.weight, weight(model.down)), abs=1e-9)
    assert found.local_db == pytest.approx(sqnr_db(wanted, local), abs=1e-4)
    assert found.accumulated_db == pytest.approx(sqnr_db(wanted, along), abs=1e-4)
    assert found.output_error == pytest.approx(10 ** (-found.accumulated_db / 20))
    assert lowered.output_db == pytest.approx(found.accumulated_db, abs=1e-9)
    assert (rounded.layers["down.weight"].weight, rounded.layers["down.weight"].activation) == ("mxint4", None)
    assert rounded.layers["up.weight"].local_db == rounded.layers["up.weight"].accumulated_db
    assert (lowered.kl, lowered.top1) == (None, None)


def test_kl_and_agreement_are_those_of_the_logits(traced):
    program, x = traced("llama"), inputs("llama", 3, 16)
    lowered = Pipeline.parse(LOWER).run(program)
    (found,) = measured(program, LOWER, x)
    wanted, given = output(program(**x)), output(lowered(**x))
    assert found.kl == pytest.approx(kl_divergence(wanted, given), rel=1e-6)
    assert found.top1 == top1_agreement(wanted, given)


def test_a_pass_that_does_nothing_has_no_error(traced):
    @dataclass(frozen=True)
    class Idle(Pass):
        name = "idle"

        def run(self, program):
            return PassResult(0)

    (found,) = measured(traced("llama"), "idle", passes=[Idle])
    assert (found.output_db, found.kl, found.top1) == (math.inf, 0.0, 1.0)
    for numbers in found.layers.values():
        assert (numbers.weight, numbers.activation) == (None, None)
        assert (numbers.weight_db, numbers.local_db, numbers.accumulated_db) == (math.inf,) * 3


def test_a_sample_of_many_rows_says_the_same(traced):
    """256 of 1024 tokens are sampled: within 0.3 dB of all of them."""
    program, x = traced("mlp"), inputs("mlp", 4, 256)
    lowered = Pipeline.parse(LOWER).run(program)
    (found,) = measured(program, LOWER, x)
    assert found.layers["down.weight"].accumulated_db == pytest.approx(sqnr_db(program(**x), lowered(**x)), abs=0.3)


def test_weights_that_overflow_are_no_crash(traced):
    @dataclass(frozen=True)
    class Overflow(Pass):
        name = "overflow"

        def run(self, program):
            program.set_tensor("up.weight", torch.full((128, 64), 3e38))
            return PassResult(1)

    (found,) = measured(traced("mlp"), "overflow", passes=[Overflow])
    assert found.output_db == -math.inf
    assert found.layers["up.weight"].local_db in (None, -math.inf)


# Layers are followed


@pytest.mark.parametrize("name", MODELS)
def test_every_chosen_layer_of_every_model_after_every_pass(traced, name):
    """Also through packed weights and fused ops, addmm, 3-D experts and tied weights."""
    program = traced(name)
    chosen = {matmul.parameter for matmul in choose(program).matmuls}
    found = measured(program, f"smooth-quant{{through_linears=true}} | {ROUND} | {LOWER} | fuse-mx-gemm")
    assert all(set(step.layers) == chosen for step in found)
    for before, after in zip(found[2].layers.values(), found[3].layers.values(), strict=True):
        assert (before.weight, before.activation, before.weight_db) == (after.weight, after.activation, after.weight_db)
        assert before.local_db == pytest.approx(after.local_db, abs=1e-3)
    for layer, numbers in found[2].layers.items():
        assert (numbers.weight, numbers.activation) == ("mxint4", "mxint8")
        assert 10 < numbers.local_db < 25
        routed = "experts" in layer
        assert (numbers.accumulated_db is None) == routed
    assert (found[2].kl is not None) == (name in LANGUAGE_MODELS)


def test_a_weight_that_two_matmuls_read_is_two_layers():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 64)

        def forward(self, x):
            return self.linear(self.linear(x).relu())

    program = mxcompile.trace(Twice(), torch.randn(4, 64))
    (found,) = measured(program, LOWER)
    assert list(found.layers) == ["linear.weight", "linear.weight (2)"]
    assert found.layers["linear.weight (2)"].local_db > found.layers["linear.weight (2)"].accumulated_db


def test_an_operand_that_is_added_too():
    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return torch.addmm(x, x, self.weight)

    program = mxcompile.trace(Residual(), torch.randn(3, 64))
    (found,) = measured(program, LOWER)
    assert found.layers == {} or found.layers["weight"].local_db > 10


# Folds


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert"])
@pytest.mark.parametrize("fold", ["smooth-quant{through_linears=true}", "awq-fold{weight=mxint4}"])
def test_a_fold_is_no_error(traced, name, fold):
    found, rounded = measured(traced(name), f"{fold} | {ROUND}")
    assert found.output_db > EXACT
    for numbers in found.layers.values():
        assert numbers.local_db > EXACT
        assert numbers.weight_db is None
    assert all(8 < numbers.local_db < 30 for numbers in rounded.layers.values())


def test_what_is_lost_before_a_fold_stays_seen(traced):
    """The fold is applied to the float model too: the errors of the layers stay as before the fold."""
    lost, folded = measured(traced("llama"), "shrink | smooth-quant", passes=[Shrink])
    assert folded.kl == pytest.approx(lost.kl, rel=1e-3)
    for name, numbers in lost.layers.items():
        if math.isfinite(numbers.accumulated_db):
            assert folded.layers[name].accumulated_db == pytest.approx(numbers.accumulated_db, abs=1e-2), name
    assert folded.layers["model.layers.0.self_attn.q_proj.weight"].local_db == pytest.approx(20.0, abs=1e-3)


def test_an_explicit_multiply_is_followed():
    program = mxcompile.trace(build("gpt2"), inputs("gpt2", 4, 16))
    found = measured(program, f"awq-fold{{weight=mxint4,activation=mxint4}} | {ROUND} | {LOWER}")
    assert all(numbers.local_db > EXACT for numbers in found[0].layers.values())
    assert all(8 < numbers.local_db < 30 for numbers in found[2].layers.values())


# Cost, and what it leaves alone


@pytest.mark.parametrize("text", [LOWER, f"{ROUND} | {LOWER}", f"smooth-quant | {ROUND} | {LOWER} | fuse-mx-gemm"])
def test_one_forward_at_the_start_and_one_a_pass(traced, monkeypatch, text):
    runs = []
    plain = Runner.run_nodes
    program = traced("llama")
    without = measured_runs(monkeypatch, plain, runs, lambda: Pipeline.parse(text).run(program))
    with_ = measured_runs(monkeypatch, plain, runs, lambda: measured(program, text))
    assert with_ - without == 1 + len(Pipeline.parse(text).passes)


def measured_runs(monkeypatch, plain, runs, action):
    runs.clear()
    monkeypatch.setattr(Runner, "run_nodes", lambda self, *args, **kw: runs.append(1) or plain(self, *args, **kw))
    action()
    monkeypatch.setattr(Runner, "run_nodes", plain)
    return len(runs)


def test_nothing_is_changed(traced):
    program = traced("mixtral")
    text = f"smooth-quant | {ROUND} | {LOWER}"
    plain, watched = (Pipeline.parse(text).run(program, instruments=i) for i in ([], [Measure()]))
    assert print_program(plain) == print_program(watched)
    assert plain.ledger[-1].measured is None


def test_bytes_are_those_of_the_packed_weights(traced):
    program = traced("mlp")
    before = program.stored_bytes()
    rounded, lowered = Pipeline.parse(f"{ROUND} | {LOWER}").run(program).ledger
    assert (rounded.bytes, before) == (before, 4 * (2 * 64 * 128 + 128 + 64 + 2 * 64))
    assert lowered.bytes == 2 * 64 * 128 * 4.25 / 8 + 4 * (128 + 64 + 2 * 64)


def test_a_dump_is_measured_unless_it_is_turned_off(tmp_path):
    x = inputs("llama")
    for probe, folder in ((None, "a"), (inputs("llama", 1, 12), "b"), (False, "c")):
        mxcompile.quantize_and_compile(
            llama(1), x, recipe="w4a8-mxint-quick", dump=tmp_path / folder, probe=probe, compile=False
        )
    first, other, off = (mxcompile.Ledger.load(tmp_path / folder).passes[-1].measured for folder in "abc")
    assert off is None
    assert first.kl != other.kl
    assert len(first.layers) == len(other.layers) == 7
