"""A pipeline runs its passes in order on a copy, tells instruments, records, and names the pass that fails."""

from dataclasses import dataclass

import pytest
import torch
from models import build, inputs

from mxcompile.errors import PassError, PipelineError, UnknownNameError
from mxcompile.formats import MXINT4, MXINT8
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Program, Stage
from mxcompile.graph.records import Miss, PassResult
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.recipes import recipes
from mxcompile.passes.round_weights import RoundWeights
from mxcompile.passes.smooth_quant import SmoothQuant
from mxcompile.pipeline.interfaces import FLOATING, Instrument, Pass
from mxcompile.pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class Negate(Pass):
    """w -> -w of one parameter: a user's pass, registered nowhere."""

    parameter: str = "down.weight"
    times: int = 1

    name = "negate"
    accepts = FLOATING

    def run(self, program: Program) -> PassResult:
        for _ in range(self.times):
            program.set_tensor(self.parameter, -program.tensor(self.parameter).detach())
        miss = Miss("%linear in up", "not asked for")
        return PassResult(self.times, (miss,), {self.parameter: {"negated": 1.0}})


@pytest.fixture
def program(traced) -> Program:
    return traced("mlp")


def test_a_users_own_pass(program):
    x, model = inputs("mlp")["x"], build("mlp")
    with torch.no_grad():
        model.down.weight.neg_()
        expected = model(x)
    assert torch.equal(Pipeline([Negate()]).run(program)(x=x), expected)
    parsed = Pipeline.parse("negate{times=3} | lower-mx{weight=mxint8}", passes=[Negate])
    assert parsed == Pipeline([Negate(times=3), LowerMX(MXINT8)])
    with pytest.raises(UnknownNameError, match="unknown pass 'negate'"):
        Pipeline.parse("negate{times=3}")


def test_the_pass_that_moved_the_program_on_is_named():
    @dataclass(frozen=True)
    class Again(Negate):
        name = "again"
        gives = Stage.ROUNDED

    with pytest.raises(PipelineError, match=r"Move smooth-quant before round-weights\."):
        Pipeline([RoundWeights(MXINT4), Again(), SmoothQuant()])


def test_a_users_pass_may_replace_a_built_in_one():
    @dataclass(frozen=True)
    class Mine(Negate):
        name = "smooth-quant"

    (mine,) = Pipeline.parse("smooth-quant{times=2}", passes=[Mine]).passes
    assert mine == Mine(times=2)


def test_run_leaves_the_program_alone(program):
    before = print_program(program)
    result = Pipeline.parse("smooth-quant | round-weights{format=mxint4} | lower-mx{weight=mxint4}").run(program)
    assert print_program(program) == before
    assert (program.stage, program.ledger, program.rounded, program.statistics) == (Stage.FLOAT, [], {}, {})
    assert result.stage is Stage.LOWERED
    assert [record.name for record in result.ledger] == ["smooth-quant", "round-weights", "lower-mx"]


def test_no_passes(program):
    assert print_program(Pipeline([]).run(program)) == print_program(program)
    assert str(Pipeline([])) == ""


def test_the_ledger(program):
    first, second = Pipeline([Negate(times=2), Negate("up.weight")]).run(program).ledger
    assert (first.name, first.spec, first.rewrites) == ("negate", "negate{times=2}", 2)
    assert first.misses == (Miss("%linear in up", "not asked for"),)
    assert str(first.misses[0]) == "%linear in up: not asked for"
    assert first.numbers == {"down.weight": {"negated": 1.0}}
    assert second.spec == "negate{parameter=up.weight}"


# Instruments


class Log(Instrument):
    """Records every call."""

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log = name, log

    def start(self, program, passes):
        self.log.append((self.name, "start", " | ".join(map(str, passes))))

    def before(self, program, step):
        self.log.append((self.name, "before", step.index, step.current.name, len(program.ledger)))

    def after(self, program, step, record):
        assert program.ledger[-1] is record
        self.log.append((self.name, "after", step.index, record.spec))

    def failed(self, program, step, error):
        self.log.append((self.name, "failed", step.index, step.current.name, type(error).__name__))

    def finish(self, program):
        self.log.append((self.name, "finish", program.stage))


def test_instruments_are_called_in_order(program):
    log = []
    pipeline = Pipeline([Negate(), LowerMX(MXINT8)])
    pipeline.run(program, instruments=[Log("a", log), Log("b", log)])
    assert [entry for entry in log if entry[0] == "b"] == [("b", *entry[1:]) for entry in log if entry[0] == "a"]
    assert [entry[0] for entry in log] == ["a", "b"] * 6
    assert [entry[1:] for entry in log if entry[0] == "a"] == [
        ("start", "negate | lower-mx{weight=mxint8}"),
        ("before", 1, "negate", 0),
        ("after", 1, "negate"),
        ("before", 2, "lower-mx", 1),
        ("after", 2, "lower-mx{weight=mxint8}"),
        ("finish", Stage.LOWERED),
    ]


# Failures


@dataclass(frozen=True)
class Fail(Negate):
    """Changes the program, then raises."""

    error: str = "raise"

    name = "fail"

    def run(self, program: Program) -> PassResult:
        super().run(program)
        raise PassError("cannot do this to %linear") if self.error == "refuse" else ZeroDivisionError("no reason")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("raise", "pass 'fail' failed: ZeroDivisionError: no reason"),
        ("refuse", "pass 'fail': cannot do this to %linear"),
    ],
)
def test_a_pass_that_raises(error, message, program):
    before, log = print_program(program), []
    with pytest.raises(PassError) as caught:
        Pipeline([Negate(), Fail(error=error), Negate()]).run(program, instruments=[Log("a", log), Log("b", log)])
    assert str(caught.value) == message
    assert isinstance(caught.value.__cause__, ZeroDivisionError) == (error == "raise")
    assert [entry[:2] for entry in log[-4:]] == [("a", "before"), ("b", "before"), ("a", "failed"), ("b", "failed")]
    assert log[-1] == ("b", "failed", 2, "fail", "PassError")
    assert print_program(program) == before
    assert program.ledger == []


def test_which_pipelines_read_calibration_data():
    learned = {name for name, pipeline in recipes().items() if pipeline.reads_calibration}
    cached = {f"{name}-kv{bits}" for name in ("w8a8-mxint", "w4a8-mxint", "w4a4-mxfp") for bits in (8, 6, 4)}
    trained = {f"{name}-distilled" for name in ("w4a8-mxint", "w4a16-mxfp", "w4a8-mxfp", "w4a4-mxfp")}
    formats = {f"{bits}-{kind}" for bits in ("w8a8", "w4a8", "w4a16") for kind in ("mxint", "mxfp")}
    assert learned == formats | cached | {"w4a4-mxfp", *trained}
    lower = "lower-mx{weight=mxint4}"
    assert not Pipeline.parse(f"{lower} | fuse-mx-gemm").reads_calibration
    assert Pipeline.parse(f"round-weights{{format=mxint4,weighted=true}} | {lower}").reads_calibration
    for name in (
        "smooth-quant",
        "awq-fold{weight=mxint4}",
        "gptq{format=mxint4}",
        "learn-rounding{format=mxint4}",
        "distill",
    ):
        assert Pipeline.parse(f"{name} | {lower}").reads_calibration
