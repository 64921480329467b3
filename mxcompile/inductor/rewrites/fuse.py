"""dequantize(quantize(x)) -> mx::quantize_dequantize(x);  matmul(x, dequantize(w)) + bias -> mx::linear(x, w, bias).

Matmuls by experts: `fuse_experts.py`.

mx::multiply(x, m) becomes an ordinary multiplication, which Inductor fuses with the producer of x.

The rules match both dialects of fx graphs: a lowered Program (`aten.linear`, `aten.addmm`, `aten.matmul`) and the
graphs that Inductor compiles (`aten.mm`, `aten.addmm` on permuted weights).
"""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from mxcompile.graph.dataflow import TRANSPOSES, swapped_axes
from mxcompile.graph.program import where
from mxcompile.graph.records import Miss, PassResult
from mxcompile.graph.rules import Call, Match, Pattern, Rule, Wildcard, apply_rules
from mxcompile.inductor.rewrites.fuse_experts import EXPERT_RULES, GROUPED_MATMULS
from mxcompile.inductor.rewrites.weight_patterns import TRANSPOSED_WEIGHT, WEIGHT, planes_argument
from mxcompile.ops import DEQUANTIZE, LINEAR, MULTIPLY, QUANTIZE, QUANTIZE_DEQUANTIZE, ROTATE

aten = torch.ops.aten

_QUANTIZED = Call(QUANTIZE, Wildcard("x"), Wildcard("format"), Wildcard("rule"), name="quantize")
_ROUND_TRIP = Call(
    DEQUANTIZE,
    Call(operator.getitem, _QUANTIZED, 0),
    Call(operator.getitem, _QUANTIZED, 1),
    Wildcard("format"),
    Wildcard("size"),
    Wildcard("dtype"),
)
_MULTIPLIES = frozenset({aten.mm.default, aten.matmul.default})
VIEWS = frozenset({aten.view.default, aten.reshape.default})
_PURE = frozenset({QUANTIZE, DEQUANTIZE, MULTIPLY, ROTATE, operator.getitem, *VIEWS})
_OTHER_MATMULS = frozenset({aten.bmm.default, aten.baddbmm.default, *_MULTIPLIES, aten.addmm.default})


def fuse(graph: Graph) -> PassResult:
    """Apply the fusion rules in place. A matmul whose MX weight stays unfused is a miss with its reason.

    A value that several matmuls read is quantized once.
    """
    _merge_equal_calls(graph)
    result = apply_rules(graph, RULES)
    explained = {miss.where for miss in result.misses}
    leftover = [miss for miss in _unfused(graph) if miss.where not in explained]
    return PassResult(result.rewrites, (*result.misses, *leftover))


def fused_linears(graph: Graph) -> list[Node]:
    """The `mx::linear` calls of a graph."""
    return [node for node in graph.nodes if node.target is LINEAR]


def _merge_equal_calls(graph: Graph) -> None:
    """Merge equal `mx::` calls and views (common subexpressions). Multipliers are compared by digest."""
    first: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.target not in _PURE:
            continue
        operands = node.args
        if node.target is MULTIPLY:
            operands = (node.args[0], node.args[2], node.args[1].meta["val"].dtype)  # pyright: ignore
        original = first.setdefault((node.target, _hashable(operands)), node)
        if original is not node:
            node.replace_all_uses_with(original)
            graph.erase_node(node)


def _hashable(operands: Any) -> Any:
    return tuple(map(_hashable, operands)) if isinstance(operands, list | tuple) else operands


def _check_round_trip(match: Match) -> str | None:
    dtype = match["x"].meta["val"].dtype
    return None if match["dtype"] == dtype else f"dequantizes {dtype} activations to {match['dtype']}"


def _fuse_round_trip(graph: Graph, match: Match) -> None:
    args = (match["x"], match["format"], match["rule"])
    match.replace(QUANTIZE_DEQUANTIZE, *args, name=f"{match['x'].name}_mx")


class _Vector(Wildcard):
    """A tensor of one dimension: matrices for runs of channels (`block_transforms.py`) stay an operator."""

    def match(self, value: Any, bindings: dict[str, Any]) -> bool:
        """Bind the name."""
        return value.meta["val"].dim() == 1 and super().match(value, bindings)


def _decompose_multiply(graph: Graph, match: Match) -> None:
    match.replace(aten.mul.Tensor, match["x"], match["multiplier"], name=f"{match['x'].name}_multiplied")


def _check_linear(match: Match) -> str | None:
    x, weight = match["x"].meta["val"], match["weight"].meta["val"]
    if weight.dim() != 2:
        return f"the weight is {weight.dim()}-D; mx::linear takes 2-D weights"
    if weight.dtype != x.dtype:
        return f"the weight is dequantized to {weight.dtype}, the activation is {x.dtype}"
    if "transpose" in match.bindings and swapped_axes(match["transpose"], 2) != (1, 0):
        return "the weight's blocks do not run along the contracted dimension"
    bias = match.bindings.get("bias")
    if isinstance(bias, Node) and tuple(bias.meta["val"].shape) != (weight.shape[0],):
        return f"the added term of shape {tuple(bias.meta['val'].shape)} is not a bias"
    if any(match.root.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return "addmm with alpha or beta other than 1"
    return None


def _fuse_linear(graph: Graph, match: Match) -> None:
    args = (match["x"], match["elements"], match["scales"], match.bindings.get("bias"), match["format"])
    match.replace(LINEAR, *args, *planes_argument(match), name=f"{match.root.name}_mx")


def _linear_rule(name: str, pattern: Pattern) -> Rule:
    return Rule(name, pattern, _check_linear, _fuse_linear)


RULES = (
    Rule(
        "decompose-multiply", Call(MULTIPLY, Wildcard("x"), _Vector("multiplier")), lambda _: None, _decompose_multiply
    ),
    Rule("fuse-activation", _ROUND_TRIP, _check_round_trip, _fuse_round_trip),
    _linear_rule("fuse-linear", Call(aten.linear.default, Wildcard("x"), WEIGHT, Wildcard("bias"))),
    _linear_rule("fuse-matmul", Call(_MULTIPLIES, Wildcard("x"), TRANSPOSED_WEIGHT)),
    _linear_rule("fuse-addmm", Call(aten.addmm.default, Wildcard("bias"), Wildcard("x"), TRANSPOSED_WEIGHT)),
    *EXPERT_RULES,
)


def _unfused(graph: Graph) -> list[Miss]:
    misses: list[Miss] = []
    for node in graph.nodes:
        if node.target not in _OTHER_MATMULS and str(node.target) not in GROUPED_MATMULS:
            continue
        for source in node.all_input_nodes:
            origin = source.all_input_nodes[0] if source.target in TRANSPOSES else source
            if origin.target is DEQUANTIZE and origin.args[0].op in ("get_attr", "placeholder"):  # pyright: ignore
                misses.append(Miss(where(node), f"no fused kernel for {node.target}: its weight is dequantized first"))
    return misses
