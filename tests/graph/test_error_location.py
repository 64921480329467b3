"""Errors of passes: the message and the dump name the pass that failed, or broke the graph, and the node."""

from dataclasses import dataclass

import pytest
import torch
from models import build, inputs

import mxcompile
from mxcompile import Miss, PassResult, Rule
from mxcompile.analysis.choice import choose
from mxcompile.calibration.runs.run import Request
from mxcompile.diagnostics.dump import Dump
from mxcompile.diagnostics.dump_reader import DumpReader
from mxcompile.diagnostics.measure import Measure
from mxcompile.errors import MXCompileError, PassError, UnknownNameError, VerifyError
from mxcompile.graph.edit import insert_call
from mxcompile.graph.error_location import add_location, last_node
from mxcompile.graph.rules import Call, Wildcard, apply_rules
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.pipeline import Pipeline

aten = torch.ops.aten


def divide(program):
    """Raises at the second matmul."""
    for place, matmul in enumerate(choose(program).matmuls):
        assert 1 / (1 - place) > 0, matmul


def divide_by_node(program):
    for node in program.graph.nodes:
        if node.target is aten.relu.default:
            deeper(node.args[0])


def deeper(producer):
    raise KeyError(f"nothing about {len(producer.users)} readers")


def check_of_a_rule(program):
    def check(match):
        return str(match["missing"])

    apply_rules(program.graph, [Rule("gelu", Call(aten.relu.default, Wildcard("x")), check, lambda *_: None)])


def erase(program):
    node = program.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    program.graph.erase_node(node)


def refuse(program):
    for matmul in choose(program).matmuls:
        if matmul.module_path == "down":
            raise PassError("this layer has odd channels")


def refuse_by_name(program):
    for matmul in choose(program).matmuls:
        raise PassError(f"%{matmul.node.name} has odd channels")


def unknown(program):
    for matmul in choose(program).matmuls:
        raise UnknownNameError("thing", matmul.module_path, ["uq"])


def out_of_order(program):
    relu = program.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    program.graph.output_node().append(relu)


def other_shape(program):
    program.set_tensor("up.weight", torch.zeros(3, 64))


def no_type(program):
    relu = program.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    with program.graph.inserting_before(relu):
        program.graph.call_function(aten.gelu.default, (relu.args[0],))


def cannot_be_run(program):
    """Its type says it can."""
    relu = program.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    node = insert_call(program, relu, aten.relu.default, relu.args, "wrong")
    node.target = aten.index_select.default
    node.args = (node.args[0], 0, node.args[0])
    relu.replace_input_with(relu.args[0], node)


FAILURES = {
    divide: (PassError, "pass 'own' failed, last at %linear_1 in down: ZeroDivisionError: division by zero"),
    divide_by_node: (PassError, "pass 'own' failed, last at %linear in up: KeyError: 'nothing about 1 readers'"),
    check_of_a_rule: (PassError, "pass 'own' failed, last at %relu: KeyError: 'missing'"),
    erase: (PassError, "pass 'own' failed, last at %relu: RuntimeError: Tried to erase Node relu but it still had 1"),
    refuse: (PassError, "pass 'own', last at %linear_1 in down: this layer has odd channels"),
    refuse_by_name: (PassError, "pass 'own': %linear has odd channels"),
    unknown: (UnknownNameError, "pass 'own': unknown thing 'up': did you mean uq?"),
    out_of_order: (
        VerifyError,
        "pass 'own': the graph is malformed at %linear_1 in down: Argument 'relu' of Node 'lin",
    ),
    other_shape: (
        VerifyError,
        "pass 'own': %up_weight reads 'up.weight', which is torch.float32 (3, 64) and was torch.float32 (128, 64)",
    ),
    no_type: (
        VerifyError,
        "pass 'own': %gelu_default has no fake value: insert nodes with mxcompile.graph.edit.insert_call",
    ),
    cannot_be_run: (PassError, "pass 'own' failed, last at %wrong: IndexError"),
}


@dataclass(frozen=True)
class Own(Pass):
    """Fails in one way."""

    how: object = None

    name = "own"

    def run(self, program):
        self.how(program)
        return PassResult(1, (Miss("a", "b"),))


@pytest.mark.parametrize("how", FAILURES, ids=lambda how: how.__name__)
def test_the_error_and_the_dump_name_the_pass_and_the_node(how, tmp_path):
    program = mxcompile.trace(build("mlp"), inputs("mlp"))
    kind, message = FAILURES[how]
    with pytest.raises(kind) as caught:
        Pipeline([Own(how), *Pipeline.parse("lower-mx{weight=mxint4}").passes]).run(
            program, instruments=[Dump(tmp_path), Measure()]
        )
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    failure = DumpReader(tmp_path).failure()
    assert (failure.index, failure.message, failure.rest) == (1, str(caught.value), "lower-mx{weight=mxint4}")


class Stuck:
    """An observer that fails at a value."""

    value = torch.zeros(())

    def update(self, x):
        raise ArithmeticError(f"cannot look at {x.dim()} dimensions")


class Ask(Pass):
    name = "ask"

    def requests(self, program):
        return [Request("relu", Stuck)]

    def run(self, program):
        return PassResult(0)


def test_a_failing_observer_is_named_with_the_value_it_was_shown():
    program = mxcompile.trace(build("mlp"), inputs("mlp"))
    with pytest.raises(PassError, match=r"^pass 'ask' failed, last at %relu: ArithmeticError: cannot look at 3 dim"):
        Pipeline([Ask()]).run(program)


def test_an_error_that_has_seen_no_node_names_the_pass_alone():
    with pytest.raises(OSError, match="full") as caught:
        raise OSError("disk full")
    assert last_node(caught.value) is None
    assert str(add_location(caught.value, "own")) == "pass 'own' failed: OSError: disk full"
    assert add_location(caught.value, "own").__cause__ is caught.value


def test_a_message_that_names_the_pass_is_left_as_it_is():
    assert str(add_location(MXCompileError("own-pass needs more"), "own-pass")) == "own-pass needs more"
    other = MXCompileError("my own-pass-2 needs more")
    assert str(add_location(other, "own-pass")).startswith("pass 'own-pass': my own")
