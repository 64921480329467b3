"""Function preservation: a pass that claims to preserve the function is checked, with one forward per pass."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from models import build, inputs, output
from torch import Tensor, nn

import mxcompile
from mxcompile.analysis.folds.groups import find_groups
from mxcompile.errors import InputError, PreservationError
from mxcompile.formats import MXINT8
from mxcompile.graph.agreement import agreement_db, compared_outputs, output_tensors
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Program
from mxcompile.graph.records import Fold, PassResult
from mxcompile.graph.trace import trace
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.round_weights import RoundWeights
from mxcompile.passes.smooth_quant import SmoothQuant
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.pipeline.preservation import REQUIRED_DB, record_outputs


def scaled(name: str, factor: float) -> Callable[[Program], None]:
    return lambda program: program.set_tensor(name, program.tensor(name).detach() * factor)


@dataclass(frozen=True)
class Steps(Pass):
    """Claims to preserve the function, and multiplies parameters; every step is a fold."""

    up: float = 1.0
    down: float = 1.0

    name = "steps"
    preserves_function = True

    def run(self, program: Program) -> PassResult:
        folds = (
            Fold("the up fold", scaled("up.weight", self.up)),
            Fold("the down fold", scaled("down.weight", self.down)),
        )
        for fold in folds:
            fold.apply(program)
        return PassResult(len(folds), folds=folds)


class Silent(Steps):
    """The same, without returning its folds."""

    name = "silent"

    def run(self, program: Program) -> PassResult:
        return PassResult(super().run(program).rewrites)


class Honest(Steps):
    """The same, without the claim to preserve the function."""

    name = "honest"
    preserves_function = False


@pytest.fixture
def program(traced) -> Program:
    return traced("mlp")


@pytest.fixture
def forwards(monkeypatch) -> list[Program]:
    """The programs that were run, in order."""
    ran: list[Program] = []
    run = Program.__call__

    def counted(self: Program, *args, **kwargs):
        ran.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Program, "__call__", counted)
    return ran


# A pass that breaks the function


def test_the_error_names_the_fold_and_the_agreement(program):
    with pytest.raises(PreservationError) as caught:
        Pipeline([Steps(down=1.5)]).run(program)
    assert str(caught.value).startswith(
        "steps must preserve the function, but output 0 agrees only to 6.1 dB (required: 100 dB); 6.1 dB after the "
        "fold of the down fold. The pass was undone"
    )


def test_the_first_fold_at_fault_is_named(program):
    with pytest.raises(PreservationError, match="after the fold of the up fold"):
        Pipeline([Steps(up=2.0, down=1.5)]).run(program)


def test_without_folds_the_pass_alone_is_named(program):
    with pytest.raises(PreservationError, match=r"agrees only to 6\.1 dB \(required: 100 dB\)\. The pass was undone"):
        Pipeline([Silent(down=1.5)]).run(program)


def test_the_caller_s_program_and_model_stay_as_they_were():
    model, x = build("mlp"), inputs("mlp")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    program = trace(model, x)
    before, wanted = print_program(program), program(**x)
    with pytest.raises(PreservationError):
        Pipeline([SmoothQuant(), Steps(down=1.5)]).run(program)
    assert print_program(program) == before
    assert torch.equal(program(**x), wanted)
    assert program.ledger == []
    assert program.outputs is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_small_change_is_one_too(program):
    """1e-4 is 80 dB."""
    with pytest.raises(PreservationError, match=r"agrees only to 80\.1 dB"):
        Pipeline([Steps(down=1.0001)]).run(program)


def test_a_pass_that_claims_nothing_is_not_checked(program, forwards):
    after = Pipeline([Honest(down=1.5)]).run(program)
    assert forwards == []
    assert after.ledger[0].preserved_db is None
    assert after.outputs is None


# What it costs, and what is recorded


def test_the_agreement_is_in_the_ledger(program):
    after = Pipeline([SmoothQuant(), Steps(), RoundWeights(MXINT8), LowerMX(MXINT8)]).run(program)
    smooth, steps, rounded, lowered = (record.preserved_db for record in after.ledger)
    assert REQUIRED_DB < smooth < math.inf
    assert steps > REQUIRED_DB
    assert (rounded, lowered) == (None, None)


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_one_forward_per_pass_and_one_before(program, forwards, passes):
    Pipeline([Steps()] * passes).run(program)
    assert len(forwards) == 1 + passes


def test_outputs_are_taken_anew_after_a_pass_that_changes_the_function(program, forwards):
    after = Pipeline([Steps(), Honest(down=1.5), Steps(), Steps()]).run(program)
    assert len(forwards) == 2 + 3
    assert [record.preserved_db for record in after.ledger] == [math.inf, None, math.inf, math.inf]


def test_a_second_run_knows_the_outputs(program, forwards):
    once = Pipeline([Steps()]).run(program)
    forwards.clear()
    Pipeline([Steps()]).run(once)
    assert len(forwards) == 1


def test_the_example_inputs_decide_and_not_the_calibration_data(program, forwards):
    Pipeline([Steps()]).run(program, calibration=[inputs("mlp", 1, 3)] * 5)
    assert [run.example for run in forwards] == [program.example] * 2


# Models in half precision


@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2", "bert", "vit", "mixtral"])
@pytest.mark.parametrize("linears", [False, True])
def test_bfloat16_models_stay_exactly_the_same(name, linears):
    """Their factors are powers of two."""
    program = trace(build(name, torch.bfloat16), half(inputs(name), torch.bfloat16))
    after = Pipeline([SmoothQuant(through_linears=linears)]).run(program)
    assert after.ledger[0].rewrites or (name, linears) == ("bert", False)
    assert after.ledger[0].preserved_db == math.inf
    x = half(inputs(name, 3, 5, seed=1), torch.bfloat16)
    assert torch.equal(output(after(**x)), output(program(**x)))


def half(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in x.items()}


def test_norms_that_add_one_in_bfloat16():
    program = trace(build("gemma", torch.bfloat16), inputs("gemma"))
    Pipeline([SmoothQuant()]).run(program)


class Mixed(nn.Module):
    """Parameters in float32; the norm's result is rounded to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(x).bfloat16().float())


def test_casts_to_half_precision_in_between():
    program = trace(Mixed(), torch.randn(2, 5, 64))
    assert find_groups(program, [])[0] == []
    Pipeline([SmoothQuant()]).run(program)


# Comparing outputs


def test_only_float_outputs_count_and_each_on_its_own():
    given = {"logits": torch.ones(3), "more": [torch.zeros(2), torch.arange(3)], "none": None}
    assert list(output_tensors(given)) == ["logits", "more.0"]


class Largest(nn.Module):
    """Only the index of the largest output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"ids": self.down(self.up(self.norm(x)).relu()).argmax(-1)}


def test_integers_are_compared_if_there_is_nothing_else():
    program = trace(Largest().eval(), inputs("mlp", batch=8))
    done = Pipeline([SmoothQuant()]).run(program)
    assert done.ledger[0].preserved_db == math.inf
    with pytest.raises(PreservationError, match="output ids agrees only to -inf dB"):
        Pipeline([Silent(down=-1.0)]).run(program)
    assert list(compared_outputs({"ids": torch.ones(2, dtype=torch.int64), "x": torch.ones(2)})) == ["x"]


@dataclass
class Answer:
    """A model's output as a dataclass."""

    logits: Tensor
    more: tuple[Tensor, ...]


def test_tensors_in_dataclasses_count():
    given = {"answer": Answer(torch.ones(2), (torch.zeros(3), torch.ones(1, dtype=torch.int64)))}
    assert list(output_tensors(given)) == ["answer.logits", "answer.more.0"]


def test_the_worst_output_is_named():
    wanted = {"big": torch.full((4,), 1e6), "small": torch.ones(4)}
    assert agreement_db(wanted, dict(wanted)) == (math.inf, "big")
    found, name = agreement_db(wanted, {**wanted, "small": torch.ones(4) * 1.01})
    assert (round(found), name) == (40, "small")


NAN = math.nan
DISAGREEING = {
    "missing": {},
    "another shape": {"0": torch.ones(3)},
    "a new NaN": {"0": torch.tensor([NAN, NAN])},
    "a NaN gone": {"0": torch.ones(2)},
}


@pytest.mark.parametrize("given", DISAGREEING.values(), ids=DISAGREEING)
def test_outputs_that_cannot_agree(given):
    assert agreement_db({"0": torch.tensor([NAN, 1.0])}, given) == (-math.inf, "0")


@pytest.mark.parametrize("other", [math.inf, NAN])
def test_other_infinities_do_not_agree(other):
    wanted, given = (torch.tensor([value, 1.0]) for value in (-math.inf, other))
    assert agreement_db({"0": wanted}, {"0": given})[0] == -math.inf


def test_the_same_infinities_agree():
    masked = torch.tensor([-math.inf, 1.0])
    assert agreement_db({"0": masked}, {"0": masked.clone()})[0] == math.inf


# A model that differs from itself


class Noisy(nn.Module):
    """Draws noise, in the trace too; or a factor that the trace has once and for all."""

    def __init__(self, source: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.source = source
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(self.source(x)))))


NOISES = {
    "%randn_like": lambda x: x + torch.randn_like(x),
    "%dropout": lambda x: nn.functional.dropout(nn.functional.dropout(x, 0.5, False), 0.5, True),
    "%bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
}


@pytest.mark.parametrize("name", NOISES)
def test_randomness_is_blamed_on_the_model(name):
    model, x = Noisy(NOISES[name]), torch.randn(4, 32)
    program = trace(model, x)
    for run in (
        lambda: Pipeline([SmoothQuant(), Steps()]).run(program, [x]),
        lambda: mxcompile.deploy(Pipeline([LowerMX(weight=MXINT8, activation=MXINT8)]).run(program), model),
    ):
        with pytest.raises(InputError) as caught:
            run()
        assert "the model is not deterministic: two runs of it on the example inputs differ" in str(caught.value)
        assert f"it draws random numbers at {name}" in str(caught.value)
        assert "report the model" not in str(caught.value)


def test_randomness_that_the_trace_does_not_show():
    noise = random.Random(0)
    model, x = Noisy(lambda x: x + noise.random() * 5 * x.flip(-1)), torch.randn(4, 32)
    lowered = Pipeline([LowerMX(weight=MXINT8, activation=MXINT8)]).run(trace(model, x))
    with pytest.raises(InputError, match=r"the model is not deterministic: .* dB\)\. Its quantized form"):
        mxcompile.deploy(lowered, model)


def test_outputs_are_compared_in_float32_where_products_may_be_less_exact(monkeypatch):
    precisions = []
    call = Program.__call__

    def recorded(program, *args, **kwargs):
        precisions.append(torch.get_float32_matmul_precision())
        return call(program, *args, **kwargs)

    monkeypatch.setattr(Program, "__call__", recorded)
    torch.set_float32_matmul_precision("high")
    try:
        Pipeline([SmoothQuant()]).run(trace(build("llama"), inputs("llama")), [inputs("llama")])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(precisions) == {"highest"}


@pytest.mark.parametrize("options", ["", "{key=mxint4,value=mxint4,window=2}"])
def test_rounding_in_a_cache_does_not_count(options):
    """A fold after `quantize-cache` changes which way a few keys round; it is compared with keys in float."""
    program = trace(build("llama"), inputs("llama"))
    cached = Pipeline.parse(f"quantize-cache{options}").run(program)
    record_outputs(program)
    record_outputs(cached)
    assert program.outputs is not None
    assert cached.outputs is not None
    assert agreement_db(program.outputs, cached.outputs)[0] > REQUIRED_DB
    rounded = compared_outputs(cached(*cached.example.args, **cached.example.kwargs))
    assert agreement_db(compared_outputs(program(*program.example.args, **program.example.kwargs)), rounded)[0] < 80
