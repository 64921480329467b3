"""Which matmuls are routers: their results choose which rows or which weights other matmuls multiply.

    scores = linear(x, w)
    chosen = topk(scores).indices
    y = grouped_mm(x[order(chosen)], experts, counts(chosen))         w is a router's weight

One walk through the graph keeps for every value the matmuls that it depends on, in three ways:

- as scores: each element is one of the matmul's results, moved, masked, or changed by elementwise ops and softmax.
- as a choice: the indices of a topk, sort, argmax, max or nonzero of scores, and what is computed from them alone
  (sorted expert numbers, counts, offsets, one-hot masks, scores scattered by them).
- as rows: another computed value that a choice indexes, masks or sorts, and what is computed from it.

A matmul is a router if another one multiplies its rows, or takes its choice as offsets or as an index into its weight.
Scores do not pass a matmul, an attention or a reduction, so that attention scores, an indexer of sparse attention, and
the last but one linear of a router with several are none. Tokens chosen by their own scores (mixture of depths,
pruning) are rows as well. Ids that a head chooses only look up rows of an embedding.
"""

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul, UnquantizedNode, activation_of
from mxcompile.analysis.row_masks import SELECTS, op_name
from mxcompile.analysis.tensor_reads import LOOKUPS, Sources, contracts, tensor_sources, value_inputs
from mxcompile.graph.dataflow import operand, written_values
from mxcompile.graph.program import Program
from mxcompile.ops import DEQUANTIZE

aten = torch.ops.aten

_WITH_INDICES: Final = frozenset({"topk", "sort", "msort", "kthvalue", "max", "min", "mode"})
"""They return (values, indices)."""
_INDICES: Final = frozenset({"argmax", "argmin", "argsort", "nonzero", "nonzero_numpy", "multinomial"})
_LOOKUPS: Final = LOOKUPS | SELECTS
_PRODUCTS: Final = frozenset({"matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "_grouped_mm", "grouped_mm"})
_JOINS: Final = frozenset(
    {"mul", "multiply", "div", "where", "masked_fill", "masked_scatter", "index_put", "_index_put_impl", "index_add"}
    | {"index_copy", "scatter", "scatter_add", "scatter_reduce"}
)
"""With a choice among their operands, they mask or sort the others."""
_KEEP_SCORES: Final = frozenset({"softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"})


def find_routers(
    program: Program, matmuls: Iterable[Matmul], refused: Iterable[UnquantizedNode]
) -> Mapping[Node, Node]:
    """Node of each router -> the first node that multiplies what it chooses.

    matmuls, refused: all nodes that multiply by a weight, from `find_matmuls`.
    """
    weighted = [*(matmul.node for matmul in matmuls), *(each.node for each in refused)]
    weighted += [node for node in program.graph.nodes if _is_fused(node)]
    walk = _Walk({node: 1 << index for index, node in enumerate(weighted)}, tensor_sources(program.graph, weighted))
    for node in program.graph.nodes:
        walk.visit(node)
    return walk.routers


@dataclass(frozen=True)
class _Origins:
    """The matmuls that a value depends on, as bits: each of the three ways of the module's docstring."""

    scores: int = 0
    choice: int = 0
    rows: int = 0

    def __or__(self, other: "_Origins") -> "_Origins":
        return _Origins(self.scores | other.scores, self.choice | other.choice, self.rows | other.rows)


_NONE: Final = _Origins()


class _Walk:
    """The origins of every value up to the last visited node, and the routers found there."""

    def __init__(self, bits: Mapping[Node, int], constants: Sources) -> None:
        self.routers: dict[Node, Node] = {}
        self._bits = bits
        self._matmuls = list(bits)
        self._constants = constants
        self._origins: defaultdict[Node, _Origins] = defaultdict(lambda: _NONE)

    def visit(self, node: Node) -> None:
        """Find the origins of a node whose operands have been visited."""
        inputs = value_inputs(node)
        union = self._union(inputs)
        if node in self._bits:
            self._choose(node, inputs)
            self._origins[node] = _Origins(scores=self._bits[node])
        elif union != _NONE:
            self._origins[node] = self._after(node, inputs, union)
            for value in written_values(node):
                self._origins[value] |= self._origins[node]

    def _choose(self, matmul: Node, inputs: list[Node]) -> None:
        """A matmul makes those matmuls routers that its operands depend on by choice."""
        chosen = self._union(inputs).rows
        activation = operand(matmul, 0) if _is_fused(matmul) else activation_of(matmul)
        chosen |= self._union(value for value in inputs if value is not activation).choice
        for index in _positions(chosen & ~self._bits[matmul]):
            self.routers.setdefault(self._matmuls[index], matmul)

    def _after(self, node: Node, inputs: list[Node], union: _Origins) -> _Origins:
        name = op_name(node)
        if node.target is operator.getitem:
            return _item(inputs[0], node.args[1], union)
        if name in _INDICES or node.target is aten.where.default:
            return _Origins(choice=union.scores | union.choice)
        if name in _LOOKUPS:
            return self._looked_up(node, inputs)
        mixed = self._mixed(inputs, union)
        joined, choice = mixed if name in _JOINS or name in _PRODUCTS else 0, union.choice & ~mixed
        if name in _PRODUCTS or "attention" in name:
            return _Origins(rows=joined)
        keeps_scores = name in _KEEP_SCORES or _has_indices(node, inputs) or not contracts(node)
        return _Origins(union.scores if keeps_scores else 0, choice, union.rows | joined)

    def _looked_up(self, lookup: Node, inputs: list[Node]) -> _Origins:
        """What a table holds, of which a choice, or a mask made by comparing scores, selects rows."""
        table = operand(lookup, 0)
        if table in self._constants and self._origins[table] == _NONE:
            return _NONE
        indices = [value for value in inputs if value is not table]
        masks = [value for value in indices if value.meta["val"].dtype == torch.bool]
        held = self._origins[table]
        selected = self._union(indices).choice | self._union(masks).scores
        return held | _Origins(rows=selected & ~held.scores & ~held.choice)

    def _mixed(self, inputs: list[Node], union: _Origins) -> int:
        """The matmuls whose choice comes together with a float value that does not depend on them."""
        bits = 0
        for value in inputs:
            tensor = value.meta["val"]
            if value not in self._constants and isinstance(tensor, Tensor) and tensor.dtype.is_floating_point:
                bits |= ~(self._origins[value].scores | self._origins[value].choice)
        return union.choice & bits

    def _union(self, values: Iterable[Node]) -> _Origins:
        result = _NONE
        for value in values:
            result |= self._origins[value]
        return result


def _has_indices(node: Node, inputs: list[Node]) -> bool:
    """Whether a node returns values and indices, or elementwise maxima of two tensors; a maximum of all is a number."""
    return op_name(node) in _WITH_INDICES and (len(inputs) > 1 or not isinstance(node.meta.get("val"), Tensor))


def _item(source: Node, index: Any, union: _Origins) -> _Origins:
    """One of several results."""
    if op_name(source) in _WITH_INDICES and index == 1:
        return _Origins(choice=union.scores | union.choice)
    return union


def _is_fused(node: Node) -> bool:
    """Whether a node is a fused matmul: one of the `mx::` operators that read a packed weight."""
    if not str(node.target).startswith("mx.") or node.target is DEQUANTIZE:
        return False
    tensors = (value.meta["val"] for value in node.all_input_nodes if value.op == "get_attr")
    return any(isinstance(tensor, Tensor) and tensor.dtype == torch.uint8 for tensor in tensors)


def _positions(bits: int) -> Iterator[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest
