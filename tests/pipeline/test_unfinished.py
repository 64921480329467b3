"""A run that fails or is interrupted leaves the program after the last finished pass, and the passes to go on with."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from models import inputs, llama

import mxcompile
from mxcompile import api
from mxcompile.errors import CompileError, DeployError, PassError
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Program
from mxcompile.graph.records import Fold, PassResult
from mxcompile.pipeline.interfaces import FLOATING, Instrument, Pass
from mxcompile.pipeline.pipeline import Pipeline

FOLDS = "awq-fold{weight=mxint4,activation=mxint8,through_linears=true} | rotate{weight=mxint4,activation=mxint4}"
GPTQ = "gptq{format=mxint4,activation=mxint8}"
LOWER = "lower-mx{weight=mxint4,activation=mxint8}"


@dataclass(frozen=True)
class Broken(Pass):
    """Rewrites half of the program, then raises its error; does nothing once it is `mended`."""

    mended = False
    error = ZeroDivisionError("no reason")
    name = "broken"
    accepts = FLOATING

    def run(self, program: Program) -> PassResult:
        if not Broken.mended:
            program.set_tensor("model.norm.weight", program.tensor("model.norm.weight").detach() * 2)
            program.importance.clear()
            raise Broken.error
        return PassResult(0)


@pytest.fixture(scope="module")
def data():
    return [inputs("llama", 2, 16, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def program(data):
    return mxcompile.trace(llama(1), data[0])


def parsed(text: str) -> Pipeline:
    return Pipeline.parse(text, [Broken])


def failure(pipeline: Pipeline, program, data, kind=PassError, **options):
    with pytest.raises(kind) as caught:
        pipeline.run(program, data, **options)
    return caught.value


@dataclass(frozen=True)
class Doubling(Pass):
    """Changes the function, beside a fold that does not."""

    name = "doubling"
    accepts = FLOATING

    def run(self, program: Program) -> PassResult:
        program.set_tensor("model.norm.weight", program.tensor("model.norm.weight").detach() * 2)
        return PassResult(1, folds=(Fold("model.norm", lambda _: None),))


def test_a_pass_that_does_more_than_its_folds_is_not_replayed(program, data):
    error = failure(Pipeline.parse("doubling | broken", [Broken, Doubling]), program, data)
    expected = 2 * program.tensor("model.norm.weight")
    assert torch.equal(error.unfinished.program.tensor("model.norm.weight"), expected)


@pytest.mark.parametrize("finished", ["smooth-quant", FOLDS, f"{FOLDS} | {GPTQ}"], ids=["fold", "folds", "gptq"])
def test_the_program_before_the_failing_pass_is_as_it_was_and_the_rest_can_run(finished, program, data, monkeypatch):
    before = parsed(finished).run(program, data)
    error = failure(parsed(f"{finished} | broken | {LOWER}"), program, data)
    left = error.unfinished
    assert error.program is left.program
    assert print_program(left.program) == print_program(before)
    for name in before.parameter_names():
        assert torch.equal(left.program.tensor(name), before.tensor(name))
    assert left.program.importance.keys() == before.importance.keys()
    assert all(torch.equal(left.program.importance[name], value) for name, value in before.importance.items())
    assert left.program.rounded.keys() == before.rounded.keys()
    assert [r.spec for r in left.program.ledger] == [r.spec for r in before.ledger]
    assert left.program.batches == (left.program.example,)
    (note,) = error.__notes__
    assert f"error.unfinished.program is the program after {before.ledger[-1].name}" in note
    assert f"which runs broken | {LOWER}" in note

    monkeypatch.setattr(Broken, "mended", True)
    expected = parsed(f"{finished} | {LOWER}").run(program, data)
    resumed = Pipeline(left.passes).run(left.program, data)
    for name in expected.parameter_names():
        assert torch.equal(resumed.tensor(name), expected.tensor(name))
    mxcompile.deploy(resumed, llama(1))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=["host", "GPU"])
def test_out_of_memory(error, program, data, monkeypatch):
    monkeypatch.setattr(Broken, "error", error)
    failed = failure(parsed(f"{GPTQ} | broken | {LOWER}"), program, data)
    assert failed.__cause__ is error
    assert len(failed.program.rounded) == 7


def test_an_interrupt_stays_one(program, data, tmp_path):
    class Interrupt(Instrument):
        def segment(self, program, step, done, total):
            if step.current.name == "tune-vectors" and done == 2:
                raise KeyboardInterrupt

    pipeline = parsed(f"{GPTQ} | tune-vectors | {LOWER}")
    folder = tmp_path / "resume"
    error = failure(pipeline, program, data, KeyboardInterrupt, instruments=[Interrupt()], resume=folder)
    assert [each.name for each in error.unfinished.passes] == ["tune-vectors", "lower-mx"]
    assert len(error.unfinished.program.rounded) == 7
    assert f"resume={str(folder)!r}" in error.__notes__[0]
    assert pipeline.run(program, data, resume=folder).stage.name == "LOWERED"


def test_an_instrument_that_fails_after_a_pass(program, data):
    class Full(Instrument):
        def after(self, program, step, record):
            raise OSError("no space left on device")

    error = failure(parsed(f"{GPTQ} | {LOWER}"), program, data, OSError, instruments=[Full()])
    assert len(error.unfinished.program.rounded) == 7
    assert [each.name for each in error.unfinished.passes] == ["lower-mx"]


def test_nothing_is_promised_if_nothing_had_been_done(program, data):
    error = failure(parsed(f"broken | {LOWER}"), program, data)
    assert error.unfinished is None
    assert error.program is None
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(("stage", "kind"), [("deploy", DeployError), ("compile_module", CompileError)])
def test_deploying_and_compiling(stage, kind, data, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise kind("no compiler")

    monkeypatch.setattr(api, stage, broken)
    model = llama(1)
    with pytest.raises(kind) as caught:
        mxcompile.quantize_and_compile(model, data[0], recipe="w8a8-mxint-quick")
    left = caught.value.unfinished
    assert "not lost" in caught.value.__notes__[0]
    made = mxcompile.deploy(left.program, model) if left.model is None else left.model
    assert (left.model is None) == (stage == "deploy")
    with torch.no_grad():
        torch.testing.assert_close(made(**data[0]).logits, left.program(**data[0]).logits, rtol=1e-4, atol=1e-4)


def test_folded_weights_are_not_held_for_a_failure_that_may_come(program, data):
    name, folded, alive = "model.layers.0.mlp.up_proj.weight", [], []

    class Watch(Instrument):
        def before(self, program, step):
            folded.append(weakref.ref(program.tensor(name)))

        def after(self, program, step, record):
            gc.collect()
            alive.append(folded[-1]() is not None)

    Pipeline.parse(f"smooth-quant | {GPTQ}").run(program, data, [Watch()])
    assert alive == [True, False]  # the user's own weight, and the folded one once it has been rounded
