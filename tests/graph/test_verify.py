"""verify: a valid Program passes at every stage. A malformed graph, a missing tensor, an op of another stage, a node
without a fake value and packed bytes of a wrong size are errors that name the node and its module.
"""

from dataclasses import dataclass

import pytest
import torch
from torch.fx import Node

from mxcompile.errors import VerifyError
from mxcompile.graph import verify
from mxcompile.graph.edit import insert_call
from mxcompile.graph.program import Program, Stage
from mxcompile.graph.records import PassResult
from mxcompile.ops import DEQUANTIZE, QUANTIZE, QUANTIZE_DEQUANTIZE
from mxcompile.pipeline.interfaces import Instrument, Pass, PipelineStep
from mxcompile.pipeline.pipeline import Pipeline

PIPELINES = {
    Stage.FLOAT: "smooth-quant",
    Stage.ROUNDED: "round-weights{format=mxint4}",
    Stage.LOWERED: "lower-mx{weight=mxint4,activation=mxint8}",
    Stage.FUSED: "lower-mx{weight=mxint4,activation=mxint8} | fuse-mx-gemm",
}


@pytest.fixture
def program(traced) -> Program:
    return traced("mlp")


def node_named(program: Program, name: str) -> Node:
    (node,) = [n for n in program.graph.nodes if n.name == name]
    return node


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("name", ["mlp", "llama-tied", "mixtral"])
def test_every_stage_is_valid(name, stage, traced):
    program = Pipeline.parse(PIPELINES[stage]).run(traced(name))
    assert program.stage is stage
    verify.check(program)


@pytest.mark.parametrize(
    ("stage", "claimed", "message"),
    [
        (Stage.LOWERED, Stage.FLOAT, "mx.dequantize.default, but the program is not lowered: a pass sets its `gives`"),
        (Stage.LOWERED, Stage.ROUNDED, "mx.dequantize.default, but the program is not lowered"),
        (Stage.FUSED, Stage.LOWERED, "mx.quantize_dequantize.default, but the program is not fused"),
    ],
)
def test_ops_of_another_stage(stage, claimed, message, program):
    program = Pipeline.parse(PIPELINES[stage]).run(program)
    program.stage = claimed
    with pytest.raises(VerifyError, match=message):
        verify.check(program)


def break_order(program: Program, linear: Node) -> None:
    linear.append(linear.args[0])


def break_tensor(program: Program, linear: Node) -> None:
    delattr(program.graph_module.up, "bias")


def break_kind(program: Program, linear: Node) -> None:
    del program.graph_module.up.bias
    program.graph_module.up.bias = torch.nn.Identity()


def break_quantize(program: Program, linear: Node) -> None:
    insert_call(program, linear, QUANTIZE, (linear.args[0], "mxint8", "floor"), "early")


def break_fused(program: Program, linear: Node) -> None:
    insert_call(program, linear, QUANTIZE_DEQUANTIZE, (linear.args[0], "mxint8", "floor"), "early")


def break_type(program: Program, linear: Node) -> None:
    with program.graph.inserting_before(linear):
        program.graph.call_function(torch.ops.aten.neg.default, (linear.args[0],))


BREAKS = {
    break_order: r"the graph is malformed at %linear in up: Argument 'layer_norm' of Node 'linear' was used before",
    break_tensor: r"up\.bias",
    break_kind: r"%up_bias reads 'up\.bias', which the program does not have",
    break_quantize: r"%early in up is mx\.quantize\.default, but the program is not lowered: a pass sets its `gives`",
    break_fused: r"%early in up is mx\.quantize_dequantize\.default, but the program is not fused",
    break_type: r"%neg_default has no fake value: insert nodes with mxcompile\.graph\.edit\.insert_call",
}


@dataclass(frozen=True)
class Break(Pass):
    """A pass that breaks a program in one way."""

    how: object

    name = "break"

    def run(self, program: Program) -> PassResult:
        self.how(program, node_named(program, "linear"))
        return PassResult(1)


@pytest.mark.parametrize("how", BREAKS, ids=lambda how: how.__name__)
def test_a_pass_that_leaves_an_invalid_program(how, program):
    failures = []

    class Watch(Instrument):
        def failed(self, program: Program, step: PipelineStep, error: Exception) -> None:
            failures.append((step.current.name, error))

        def after(self, *_: object) -> None:
            raise AssertionError("a broken program is not shown as a finished one")

    with pytest.raises(VerifyError, match=BREAKS[how]) as caught:
        Pipeline([Break(how)]).run(program, instruments=[Watch()])
    assert failures == [("break", caught.value)]
    assert str(caught.value).startswith("pass 'break': ")


# Packed bytes


@pytest.fixture
def lowered(program) -> tuple[Program, Node]:
    """A lowered program and the node that dequantizes the weight of `up`: [128, 64] in mxint4."""
    program = Pipeline.parse(PIPELINES[Stage.LOWERED]).run(program)
    return program, node_named(program, "up_weight_dequantized")


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (
            2,
            "mxint8",
            r"%up_weight_dequantized in up: \(128, 32\) bytes and \(128, 2\) scales do not hold 64 values of mxi",
        ),
        (2, "mxint4:64", "do not hold 64 values of mxint4:64"),
        (3, 65, "do not hold 65 values of mxint4"),
        (0, None, "%up_weight_dequantized in up does not read packed elements and scales"),
    ],
    ids=["format", "block", "size", "no elements"],
)
def test_a_dequantize_that_does_not_fit_its_bytes(index, value, message, lowered):
    program, node = lowered
    node.update_arg(index, value)
    with pytest.raises(VerifyError, match=message):
        verify.check(program)


def test_a_dequantize_of_activations_is_checked_too(lowered):
    program, _ = lowered
    (node,) = [n for n in program.graph.nodes if n.target is DEQUANTIZE and "layer_norm" in n.name]
    verify.check(program)
    node.update_arg(3, 31)
    with pytest.raises(VerifyError, match="do not hold 31 values of mxint8"):
        verify.check(program)
