"""Which values have rows that the model's own arithmetic selects: a router, a top-k of tokens, an early exit.

    rows = x[index]        index computed from weights: row i of `rows` is another token once a weight is rounded

Two runs of a program with different weights (float and rounded) cannot be compared row by row there. Rows that depend
on the inputs alone (a mask, token ids) are the same in both runs. Rows are in their places again after an `index_add`
or `scatter` into a tensor that is in order, or an elementwise op with a value of the same shape that is in order (a
residual addition).
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from torch import Tensor
from torch.fx import Node

from mxcompile.graph.dataflow import is_constant, operand, shapes_are_equal
from mxcompile.graph.program import Program

_INDEX: Final = "index"
_SELECTING: Final[dict[str, tuple[int, int | None]]] = {
    "index_select": (2, 1),
    "gather": (2, 1),
    "take_along_dim": (1, 2),
    "masked_select": (1, None),
    "take": (1, None),
    "repeat_interleave": (1, 2),
}  # op -> positions of its indices and of the dimension that they select from; None: all dimensions
_SORTING: Final[dict[str, int]] = {"sort": 1, "topk": 2, "msort": 1, "kthvalue": 2}  # op -> position of the dimension
_INTO = frozenset(
    {"index_add", "index_copy", "index_put", "_index_put_impl", "index_fill", "scatter", "scatter_add"}
    | {"scatter_reduce", "masked_scatter", "masked_fill", "slice_scatter", "select_scatter"}
)
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "where"})


def values_with_selected_rows(program: Program) -> frozenset[Node]:
    """The values whose rows are selected by something computed from a parameter."""
    learned: set[Node] = set()
    selected: set[Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if any(s in learned for s in sources) or (node.op == "get_attr" and program.is_parameter(str(node.target))):
            learned.add(node)
        if _selects(node, learned.__contains__) or (
            any(s in selected for s in sources) and not _is_in_order(node, selected)
        ):
            selected.add(node)
    return frozenset(selected)


def _selects(node: Node, learned: Callable[[Any], bool]) -> bool:
    """Whether the node itself selects rows of a computed value by a learned index."""
    name, source = _name(node), operand(node, 0)
    if not isinstance(source, Node) or name not in (_INDEX, *_SELECTING, *_SORTING):
        return False
    rank = _rank(source)
    if name == _INDEX:
        chosen = any(isinstance(index, Node) and learned(index) for index in operand(node, 1)[: max(1, rank - 1)])
    elif name in _SELECTING:
        position, dim = _SELECTING[name]
        chosen = learned(operand(node, position)) and not _is_last(node, dim, rank)
    else:
        chosen = learned(source) and not _is_last(node, _SORTING[name], rank)
    return chosen and not is_constant(source)


def _is_in_order(node: Node, selected: set[Node]) -> bool:
    """Whether an op puts selected rows into the places of a value that is in order."""
    name = _name(node)
    if name in _INTO:
        return operand(node, 0) not in selected
    if name not in _ELEMENTWISE:
        return False
    shape = _shape(node)
    in_order = (s for s in node.all_input_nodes if s not in selected and not is_constant(s))
    return any(shapes_are_equal(_shape(source), shape) for source in in_order)


def _name(node: Node) -> str:
    """Name of an ATen op, the same for its in-place form."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::").rstrip("_")


def _is_last(node: Node, position: int | None, rank: int) -> bool:
    """Whether an op works along the last of several dimensions, which leaves rows where they are."""
    dim = None if position is None else operand(node, position)
    return isinstance(dim, int) and rank > 1 and dim % rank == rank - 1


def _rank(node: Node) -> int:
    return len(_shape(node))


def _shape(node: Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()
