"""grouped_mm(x, dequantize(w), ends) -> mx::grouped_linear(x, experts of the rows, w).

The grouped matmul reads every expert of the dequantized weight; the fused one decodes only those that have rows. The
rules are for lowered Programs: deployed modules call `mx::experts` and `mx::grouped_linear` themselves. A batched
matmul by all experts (`bmm`) becomes one with the experts in turn, without those that only rows of zeros would be
multiplied by (`numerics/experts.py`, `experts_in_turn`).
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from mxcompile.graph.dataflow import swapped_axes
from mxcompile.graph.edit import create_call
from mxcompile.graph.rules import Call, Match, Rule, Wildcard
from mxcompile.inductor.rewrites.weight_patterns import TRANSPOSED_WEIGHT, planes_argument
from mxcompile.ops import GROUPED_LINEAR

aten = torch.ops.aten

GROUPED_MATMULS = frozenset({"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"})
"""By name: that of transformers exists only once transformers is imported."""


def _check(match: Match) -> str | None:
    x, weight = match["x"].meta["val"], match["weight"].meta["val"]
    if weight.dim() != 3:
        return f"the weight is {weight.dim()}-D; mx::grouped_linear takes experts, which are 3-D"
    if swapped_axes(match["transpose"], 3) != (0, 2, 1):
        return "the weight's blocks do not run along the contracted dimension"
    if weight.dtype != x.dtype:
        return f"the weight is dequantized to {weight.dtype}, the activation is {x.dtype}"
    return None


def _check_grouped(match: Match) -> str | None:
    if match["x"].meta["val"].dim() != 2 or not isinstance(match["ends"], Node):
        return "mx::grouped_linear takes rows [rows, in] and where those of each expert end"
    return _check(match)


def _fuse_grouped(graph: Graph, match: Match) -> None:
    x, ends = match["x"], match["ends"]
    rows = _size(graph, x, 0)
    offsets = ends.meta["val"]
    numbers = _arange(graph, rows, offsets)
    found = create_call(graph, aten.searchsorted.Tensor, ends, numbers, right=True, name=f"{ends.name}_experts")
    experts = create_call(graph, aten.unsqueeze.default, found, 1)
    match.replace(GROUPED_LINEAR, *_operands(match, x, experts), name=f"{match.root.name}_mx")


def _fuse_batched(graph: Graph, match: Match) -> None:
    x = match["x"]
    experts, rows, size = (_size(graph, x, dim) for dim in range(3))
    flat = create_call(graph, aten.reshape.default, x, [-1, size])
    numbers = _arange(graph, experts, match["elements"].meta["val"], torch.int64)
    column = create_call(graph, aten.unsqueeze.default, numbers, 1)
    chosen = create_call(graph, aten.reshape.default, _without_zeros(graph, x, column), [-1, 1])
    y = create_call(graph, GROUPED_LINEAR, *_operands(match, flat, chosen), name=f"{match.root.name}_mx")
    match.replace(aten.reshape.default, y, [experts, rows, match.root.meta["val"].shape[2]])


def _without_zeros(graph: Graph, x: Node, numbers: Node) -> Node:
    """Numbers `[E, 1]` of experts for the rows `[E, rows]` of x, plus E for a row of zeros."""
    is_zero = create_call(graph, aten.logical_not.default, create_call(graph, aten.any.dim, x, -1))
    none = create_call(graph, aten.mul.Tensor, is_zero, _size(graph, x, 0))
    return create_call(graph, aten.add.Tensor, none, numbers)


def _operands(match: Match, x: Node, experts: Node) -> tuple[Any, ...]:
    return (x, experts, match["elements"], match["scales"], None, match["format"], *planes_argument(match))


def _arange(graph: Graph, count: Any, like: Any, dtype: torch.dtype | None = None) -> Node:
    """0, 1, 2 ... on the device of a fake tensor and, by default, in its dtype."""
    with like.fake_mode:  # no operand is fake
        return create_call(graph, aten.arange.default, count, dtype=dtype or like.dtype, device=like.device)


def _size(graph: Graph, node: Node, dim: int) -> Any:
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else create_call(graph, aten.sym_size.int, node, dim)


EXPERT_RULES = (
    Rule(
        "fuse-experts",
        Call(GROUPED_MATMULS, Wildcard("x"), TRANSPOSED_WEIGHT, Wildcard("ends")),
        _check_grouped,
        _fuse_grouped,
    ),
    Rule("fuse-all-experts", Call(aten.bmm.default, Wildcard("x"), TRANSPOSED_WEIGHT), _check, _fuse_batched),
)
