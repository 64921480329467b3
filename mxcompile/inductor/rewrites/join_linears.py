"""linear(quantize_dequantize(x), w1), linear(quantize_dequantize(x), w2) -> cpu_linears(x, [w1, w2]).

One call instead of three (q, k, v) or four (with the rounding of their input): for a small GEMM the call itself is much
of the cost. On a GPU the weights have the planar layout and `mx::linears` runs them in one launch. There, rounding and
alignment of the input join the call only if the FP8 kernel may run; otherwise `decompose_rounding.py` handles them. One
token whose rounded values are integers is multiplied as such: its call, which reads what was rounded, rounds it again,
so that it need not look for the scales of its values. Nothing changes by that.
"""

import math
import operator
from typing import Any, cast

from torch.fx import Graph, Node

from mxcompile.formats import parse_format, parse_scale_rule
from mxcompile.graph.edit import create_call
from mxcompile.inductor.rewrites.fuse import VIEWS
from mxcompile.kernels.dispatch import why_not_fp8, why_not_integers
from mxcompile.kernels.layout import fp8_eligibility
from mxcompile.kernels.layout.planes import PlanarScaling
from mxcompile.ops import CPU_LINEARS, LINEAR, LINEARS, QUANTIZE_DEQUANTIZE


def join_linears(graph: Graph) -> int:
    """Join all `mx::linear` calls that share an input and a weight format. Returns the number of joined calls."""
    groups: dict[tuple[Node, ...], list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=LINEAR, sort=True):
        if _on_cpu(node) or _planes(node):
            groups.setdefault((node.args[0], *node.args[4:]), []).append(node)
    return sum(_join(graph, key[0], nodes) for key, nodes in groups.items())


def _on_cpu(node: Node) -> bool:
    return node.meta["val"].device.type == "cpu"


def _planes(node: Node) -> tuple[Any, ...]:
    """The `planes` argument of `mx::linear`; empty for the row-major layout."""
    return node.args[5:]


def _join(graph: Graph, value: Node, nodes: list[Node]) -> bool:
    position = {node: index for index, node in enumerate(graph.nodes)}
    nodes = [node for node in nodes if all(position[arg] < position[nodes[0]] for arg in node.all_input_nodes)]
    columns = [[node.args[index] for node in nodes] for index in (1, 2, 3)]
    with graph.inserting_before(nodes[0]):
        x, activation, rule = _operand(graph, value, nodes[0])
        if activation is None and len(nodes) == 1:
            return False
        args = (x, *columns, nodes[0].args[4], activation, rule, *_planes(nodes[0]))
        target = LINEARS if _planes(nodes[0]) else CPU_LINEARS
        joined = graph.create_node("call_function", target, args, name=f"{nodes[0].name}_joined")
        joined.meta["val"] = [node.meta["val"] for node in nodes]
        for index, node in enumerate(nodes):
            part: Any = graph.create_node("call_function", operator.getitem, (joined, index), name=f"{node.name}_part")
            part.meta = {key: entry for key, entry in node.meta.items() if key in ("val", "nn_module_stack")}
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
    _erase_unread(graph, value)
    return True


def _operand(graph: Graph, value: Node, node: Node) -> tuple[Any, Any, Any]:
    """What a joined call reads in place of `value`, and format and scale rule if it rounds that."""
    if (rounded := _rounding(value)) is None:
        return value, None, None
    x, activation, rule = rounded.args
    if not _call_rounds(value, node, rounded):
        return (value, activation, rule) if _multiplies_integers(value, node, rounded) else (value, None, None)
    if value.target in VIEWS:
        x = create_call(graph, value.target, x, *value.args[1:], name=f"{value.name}_plain")
    return x, activation, rule


def _erase_unread(graph: Graph, value: Node) -> None:
    """Erase a value without users and its producers, up to the rounding."""
    while value.target in (*VIEWS, QUANTIZE_DEQUANTIZE) and not value.users:
        source = cast(Node, value.args[0])
        graph.erase_node(value)
        if value.target is QUANTIZE_DEQUANTIZE:
            return
        value = source


def _call_rounds(value: Node, node: Node, rounded: Node) -> bool:
    """Whether the joined call does the rounding: on the CPU it does, without alignment; on a GPU the FP8 kernel does,
    which needs enough tokens."""
    activation, rule = map(str, rounded.args[1:])
    rounding = (parse_format(activation), parse_scale_rule(rule))
    if _on_cpu(value):
        return not rounding[0].aligned
    x, (weight, planes) = value.meta["val"], cast(tuple[Any, Any], node.args[4:6])
    sizes = x.shape[:-1]
    is_few = all(isinstance(size, int) for size in sizes) and math.prod(sizes) < fp8_eligibility.MIN_TOKENS
    return not is_few and why_not_fp8(x, parse_format(weight), PlanarScaling(*planes), rounding) is None


def _multiplies_integers(value: Node, node: Node, rounded: Node) -> bool:
    """Whether the joined call multiplies one token, rounded to integers, as integers."""
    x, (weight, *planes) = value.meta["val"], cast(tuple[Any, ...], node.args[4:])
    if not planes or not all(isinstance(size, int) for size in x.shape):
        return False
    rounding = (parse_format(str(rounded.args[1])), parse_scale_rule(str(rounded.args[2])))
    return why_not_integers(x, parse_format(weight), PlanarScaling(*planes[0]), rounding) is None


def _rounding(value: Node) -> Node | None:
    """The rounding node behind a value, or behind a view with the same last dimension."""
    source = cast(Node, value.args[0]) if value.target in VIEWS else value
    is_rounding = source.target is QUANTIZE_DEQUANTIZE and source.meta["val"].shape[-1] == value.meta["val"].shape[-1]
    return source if is_rounding else None
