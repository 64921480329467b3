"""Calibration: only missing statistics are gathered; batches in every accepted form give the same statistics; batches
that do not fit the model are refused.
"""

from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from models import build, inputs
from torch import Tensor, nn

from mxcompile.calibration.runs.run import Request, gather_statistics
from mxcompile.calibration.statistics.observers import ChannelAbsMax
from mxcompile.errors import InputError, PassError
from mxcompile.graph.inputs import Inputs, as_batches
from mxcompile.graph.program import Program
from mxcompile.graph.records import PassResult
from mxcompile.graph.trace import trace
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.pipeline import Pipeline

KEY = ("layer_norm", "ChannelAbsMax")


class Count:
    """How many values and batches have been seen: an observer that every update shows in."""

    def __init__(self) -> None:
        self.value = torch.zeros(2)

    def update(self, x: Tensor) -> None:
        self.value = self.value + torch.tensor([x.numel(), 1.0])

    def merge(self, other: "Count") -> None:
        self.value = self.value + other.value


@pytest.fixture
def program(traced) -> Program:
    return traced("mlp")


def measured(program: Program, calibration: object, *requests: Request) -> dict[tuple[str, str], Tensor]:
    gather_statistics(program, requests or (Request("layer_norm", ChannelAbsMax),), as_batches(calibration))
    return program.statistics


def absmax(x: Tensor) -> Tensor:
    """What ChannelAbsMax must find on the MLP's norm."""
    with torch.no_grad():
        return build("mlp").norm(x).abs().flatten(0, -2).amax(0)


# Gathering


def test_statistics_of_a_value(program):
    x = inputs("mlp")["x"]
    assert torch.equal(measured(program, {"x": x})[KEY], absmax(x))


def test_over_all_batches(program):
    x = torch.randn(6, 8, 64)
    x[5] *= 10
    statistics = measured(program, [{"x": x[:2]}, {"x": x[2:3]}, {"x": x[3:]}])
    assert torch.equal(statistics[KEY], absmax(x))


FORMS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "Inputs": lambda x: Inputs((x,)),
    "list of tensors": lambda x: [x[:1], x[1:]],
    "list of tuples": lambda x: [(x[:1],), (x[1:],)],
    "list of lists": lambda x: [[x[:1]], [x[1:]]],
    "generator": lambda x: (row[None] for row in x),
    "loader": lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=1),
}


@pytest.fixture(scope="module")
def positional() -> Program:
    return trace(build("mlp"), inputs("mlp")["x"])


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_positional_batches(form, positional):
    x = inputs("mlp", seed=1)["x"]
    assert torch.equal(measured(positional.copy(), FORMS[form](x))[KEY], absmax(x))


@pytest.mark.parametrize(
    "form", [dict, UserDict, lambda x: [x], lambda x: iter([x])], ids=["dict", "map", "list", "it"]
)
def test_forms_of_keyword_batches(form, program):
    batch = inputs("mlp")
    assert torch.equal(measured(program, form(batch))[KEY], absmax(batch["x"]))


def test_keywords_in_any_order():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, large: Tensor, small: Tensor) -> Tensor:
            return self.linear(large) + small

    large, small = torch.full((2, 4), 9.0), torch.ones(2, 4)
    program = trace(Pair(), {"large": large, "small": small})
    statistics = measured(program, {"small": small, "large": large}, Request("large", ChannelAbsMax))
    assert statistics["large", "ChannelAbsMax"].tolist() == [9.0] * 4


def test_keys_of_a_nested_mapping_in_any_order():
    class Nested(nn.Module):
        def forward(self, pair: dict[str, Tensor]) -> Tensor:
            return pair["large"] + pair["small"]

    large, small = torch.full((2, 4), 9.0), torch.ones(2, 4)
    program = trace(Nested(), ({"large": large, "small": small},))
    statistics = measured(program, ({"small": small, "large": large},), Request("pair_large", ChannelAbsMax))
    assert statistics["pair_large", "ChannelAbsMax"].tolist() == [9.0] * 4


def test_several_statistics_in_one_run(program):
    runs = []

    def batches():
        for length in (3, 5):
            runs.append(length)
            yield Inputs((), inputs("mlp", 2, length))

    requests = [Request("layer_norm", ChannelAbsMax), Request("layer_norm", Count), Request("relu", Count)]
    gather_statistics(program, requests, batches())
    assert runs == [3, 5]
    assert set(program.statistics) == {KEY, ("layer_norm", "Count"), ("relu", "Count")}
    assert program.statistics["layer_norm", "Count"].tolist() == [2 * 8 * 64, 2]
    assert program.statistics["relu", "Count"].tolist() == [2 * 8 * 128, 2]


def test_only_what_is_missing_is_gathered(program):
    known = torch.full((64,), 3.0)
    program.statistics[KEY] = known
    statistics = measured(program, inputs("mlp"), Request("layer_norm", ChannelAbsMax), Request("relu", Count))
    assert statistics[KEY] is known
    assert statistics["relu", "Count"].tolist() == [2 * 8 * 128, 1]


def test_a_statistic_asked_for_twice_is_counted_once(program):
    statistics = measured(program, inputs("mlp"), Request("relu", Count), Request("relu", Count))
    assert statistics["relu", "Count"].tolist() == [2 * 8 * 128, 1]


@pytest.mark.parametrize("known", [True, False])
def test_nothing_to_gather_runs_nothing(known, program):
    def batches():
        raise AssertionError("no batch is needed")
        yield

    program.statistics[KEY] = torch.ones(64)
    gather_statistics(program, [Request("layer_norm", ChannelAbsMax)] if known else [], batches())
    assert list(program.statistics) == [KEY]


def test_observers_see_values_without_gradients(program):
    class Last:
        def update(self, x: Tensor) -> None:
            self.value = x

    x = inputs("mlp")["x"].requires_grad_()
    assert not measured(program, {"x": x}, Request("relu", Last))["relu", "Last"].requires_grad


def test_gathering_leaves_the_program_alone():
    model, x = build("mlp"), inputs("mlp")["x"]
    program = trace(model, {"x": x})
    before, weights = str(program.graph), {name: value.clone() for name, value in model.state_dict().items()}
    measured(program, {"x": x})
    assert str(program.graph) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_values_of_a_language_model(traced):
    program = traced("llama")
    statistics = measured(program, [inputs("llama", 1, 5), inputs("llama", 3, 9)], Request("linear", Count))
    assert statistics["linear", "Count"].tolist() == [(5 + 27) * 64, 2]


def test_keys():
    assert Request("linear", ChannelAbsMax).key == ("linear", "ChannelAbsMax")


# In a pipeline


@dataclass(frozen=True)
class Ask(Pass):
    """Asks for a statistic of the norm's output, shows it to the test, and doubles the norm on demand."""

    seen: list = field(compare=False)
    value: str = "layer_norm"
    double: bool = False

    name = "ask"

    def requests(self, program: Program) -> Sequence[Request]:
        return [Request(self.value, ChannelAbsMax)]

    def run(self, program: Program) -> PassResult:
        self.seen.append(program.statistics[self.value, "ChannelAbsMax"])
        for name in ("norm.weight", "norm.bias") if self.double else ():
            program.set_tensor(name, program.tensor(name).detach() * 2)
        return PassResult(int(self.double))


def test_statistics_live_until_a_rewrite(program):
    seen = []
    result = Pipeline([Ask(seen), Ask(seen, double=True), Ask(seen)]).run(program, inputs("mlp"))
    first, second, third = seen
    assert second is first
    assert torch.equal(third, 2 * first)  # measured again, on the rewritten graph
    assert list(result.statistics) == [KEY]
    assert Pipeline([Ask(seen, double=True)]).run(program).statistics == {}
    assert program.statistics == {}


def test_calibration_data_of_a_pipeline(program):
    seen, x = [], torch.randn(4, 8, 64) * 3
    for calibration in (None, inputs("mlp"), ({"x": row[None]} for row in x), {"x": x}):
        Pipeline([Ask(seen)]).run(program, calibration)
    assert torch.equal(seen[0], seen[1])  # the example inputs, if none are given
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


def test_a_batch_that_does_not_fit_is_named_before_a_pass_runs(program):
    seen, x = [], torch.randn(2, 8, 64)
    with pytest.raises(
        InputError, match=r"^calibration\[1\] has 0 positional arguments and keywords \['y'\]; the model"
    ):
        Pipeline([Ask(seen)]).run(program, [{"x": x}, {"y": x}])
    assert not seen


@pytest.mark.parametrize("calibration", [[], 3], ids=["empty", "number"])
def test_calibration_data_is_checked_though_no_pass_needs_it(calibration, program):
    with pytest.raises(InputError, match="calibration"):
        Pipeline([]).run(program, calibration)


def test_a_value_that_the_graph_does_not_have(program):
    with pytest.raises(PassError, match="nothing"):
        Pipeline([Ask([], value="nothing")]).run(program)


# Errors


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        ({"y": torch.randn(2, 8, 64)}, "0 positional arguments and keywords ['y']"),
        ({"x": torch.randn(2, 8, 64), "y": torch.randn(2)}, "0 positional arguments and keywords ['x', 'y']"),
        (torch.randn(2, 8, 64), "1 positional arguments and keywords []"),
        ({}, "0 positional arguments and keywords []"),
    ],
    ids=["wrong", "one more", "positional", "none"],
)
def test_arguments_of_another_name(batch, given, program):
    with pytest.raises(InputError) as caught:
        measured(program, batch)
    assert str(caught.value) == f"a calibration batch has {given}; the model was traced with 0 and ['x']"


def test_a_batch_of_another_size(program):
    with pytest.raises(InputError, match=r"do not fit the traced graph \(Guard failed: x\.size\(\)\[2\] == 64"):
        measured(program, {"x": torch.randn(2, 8, 65)})
    assert program.statistics == {}


def test_a_batch_of_another_size_is_explained_in_one_line(program):
    with pytest.raises(
        InputError, match=r"\(Guard failed: x\.size\(\)\[2\] == 64\); trace again with inputs of this kind"
    ):
        measured(program, {"x": torch.randn(2, 8, 65)})


@pytest.mark.parametrize("empty", [[], iter([])], ids=["list", "iterator"])
def test_no_batches(empty, program):
    with pytest.raises(InputError, match="calibration data is empty"):
        measured(program, empty)
    assert program.statistics == {}
