"""round(norm(x + residual)) -> mx::add_norm(x, residual, weight, bias, norm), on a GPU; without a sum, mx::norm.

Inductor makes two kernels of it, one that reduces whole rows and one that reduces blocks. Ours holds a row in
registers. The norm (RMSNorm, also with weights stored as differences from 1, and LayerNorm) is recognized by what is
computed: `numerics/norms.py`. A norm that several values read, or that is multiplied once more, stays Inductor's.
"""

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from mxcompile.formats import parse_format, parse_scale_rule
from mxcompile.graph.dataflow import operand, shapes_are_equal
from mxcompile.graph.edit import create_call
from mxcompile.inductor.rewrites.decompose_attention import erase_unread
from mxcompile.kernels.dispatch import why_no_small_kernel
from mxcompile.numerics.norms import Norm
from mxcompile.ops import ADD_NORM, NORM, QUANTIZE_DEQUANTIZE

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class NormCall:
    """A norm in a graph: of x, whose normalized rows are multiplied by a weight and shifted by a bias."""

    x: Node
    weight: Node | None
    bias: Node | None
    norm: Norm


def fuse_norms(graph: Graph) -> int:
    """Fuse all norms that are rounded next, in place, on a GPU. Returns the number of rewrites."""
    return sum(_rewrite(graph, node) for node in graph.find_nodes(op="call_function", target=QUANTIZE_DEQUANTIZE))


def _rewrite(graph: Graph, rounding: Node) -> bool:
    y: Any = rounding.args[0]
    call = match_norm(y) if len(y.users) == 1 else None
    if call is None or y.meta["val"].dtype != call.x.meta["val"].dtype:
        return False
    fmt, rule = map(str, rounding.args[1:])
    if why_no_small_kernel("norm", call.x.meta["val"], (parse_format(fmt), parse_scale_rule(rule))) is not None:
        return False
    terms = _terms(call.x)
    with graph.inserting_before(call.x if terms else rounding):
        new = partial(create_call, graph)
        options = (call.weight, call.bias, str(call.norm), fmt, rule)
        if terms:
            both = new(ADD_NORM, *terms, *options, name=f"{rounding.name}_norm")
            total, result = (new(operator.getitem, both, i, name=f"{n.name}_{i}") for i, n in ((0, call.x), (1, y)))
            call.x.replace_all_uses_with(total)
            graph.erase_node(call.x)
        else:
            result = new(NORM, call.x, *options, name=f"{rounding.name}_norm")
    rounding.replace_all_uses_with(result)
    erase_unread(graph, rounding)
    return True


def match_norm(y: Node) -> NormCall | None:
    """The norm that a node is the result of; None if it is none, or one of another form."""
    wide, narrow = torch.float32, y.meta["val"].dtype
    node, weight, bias, offset = _unconverted(y), None, None, 0.0
    if (parts := _with_row(node, aten.add.Tensor)) is not None:
        node, bias = parts
    if (parts := _with_row(node, aten.mul.Tensor)) is not None:
        before, (weight, offset) = parts[0], _offset(parts[1])
        node = _unconverted(before)
        narrowed = before.meta["val"].dtype != wide
        if narrowed and (bias is not None or offset or before.meta["val"].dtype != narrow):
            return None
    else:
        narrowed = False
    found = _normalized(node)
    if found is None or (bias is not None and weight is None):
        return None
    x, eps, centered = found
    is_row = isinstance(x.meta["val"].shape[-1], int)
    return NormCall(x, weight, bias, Norm(eps, centered, narrowed, offset)) if is_row else None


def _normalized(node: Node) -> tuple[Node, float, bool] | None:
    """(x, eps, whether the mean is subtracted) of `(x - mean) * rsqrt(variance + eps)`, in float32."""
    factors = node.args if node.target is aten.mul.Tensor else ()
    for centred, factor in (factors, factors[::-1]) if len(factors) == 2 else ():
        if not isinstance(factor, Node) or factor.target is not aten.rsqrt.default or not isinstance(centred, Node):
            continue
        total: Any = factor.args[0]
        if total.target is not aten.add.Tensor or not isinstance(total.args[1], float):
            return None
        variance, eps = total.args
        wide = _rms_input(variance) if centred is _rms_input(variance) else _layer_input(centred, variance)
        if wide is None or wide.meta["val"].dtype != torch.float32:
            return None
        return _unconverted(wide), eps, centred is not wide
    return None


def _rms_input(mean: Node) -> Any:
    """x of `mean(x ** 2)` over the last dimension, which is kept."""
    if mean.target is not aten.mean.dim or not _over_last(mean, 1) or not operand(mean, 2):
        return None
    square: Any = mean.args[0]
    return square.args[0] if square.target is aten.pow.Tensor_Scalar and square.args[1] == 2 else None


def _layer_input(centred: Node, variance: Node) -> Any:
    """x of `x - mean` and the variance that belong together, of one `var_mean` over the last dimension."""
    source: Any = variance.args[0] if variance.target is operator.getitem and variance.args[1] == 0 else None
    if source is None or source.target is not aten.var_mean.correction or centred.target is not aten.sub.Tensor:
        return None
    x, mean = centred.args
    belongs = isinstance(mean, Node) and mean.target is operator.getitem and mean.args == (source, 1)
    options = source.kwargs
    fits = options.get("correction") == 0 and options.get("keepdim") and _over_last(source, 1)
    return x if belongs and fits and source.args[0] is x else None


def _over_last(node: Node, index: int) -> bool:
    dims, ndim = operand(node, index), node.args[0].meta["val"].dim()  # pyright: ignore
    return isinstance(dims, list | tuple) and [dim % ndim for dim in dims] == [ndim - 1]


def _with_row(node: Node, target: Any) -> tuple[Node, Node] | None:
    """The operands of a sum or product, the second of which is one row for all."""
    if node.target is not target or len(node.args) != 2 or node.kwargs:
        return None
    for value, row in (node.args, node.args[::-1]):
        if isinstance(value, Node) and isinstance(row, Node):
            size = value.meta["val"].shape[-1:]
            is_row = value.meta["val"].dim() > 1 and shapes_are_equal(row.meta["val"].shape, size)
            if is_row and _offset(row)[0].op != "call_function":
                return value, row
    return None


def _offset(row: Node) -> tuple[Node, float]:
    """(weight, number) of a row that is their sum in float32, or is the weight."""
    plain = _unconverted(row)
    if plain.target is aten.add.Tensor and isinstance(plain.args[1], int | float) and not plain.kwargs:
        weight: Any = plain.args[0]
        if plain.meta["val"].dtype == torch.float32:
            return _unconverted(weight), float(plain.args[1])
    return plain, 0.0


def _unconverted(node: Any) -> Any:
    """The value that is converted between two dtypes of floats, the wider of which is float32."""
    is_cast = node.target is _CONVERT and torch.float32 in (node.meta["val"].dtype, node.args[0].meta["val"].dtype)
    return node.args[0] if is_cast else node


def _terms(x: Node) -> tuple[Any, ...]:
    """The two terms of a sum in one dtype and shape; none if x is no such sum."""
    terms = x.args if x.target is aten.add.Tensor and not x.kwargs and len(x.args) == 2 else ()
    values: list[Any] = [term.meta.get("val") if isinstance(term, Node) else None for term in terms]
    like = x.meta["val"]
    alike = all(v is not None and v.dtype == like.dtype and shapes_are_equal(v.shape, like.shape) for v in values)
    return tuple(terms) if alike else ()
