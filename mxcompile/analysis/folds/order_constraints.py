"""The constraint of each op on the order of channels: what must be reordered together, and which channels kept apart.

More goes through than for factors: an elementwise op, whatever it computes, a residual sum, a norm over all channels
and a softmax give the same numbers in another order. An op that is not listed fixes the channels, with the reason.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.constraints import SIZE_QUERIES, is_tensor, parameter_constraint
from mxcompile.analysis.folds.factors import collapsed, from_shape, merged, to_shape
from mxcompile.analysis.folds.movement import MOVEMENTS, SPLITS, index_constraint, movement_constraint
from mxcompile.analysis.folds.order_region import CONVOLUTIONS, End, OrderRegion
from mxcompile.analysis.folds.products import GROUPED_OPERANDS, MATMUL_OPERANDS, attention
from mxcompile.analysis.folds.region import Constraint
from mxcompile.graph.dataflow import CASTS, SAME_VALUE, operand

aten = torch.ops.aten

_UNIFORM: Final = frozenset(
    {
        *(aten.zeros_like.default, aten.empty_like.default, aten.ones_like.default, aten.full_like.default),
        *(aten.new_zeros.default, aten.new_empty.default, aten.new_ones.default, aten.new_full.default),
        *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
    }
)
"""All elements of the result are equal, or random memory that nothing reads."""
_ELEMENTWISE: Final = frozenset(
    {
        *(*SAME_VALUE, *CASTS, aten.where.ScalarOther, aten.where.ScalarSelf, aten.hardswish.default),
        *(aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor, aten.copy_.default),
    }
)
"""Elementwise ops that torch does not tag as such."""
_SOFTMAXES: Final = frozenset(
    {aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default}
)
_REDUCTIONS: Final = frozenset(
    {
        *(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.any.dim, aten.all.dim),
        *(aten.var.correction, aten.std.correction, aten.linalg_vector_norm.default),
    }
)
_DIMS_AT: Final[dict[Any, int]] = {aten.linalg_vector_norm.default: 2}
_KEEPS_AT: Final[dict[Any, int]] = dict.fromkeys(
    [aten.linalg_vector_norm.default, aten.var.correction, aten.std.correction], 3
)


MOVES: Final = MOVEMENTS | {aten.broadcast_to.default}
"""Ops that only move elements."""


def order_constraint_of(node: Node) -> Constraint | None:
    """The constraint that a node puts on the order of channels; None for one that reads no tensor's values."""
    if node.op == "get_attr":
        return parameter_constraint
    if node.target in SPLITS | SIZE_QUERIES | _UNIFORM or not any(map(is_tensor, (node, *node.all_input_nodes))):
        return None if node.op == "call_function" else _fix
    if str(node.target) == "transformers.grouped_mm_fallback.default":
        return _GROUPED_FALLBACK
    tags = getattr(node.target, "tags", ())
    is_elementwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    is_elementwise |= node.target in _ELEMENTWISE
    return _TABLE.get(node.target, _elementwise if is_elementwise else _fix)


def _fix(region: OrderRegion, node: Node) -> None:
    ends = {"placeholder": "an input of the model", "output": "the output of the model"}
    what = ends.get(node.op, f"{node.target}, which may depend on the order of channels")
    for value in (node, *node.all_input_nodes):
        if (labels := region.get(value)) is not None:
            region.pin(value, labels, f"is {what}" if value is node else f"is read by %{node.name}, {what}")


def _elementwise(region: OrderRegion, node: Node) -> None:
    """Result and operands have the same order; an operand with one value for all channels has none."""
    operands = [operand(node, 0)] if node.target in CASTS else node.all_input_nodes  # type_as reads no second value
    _tie(region, node, [value for value in operands if is_tensor(value)])


def _tie(region: OrderRegion, node: Node, operands: Sequence[Node]) -> None:
    rank, joint = len(region.sizes.shape(node)), None
    for value in (node, *operands):
        if (labels := region.get(value)) is not None:
            own = from_shape(labels, rank)
            joint = own if joint is None else merged(region.factors, joint, own)
    if joint is None:
        return
    varying = _varying(joint)
    for slot, value in enumerate((node, *operands)):
        shape = region.sizes.shape(value)
        padded = (1,) * (rank - len(shape)) + shape
        if varying and padded[varying[-1]] == 1:
            region.keep_apart(node, joint, varying[:-1], slot)
        else:
            region.assign(value, to_shape(region.factors, joint, shape), 1)


def _varying(labels: Tensor) -> list[int]:
    """The dimensions along which labels differ; the last one is that of the channels."""
    return [dim for dim, size in enumerate(labels.shape) if size > 1]


def _taken_together(region: OrderRegion, node: Node, source: Node, dims: Sequence[int], slot: int = 0) -> None:
    """An op that treats the elements along these dimensions alike, for each index along the others."""
    labels = region.get(source)
    if labels is not None and any(labels.shape[dim] > 1 for dim in dims):
        region.keep_apart(node, labels, [dim for dim in _varying(labels) if dim not in dims], slot)


def _softmax(region: OrderRegion, node: Node) -> None:
    source, dim = node.args[0], operand(node, 1)
    assert isinstance(source, Node)
    _tie(region, node, [source])
    _taken_together(region, node, source, [dim % len(region.sizes.shape(source))])


def _norm(region: OrderRegion, node: Node, bias_at: int | None) -> None:
    source, shape = node.args[0], operand(node, 1)
    assert isinstance(source, Node)
    parameters = (operand(node, 2), None if bias_at is None else operand(node, bias_at))
    _tie(region, node, [source, *(value for value in parameters if isinstance(value, Node))])
    rank = len(region.sizes.shape(source))
    _taken_together(region, node, source, range(rank - len(shape), rank), slot=-1)


def _reduce(region: OrderRegion, node: Node) -> None:
    """A sum, mean or maximum over all channels does not depend on their order; over others, it keeps it."""
    source, dims = node.args[0], operand(node, _DIMS_AT.get(node.target, 1))
    assert isinstance(source, Node)
    rank = len(region.sizes.shape(source))
    dims = [dims] if isinstance(dims, int) else dims
    dims = sorted({dim % rank for dim in dims}) if dims else list(range(rank))
    keep = bool(operand(node, _KEEPS_AT.get(node.target, 2), False))
    labels = region.get(source)
    if labels is not None:
        varying = _varying(labels)
        if varying and varying[-1] in dims:
            region.keep_apart(node, labels, [dim for dim in varying if dim not in dims])
        else:
            for dim in dims:
                labels = collapsed(region.factors, labels, dim)
            for dim in () if keep else reversed(dims):
                labels = labels.squeeze(dim)
            region.assign(node, labels, 1)
    labels = region.get(node)
    if labels is not None:
        for dim in () if keep else dims:
            labels = labels.unsqueeze(dim)
        region.assign(source, labels, 1)


def _along(region: OrderRegion, node: Node) -> None:
    """A cumulative sum along a dimension other than that of the channels."""
    source, dim = node.args[0], operand(node, 1)
    assert isinstance(source, Node)
    for value in (source, node):
        if (labels := region.get(value)) is not None and labels.shape[dim] > 1:
            region.pin(node, labels, "accumulates along its channels")
    _tie(region, node, [source])


def _same_channels(region: OrderRegion, node: Node, slot: int, ends: Sequence[End], batch: int = 0) -> None:
    """The channels along these dimensions have one order, for each index along the batch dimensions its own."""
    joint: Tensor | None = None
    for end in ends:
        if (channels := region.channels(end, batch)) is not None:
            joint = channels if joint is None else merged(region.factors, joint, channels)
    if joint is None:
        return
    region.keep_apart(node, joint, [dim for dim in _varying(joint) if dim != joint.dim() - 1], slot)
    for end in ends:
        region.set_channels(end, joint, batch)


def _matmul(
    region: OrderRegion, node: Node, a: int, w: int, k: int, n: int, bias: int | None = None, grouped: bool = False
) -> None:
    left, right = operand(node, a), operand(node, w)
    rank = len(region.sizes.shape(right))
    if rank < 2 or len(region.sizes.shape(left)) < 1:
        _fix(region, node)
        return
    batch = 0 if grouped or rank == 2 else len(region.sizes.shape(node)) - 2
    _contract(region, node, (left, -1), (right, k), (right, n), (node, -1), batch)
    added = None if bias is None else operand(node, bias)
    if isinstance(added, Node):
        _tie(region, node, [added])


def _contract(region: OrderRegion, node: Node, left: End, inner: End, outer: End, out: End, batch: int) -> None:
    """left[k] matrix[k, n] -> out[n]."""
    reads, writes = region.is_scaled(left[0]), region.is_scaled(out[0])
    if not region.is_matrix(inner[0]):
        labels = region.get(inner[0])
        reads |= labels is not None and labels.shape[inner[1]] > 1
        writes |= labels is not None and labels.shape[outer[1]] > 1
        if reads and writes:
            for value in (inner[0], left[0], out[0]):
                if (own := region.get(value)) is not None:
                    region.pin(node, own, f"would have to be ordered along both dimensions of %{inner[0].name}")
            return
    if reads or region.is_matrix(inner[0]):
        _same_channels(region, node, -1, (left, inner), batch)
    if writes or region.is_matrix(inner[0]):
        _same_channels(region, node, -2, (out, outer), batch)


def _attention(region: OrderRegion, node: Node) -> None:
    """Channels of a head change places inside it, for all heads that share a key and value head alike."""
    attention(region, node)
    if (labels := region.get(node)) is not None:
        region.keep_apart(node, labels, [dim for dim in _varying(labels) if dim != labels.dim() - 1])


def _embedding(region: OrderRegion, node: Node) -> None:
    table = node.args[0]
    assert isinstance(table, Node)
    _same_channels(region, node, -1, ((table, -1), (node, -1)))


def _convolution(region: OrderRegion, node: Node) -> None:
    source, weight, bias = node.args[0], node.args[1], operand(node, 2)
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    groups, channels = operand(node, 6, 1), region.sizes.shape(source)[1:2]
    if len(region.sizes.shape(source)) != len(region.sizes.shape(weight)):
        _fix(region, node)
    elif groups == 1:
        _contract(region, node, (source, 1), (weight, 1), (weight, 0), (node, 1), 0)
    elif channels == (groups,) == region.sizes.shape(node)[1:2]:
        _same_channels(region, node, -1, ((source, 1), (weight, 0), (node, 1)))
    else:
        _fix(region, node)
    if isinstance(bias, Node):
        _same_channels(region, node, -3, ((node, 1), (bias, 0)))


def _add_rows(region: OrderRegion, node: Node) -> None:
    """index_add along a dimension other than that of the channels: result, target and rows have one order."""
    target, dim, rows = node.args[0], int(operand(node, 1)), operand(node, 3)  # pyright: ignore[reportArgumentType]
    joint: Tensor | None = None
    values = [value for value in (node, target, rows) if isinstance(value, Node)]
    for value in values:
        if (labels := region.get(value)) is not None:
            own = collapsed(region.factors, labels, dim)
            joint = own if joint is None else merged(region.factors, joint, own)
    for value in values if joint is not None else ():
        assert joint is not None
        region.assign(value, joint, 1)


_MATMUL: Final = partial(partial, _matmul)
_GROUPED_FALLBACK: Final[Constraint] = _MATMUL(**GROUPED_OPERANDS)
_TABLE: Final[dict[Any, Constraint]] = {
    **dict.fromkeys(MOVES, movement_constraint),
    **dict.fromkeys([aten.index.Tensor, aten.index_select.default], index_constraint),
    **dict.fromkeys(_SOFTMAXES, _softmax),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **{target: _MATMUL(**operands) for target, operands in MATMUL_OPERANDS.items()},
    aten.scaled_dot_product_attention.default: _attention,
    aten.layer_norm.default: partial(_norm, bias_at=3),
    aten.rms_norm.default: partial(_norm, bias_at=None),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    aten.embedding.default: _embedding,
    aten.cumsum.default: _along,
    **dict.fromkeys([aten.index_add.default, aten.index_add_.default], _add_rows),
}
