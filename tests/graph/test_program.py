"""Program: it runs like the model; copies share only tensors; replacing a tensor never writes to the old one; inserted
nodes have the expected name, type and module path.
"""

import operator

import pytest
import torch
from models import MLP, build, inputs
from torch import Tensor, nn

from mxcompile.errors import InputError
from mxcompile.formats import MXINT4, MXINT8, ScaleRule
from mxcompile.graph.edit import fake_like, insert_call, insert_tensor
from mxcompile.graph.name_patterns import Selection
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Program, Rounding, Stage, guards_explained, module_path, where
from mxcompile.graph.records import PassRecord
from mxcompile.graph.trace import trace
from mxcompile.numerics.importance import round_rows
from mxcompile.ops import QUANTIZE
from mxcompile.tensor.weight import MXWeight

RECORD = PassRecord("some-pass", "some-pass", 1, (), 0.0, {})


@pytest.fixture
def program(traced) -> Program:
    return traced("mlp")


def node_named(program: Program, name: str):
    (node,) = [n for n in program.graph.nodes if n.name == name]
    return node


# Running


def test_runs_without_gradients(program):
    x = inputs("mlp")["x"].requires_grad_()
    assert not program(x).requires_grad
    assert torch.is_grad_enabled()


def test_keywords_in_any_order():
    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    program = trace(Difference(), {"a": a, "b": b})
    assert torch.equal(program(b=b, a=a), a - b)


def test_inputs_of_another_size_are_explained(program):
    with pytest.raises(InputError) as caught:
        program(x=torch.randn(2, 8, 63))
    message = str(caught.value)
    assert "do not fit the traced graph" in message
    assert "x.size()[2] == 64" in message
    assert "trace again" in message


def test_inputs_of_another_rank_are_explained(program):
    with pytest.raises(InputError, match=r"\(input x has 1 dimensions, it was traced with 3\)"):
        program(x=torch.randn(64))


def test_only_failed_guards_are_explained():
    with pytest.raises(AssertionError, match="something else"), guards_explained():
        raise AssertionError("something else")


# Copies


def test_a_copy_is_the_same_program(traced):
    program = traced("llama")
    copy = program.copy()
    assert print_program(copy) == print_program(program)
    assert [n.name for n in copy.graph.nodes] == [n.name for n in program.graph.nodes]
    x = inputs("llama", 3, 5)
    assert torch.equal(copy(**x).logits, program(**x).logits)


def test_a_copy_shares_tensors(program):
    copy = program.copy()
    assert all(copy.tensor(name) is program.tensor(name) for name in program.parameter_names())
    assert all(copy.is_parameter(name) for name in program.parameter_names())


def test_a_copy_has_its_own_graph(program):
    copy, before = program.copy(), print_program(program)
    linear = node_named(copy, "linear")
    insert_call(copy, linear, torch.ops.aten.neg.default, (linear.args[0],), "negative")
    linear.meta["nn_module_stack"] = {"": ("elsewhere", MLP)}
    assert "negative" in print_program(copy)
    assert print_program(program) == before


def test_a_copy_has_its_own_tensors_once_replaced(program):
    copy, old = program.copy(), program.tensor("up.weight")
    copy.set_tensor("up.weight", torch.zeros(128, 64))
    copy.set_tensor("up.smoothing", torch.ones(64))
    assert program.tensor("up.weight") is old
    assert not program.has_tensor("up.smoothing")
    assert copy.tensor("up.weight").count_nonzero() == 0


def test_a_copy_has_its_own_records(program):
    copy = program.copy()
    copy.ledger.append(RECORD)
    copy.rounded["up.weight"] = Rounding(MXINT8, torch.zeros(128, 2, dtype=torch.uint8))
    copy.statistics["linear", "ChannelAbsMax"] = torch.ones(128)
    copy.stage = Stage.ROUNDED
    assert (program.ledger, program.rounded, program.statistics) == ([], {}, {})
    assert program.stage is Stage.FLOAT


def test_a_copy_keeps_everything_known():
    program = trace(
        build("llama-tied"), inputs("llama-tied"), include=["lm_head"], exclude=["*.mlp"], allow_partial=True
    )
    program.stage = Stage.ROUNDED
    program.ledger.append(RECORD)
    program.rounded["lm_head.weight"] = rounding = Rounding(MXINT8, torch.zeros(1))
    program.statistics["linear", "ChannelAbsMax"] = statistic = torch.ones(128)
    copy = program.copy()
    assert copy.example is program.example
    assert copy.output_heads == {"lm_head.weight", "model.embed_tokens.weight"}
    assert copy.aliases == program.aliases != {}
    assert copy.selection == Selection(("lm_head",), ("*.mlp",), allow_partial=True)
    assert copy.stage is Stage.ROUNDED
    assert copy.ledger == [RECORD]
    assert copy.rounded == {"lm_head.weight": rounding}
    assert copy.statistics["linear", "ChannelAbsMax"] is statistic


# Tensors


def test_tensor_names(program):
    assert list(program.parameter_names()) == [name for name, _ in MLP().named_parameters()]
    assert program.has_tensor("norm.bias")
    for missing in ("norm.scale", "nothing.weight", "norm", "norm.weight.data"):
        assert not program.has_tensor(missing)
        with pytest.raises(KeyError, match=f"the program has no tensor '{missing}'"):
            program.tensor(missing)
        assert not program.is_parameter(missing)


def test_set_tensor_never_writes_to_the_users_tensor():
    model, x = build("mlp"), inputs("mlp")["x"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = trace(model, x)
    for name in list(program.parameter_names()):
        program.set_tensor(name, torch.zeros_like(program.tensor(name)))
        assert program.is_parameter(name)
        assert not program.tensor(name).requires_grad
    assert program(x).count_nonzero() == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad for value in model.parameters())


def test_set_tensor_replaces_a_buffer():
    model = nn.BatchNorm1d(8).eval()
    program = trace(model, torch.randn(2, 8))
    program.set_tensor("running_mean", torch.ones(8))
    assert not program.is_parameter("running_mean")
    assert torch.equal(program.tensor("running_mean"), torch.ones(8))
    assert model.running_mean.count_nonzero() == 0


def test_set_tensor_adds_a_tensor(program):
    program.set_tensor("added.inside.scales", torch.ones(3))
    assert program.has_tensor("added.inside.scales")
    assert not program.is_parameter("added.inside.scales")
    assert "added.inside.scales" in program.graph_module.state_dict()


def test_forget_lets_go_of_a_tensor_that_nothing_reads(program):
    linear = node_named(program, "linear")
    first = insert_tensor(program, linear, "up.bias")
    second = insert_tensor(program, linear, "down.weight")
    program.erase_tensor_node(first)
    assert program.has_tensor("up.bias")  # linear still reads it
    program.erase_tensor_node(second)
    down = node_named(program, "down_weight")
    linear_1 = node_named(program, "linear_1")
    linear_1.replace_input_with(down, linear_1.args[0])
    program.erase_tensor_node(down)
    assert not program.has_tensor("down.weight")
    assert "down.weight" not in program.parameter_names()


def test_drop_unread(program):
    program.set_tensor("up.smoothing", torch.ones(64))
    program.drop_unread()
    assert not program.has_tensor("up.smoothing")
    assert list(program.parameter_names()) == [name for name, _ in MLP().named_parameters()]
    x = inputs("mlp")["x"]
    assert torch.equal(program(x=x), build("mlp")(x))


def test_drop_unread_recompiles(program):
    linear = node_named(program, "linear")
    linear.replace_all_uses_with(node_named(program, "relu"), lambda user: user.name != "relu")
    relu = node_named(program, "relu")
    relu.replace_all_uses_with(linear)
    program.graph.erase_node(relu)
    program.drop_unread()
    x, model = inputs("mlp")["x"], build("mlp")
    assert torch.equal(program(x=x), model.down(model.up(model.norm(x))))


# Nodes


def test_where_a_node_is(traced):
    program = traced("llama")
    (q, *_) = [n for n in program.graph.nodes if n.name == "linear"]
    (ids,) = [n for n in program.graph.nodes if n.name == "input_ids"]
    assert module_path(q) == "model.layers.0.self_attn.q_proj"
    assert where(q) == "%linear in model.layers.0.self_attn.q_proj"
    assert (module_path(ids), where(ids)) == ("", "%input_ids")


@pytest.mark.parametrize(
    ("stack", "path"),
    [
        ({}, ""),
        ({"a": ("", MLP)}, ""),
        ({"a": ("", MLP), "b": ("layers.0", MLP)}, "layers.0"),
        ({"a": ("L['self']", MLP), "b": ("L['self'].layers.0", MLP)}, "layers.0"),
        ({"a": ("L['self']", MLP)}, ""),
    ],
)
def test_module_path_in_every_dialect(program, stack, path):
    node = node_named(program, "linear")
    node.meta["nn_module_stack"] = stack
    assert module_path(node) == path


def test_inserted_nodes_read_as_if_they_had_been_traced(program):
    linear = node_named(program, "linear")
    program.set_tensor("up.channel_scale", torch.full((64,), 2.0))
    scale = insert_tensor(program, linear, "up.channel_scale")
    product = insert_call(program, linear, torch.ops.aten.mul.Tensor, (linear.args[0], scale), "layer_norm_scaled")
    linear.replace_input_with(linear.args[0], product)
    program.drop_unread()
    lines = print_program(program).splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("%layer_norm_scaled ")]
    assert "f32[s0, s1, 64]" in lines[at]
    assert "aten.mul.Tensor(%layer_norm, %up_channel_scale)" in lines[at]
    assert lines[at].endswith("# up")
    assert lines[at - 1].startswith("%up_channel_scale ")
    assert lines[at + 1].startswith("%linear ")
    x, model = inputs("mlp")["x"], build("mlp")
    assert torch.equal(program(x=x), model.down(torch.relu(model.up(model.norm(x) * 2))))


def test_inserted_calls_with_several_results(program):
    linear = node_named(program, "linear")
    pair = insert_call(program, linear, QUANTIZE, (linear.args[0], "mxint8", "floor"), "quantized")
    scales = insert_call(program, linear, operator.getitem, (pair, 1), "scales")
    assert scales.meta["val"].shape[-1] == 2
    assert scales.meta["val"].dtype == torch.uint8
    assert module_path(pair) == module_path(scales) == "up"


def test_an_inserted_tensor_has_its_own_sizes(program):
    linear = node_named(program, "linear")
    program.set_tensor("up.odd", torch.zeros(37, 53))
    assert all(type(size) is int for size in insert_tensor(program, linear, "up.odd").meta["val"].shape)


def test_fake_like_in_a_graph_without_fake_values():
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    assert fake_like(node, torch.zeros(3, 5, dtype=torch.uint8)).device.type == "meta"
    assert fake_like(node, torch.zeros(3, 5, dtype=torch.uint8)).shape == (3, 5)


def test_stages_are_ordered():
    assert list(Stage) == sorted(Stage) == [Stage.FLOAT, Stage.ROUNDED, Stage.LOWERED, Stage.FUSED]


@pytest.mark.parametrize("axis", [-1, -2])
def test_rounded_experts_are_stored_packed(axis):
    """They read as the float values, in the parameter's own orientation, and the graph multiplies by them."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 64, 32) if axis == -2 else torch.randn(3, 32, 64))

        def forward(self, x):
            return torch.bmm(x, self.weight if axis == -2 else self.weight.transpose(-1, -2))

    x = torch.randn(3, 5, 64)
    program = trace(Experts(), x)
    weight = program.tensor("weight").detach()
    rows, scales = round_rows(weight if axis == -1 else weight.transpose(-1, -2), MXINT4, ScaleRule.MSE)
    expected = rows if axis == -1 else rows.transpose(-1, -2)
    float_bytes = program.stored_bytes()
    program.set_rounded("weight", rows, Rounding(MXINT4, scales), axis)
    stored = program.stored("weight")
    assert isinstance(stored, MXWeight)
    assert program.is_parameter("weight")
    assert (stored.shape, stored.dtype) == (weight.shape, weight.dtype)
    assert type(program.tensor("weight")) is not MXWeight
    assert torch.equal(program.tensor("weight"), expected)
    assert torch.equal(program.copy().tensor("weight"), expected)
    assert program.stored_bytes() < float_bytes / 7
    assert program.tensor_bytes("weight") == float_bytes
    torch.testing.assert_close(program(x), x @ rows.transpose(-1, -2), rtol=1e-5, atol=1e-5)
