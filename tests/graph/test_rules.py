"""Rules: patterns match by position in the schema, however an operand is passed; a check's reason becomes a miss;
rewrites leave no dead code, and a second run changes nothing.
"""

import operator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from mxcompile.errors import InputError
from mxcompile.graph.dataflow import operand
from mxcompile.graph.program import Program
from mxcompile.graph.records import Miss, PassResult
from mxcompile.graph.rules import Call, Match, Rule, Wildcard, apply_rules
from mxcompile.graph.trace import trace

aten = torch.ops.aten


def graph_of(build) -> Graph:
    """A graph on placeholders x and y; `build(graph, x, y)` adds calls and returns the output."""
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(build(graph, x, y))
    return graph


def match(pattern, graph: Graph) -> dict | None:
    """What the pattern binds at the graph's last call, None if it does not match."""
    root, parts = graph.output_node().args[0], {}
    return parts if pattern.match(root, parts) else None


# Patterns


def test_any_binds_nodes_and_arguments():
    graph = graph_of(lambda g, x, y: g.call_function(aten.add.Tensor, (x, 3)))
    x = graph.find_nodes(op="placeholder")[0]
    assert match(Call(aten.add.Tensor, Wildcard("left"), Wildcard("right")), graph) == {"left": x, "right": 3}
    assert match(Wildcard("all"), graph) == {"all": graph.output_node().args[0]}


def test_the_same_name_twice_stands_for_the_same_thing():
    square = Call(aten.mul.Tensor, Wildcard("x"), Wildcard("x"))
    assert match(square, graph_of(lambda g, x, y: g.call_function(aten.mul.Tensor, (x, x)))) is not None
    assert match(square, graph_of(lambda g, x, y: g.call_function(aten.mul.Tensor, (x, y)))) is None
    assert match(square, graph_of(lambda g, x, y: g.call_function(aten.mul.Tensor, (x, 2)))) is None
    twice = Call(aten.add.Tensor, Call(aten.mul.Tensor, Wildcard("x"), Wildcard("n")), Wildcard("n"))

    def plus(addend):
        return graph_of(
            lambda g, x, y: g.call_function(aten.add.Tensor, (g.call_function(aten.mul.Tensor, (x, 2)), addend))
        )

    assert match(twice, plus(2))["n"] == 2
    assert match(twice, plus(3)) is None


def test_literal_operands():
    def softmax(dim):
        return graph_of(lambda g, x, y: g.call_function(aten.softmax.int, (x, dim)))

    pattern = Call(aten.softmax.int, Wildcard("x"), -1)
    assert match(pattern, softmax(-1)) is not None
    assert match(pattern, softmax(1)) is None


def test_operands_by_position_keyword_and_default():
    pattern = Call(aten.linear.default, Wildcard("x"), Wildcard("weight"), Wildcard("bias"))

    def linear(args, kwargs):
        return match(pattern, graph_of(lambda g, x, y: g.call_function(aten.linear.default, args(x, y), kwargs(x, y))))

    by_position = linear(lambda x, y: (x, y, x), lambda x, y: {})
    by_keyword = linear(lambda x, y: (x,), lambda x, y: {"weight": y, "bias": x})
    assert [str(v) for v in by_position.values()] == [str(v) for v in by_keyword.values()] == ["x", "y", "x"]
    assert linear(lambda x, y: (x, y), lambda x, y: {})["bias"] is None


def test_further_operands_are_free():
    graph = graph_of(lambda g, x, y: g.call_function(aten.linear.default, (x, y, y)))
    assert list(match(Call(aten.linear.default, Wildcard("x")), graph)) == ["x"]


def test_one_of_several_targets():
    pattern = Call({aten.relu.default, aten.gelu.default}, Wildcard("x"), name="activation")
    for target in (aten.relu.default, aten.gelu.default):
        graph = graph_of(lambda g, x, y, target=target: g.call_function(target, (x,)))
        assert match(pattern, graph)["activation"].target is target
    assert match(pattern, graph_of(lambda g, x, y: g.call_function(aten.silu.default, (x,)))) is None


def test_a_call_does_not_match_what_is_no_call():
    for value in (3, None, graph_of(lambda g, x, y: x).find_nodes(op="placeholder")[0]):
        assert not Call(aten.relu.default).match(value, {})


def test_python_operators_have_operands_too():
    graph = graph_of(lambda g, x, y: g.call_function(operator.getitem, (x, 1)))
    assert match(Call(operator.getitem, Wildcard("x"), 1), graph) is not None
    assert match(Call(operator.getitem, Wildcard("x"), 0), graph) is None
    assert operand(graph.output_node().args[0], 2, default="none given") == "none given"


# Rules: relu(linear(x, w)) -> gelu(x)


def rewrite(graph: Graph, match: Match) -> None:
    new = graph.call_function(aten.gelu.default, (match["x"],))
    new.meta = dict(match.root.meta)
    match.root.replace_all_uses_with(new)


def reject_64(match: Match) -> str | None:
    return "it has 64 rows" if match["w"].meta["val"].shape[0] == 64 else None


RULE = Rule(
    "gelu-for-relu",
    Call(aten.relu.default, Call(aten.linear.default, Wildcard("x"), Wildcard("w"))),
    reject_64,
    rewrite,
)


@pytest.fixture
def program() -> Program:
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU())
    return trace(layers, torch.randn(2, 8))


def calls(graph: Graph) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"]


def test_apply_rules(program):
    result = apply_rules(program.graph, [RULE])
    assert result == PassResult(2, (Miss("%relu_1 in 3", "gelu-for-relu: it has 64 rows"),))
    assert calls(program.graph) == ["gelu", "linear", "relu", "gelu"]
    program.graph.lint()


def test_the_rewritten_graph_runs():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    program, x = trace(nn.Sequential(first, nn.ReLU(), second), torch.randn(2, 8)), torch.randn(3, 8)
    assert apply_rules(program.graph, [Rule("skip", RULE.pattern, reject_64, skip)]).rewrites == 1
    program.drop_unread()
    assert list(program.parameter_names()) == ["2.weight", "2.bias"]
    assert torch.equal(program(x), second(x))
    with pytest.raises(InputError):  # removal of dead code keeps the guards, though nothing reads them
        program(torch.randn(3, 9))


def skip(graph: Graph, match: Match) -> None:
    del graph
    match.root.replace_all_uses_with(match["x"])


def test_twice_is_once(program):
    apply_rules(program.graph, [RULE])
    before = str(program.graph)
    again = apply_rules(program.graph, [RULE])
    assert again.rewrites == 0
    assert len(again.misses) == 1
    assert str(program.graph) == before


def test_nothing_to_do(program):
    before = str(program.graph)
    never = Rule("never", Call(aten.silu.default, Wildcard("x")), lambda match: None, rewrite)
    assert apply_rules(program.graph, [never]) == PassResult(0)
    assert apply_rules(program.graph, []) == PassResult(0)
    assert str(program.graph) == before


def test_the_first_rule_that_applies_wins(program):
    used = []

    def noting(name: str) -> Rule:
        def note(graph: Graph, match: Match) -> None:
            used.append(name)
            rewrite(graph, match)

        return Rule(name, RULE.pattern, RULE.check, note)

    result = apply_rules(program.graph, iter([noting("first"), noting("second")]))
    assert used == ["first", "first"]
    assert [miss.reason for miss in result.misses] == ["first: it has 64 rows", "second: it has 64 rows"]


def test_a_rewrite_inserts_in_front_of_the_root(program):
    def negate(graph: Graph, match: Match) -> None:
        match.root.update_arg(0, graph.call_function(aten.neg.default, (match["linear"],)))

    pattern = Call(aten.relu.default, Call(aten.linear.default, name="linear"))
    assert apply_rules(program.graph, [Rule("negate", pattern, lambda match: None, negate)]).rewrites == 3
    assert calls(program.graph) == ["linear", "neg", "relu"] * 3
    program.graph.lint()


def test_a_match_gives_its_parts():
    node: Node = Graph().placeholder("x")
    found = Match(node, {"bias": None})
    assert found["bias"] is None
    with pytest.raises(KeyError):
        found["weight"]


def test_operands_of_a_traced_call():
    class Keyword(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.softmax(x, dim=1, dtype=torch.float64)

    (softmax,) = [n for n in trace(Keyword(), torch.randn(2, 3)).graph.nodes if "softmax" in n.name]
    assert [operand(softmax, 1), operand(softmax, 2)] == [1, torch.float64]
    assert operand(softmax, 9, default="beyond the schema") == "beyond the schema"


def test_operands_that_are_left_out_have_the_schemas_default():
    graph = graph_of(lambda g, x, y: g.call_function(aten.layer_norm.default, (x, [8])))
    norm = graph.output_node().args[0]
    assert [operand(norm, index, default="other") for index in (2, 4, 5)] == [None, 1e-5, True]


def test_replace_keeps_type_and_module_and_gives_a_short_unique_name():
    graph = graph_of(lambda g, x, y: g.call_function(aten.pow.Tensor_Scalar, (x, 2)))
    (root,) = graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar)
    root.meta = {"val": "the type", "nn_module_stack": {"a": "module"}, "other": 1}
    x = graph.find_nodes(op="placeholder")[0]
    rule = Rule(
        "square",
        Call(aten.pow.Tensor_Scalar, Wildcard("x"), 2),
        lambda match: None,
        lambda graph, match: match.replace(aten.mul.Tensor, match["x"], match["x"]),
    )
    assert apply_rules(graph, [rule]).rewrites == 1
    (made,) = graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert (made.name, made.args) == ("mul", (x, x))
    assert made.meta == {"val": "the type", "nn_module_stack": {"a": "module"}}
    assert graph.output_node().all_input_nodes == [made]
    assert not graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar)
