"""round(f(gate) * up) -> mx::gate_product(gate, up, f), on a GPU: the gated product of an MLP and its rounding.

Inductor fuses these, too, into a kernel that reduces blocks of 32 values, which takes twice as long for one token. f is
recognized by what it computes (`numerics/gates.py`): SiLU, GELU or ReLU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from mxcompile.formats import parse_format, parse_scale_rule
from mxcompile.graph.dataflow import shapes_are_equal
from mxcompile.graph.edit import create_call
from mxcompile.inductor.rewrites.decompose_attention import erase_unread
from mxcompile.kernels.dispatch import why_no_small_kernel
from mxcompile.numerics.gates import Gate, recognize_gate
from mxcompile.ops import GATE_PRODUCT, QUANTIZE_DEQUANTIZE

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default
_POINTWISE = frozenset(
    {
        aten.abs.default, aten.add.Tensor, aten.clamp_min.default, aten.div.Tensor, aten.erf.default, aten.exp.default,
        aten.gt.Scalar, aten.le.Scalar, aten.maximum.default, aten.mul.Scalar, aten.mul.Tensor, aten.neg.default,
        aten.pow.Tensor_Scalar, aten.reciprocal.default, aten.relu.default, aten.rsub.Scalar, aten.sigmoid.default,
        aten.sub.Tensor, aten.tanh.default, aten.where.self, _CONVERT,
    }
)  # fmt: skip
_MOST_STEPS = 16


def fuse_gates(graph: Graph) -> int:
    """Fuse all gated products that are rounded next, in place, on a GPU. Returns the number of rewrites."""
    return sum(_rewrite(graph, node) for node in graph.find_nodes(op="call_function", target=QUANTIZE_DEQUANTIZE))


def _rewrite(graph: Graph, rounding: Node) -> bool:
    y: Any = rounding.args[0]
    fmt, rule = map(str, rounding.args[1:])
    if len(y.users) != 1 or y.target is not aten.mul.Tensor:
        return False
    if why_no_small_kernel("gate_product", y.meta["val"], (parse_format(fmt), parse_scale_rule(rule))) is not None:
        return False
    for activated, up in (y.args, y.args[::-1]):
        gate, function = _gate(activated, up)
        if gate is not None and function is not None:
            with graph.inserting_before(rounding):
                args = (gate, up, str(function), fmt, rule)
                result = create_call(graph, GATE_PRODUCT, *args, name=f"{rounding.name}_gated")
            rounding.replace_all_uses_with(result)
            erase_unread(graph, rounding)
            return True
    return False


def _gate(activated: Any, up: Any) -> tuple[Node | None, Gate | None]:
    """The value behind an activation, of the dtype and shape of `up`, and the gate; None if there is none."""
    if not isinstance(activated, Node) or not isinstance(up, Node):
        return None, None
    steps, sources = _steps(activated)
    if not steps or len(sources) != 1 or any(user not in steps for node in steps[:-1] for user in node.users):
        return None, None
    (gate,) = sources
    values = [node.meta["val"] for node in (gate, activated, up)]
    alike = all(v.dtype == values[0].dtype and shapes_are_equal(v.shape, values[0].shape) for v in values)
    function = recognize_gate(_replayed(steps, gate), 2, torch.device("cpu")) if alike else None
    is_plain = function is not None and function.limit is None and not function.shift and not function.interleaved
    return (gate, function) if is_plain else (None, None)


def _steps(activated: Node) -> tuple[list[Node], set[Node]]:
    """The elementwise nodes that an activation consists of, in order, and the values that they start from."""
    steps, sources, stack = set[Node](), set[Node](), [activated]
    while stack:
        node = stack.pop()
        if node.target in _POINTWISE and len(steps) < _MOST_STEPS:
            steps.add(node)
            stack += [source for source in node.all_input_nodes if source not in steps]
        else:
            sources.add(node)
    return [node for node in activated.graph.nodes if node in steps], sources


def _replayed(steps: list[Node], gate: Node) -> Callable[[Tensor], Tensor]:
    """Channels `[rows, 2]`, gate and up, to the gated product, in float32 throughout."""

    def run(channels: Tensor) -> Tensor:
        values: dict[Node, Any] = {gate: channels[:, :1]}
        for node in steps:
            args = torch.fx.map_arg(node.args, values.__getitem__)
            values[node] = args[0] if node.target is _CONVERT else node.target(*args, **node.kwargs)  # pyright: ignore
        return values[steps[-1]] * channels[:, 1:]

    return run
