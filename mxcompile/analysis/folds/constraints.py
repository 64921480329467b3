"""The constraint of each op: which of its operands and result must be scaled together, and which cannot be.

Every constraint is symmetric: from the labels that its operands and result have, it derives the others. An op that is
not listed, or a use that is not linear in the scaled operand, pins the factors to 1 and records the reason.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.factors import collapsed, from_shape, merged, to_shape
from mxcompile.analysis.folds.movement import MOVEMENTS, SPLITS, index_constraint, movement_constraint
from mxcompile.analysis.folds.products import (
    ATTENTION_CONSTRAINTS,
    CONVOLUTION_CONSTRAINTS,
    EMBEDDING_CONSTRAINTS,
    GROUPED_FALLBACK,
    MATMUL_CONSTRAINTS,
    NORM_CONSTRAINTS,
)
from mxcompile.analysis.folds.region import Constraint, Option, Region
from mxcompile.graph.dataflow import CASTS, SAME_VALUE, operand

aten = torch.ops.aten

_HOMOGENEOUS = frozenset(
    {
        *(aten.neg.default, aten.relu.default, aten.abs.default, aten.leaky_relu.default, aten.tril.default),
        *(aten.triu.default, aten.alpha_dropout.default),
    }
)
_SHAPE_ONLY = frozenset(
    {
        *(aten.zeros_like.default, aten.empty_like.default, aten.ones_like.default, aten.full_like.default),
        *(aten.new_zeros.default, aten.new_empty.default, aten.new_ones.default, aten.new_full.default),
    }
)
SIZE_QUERIES = frozenset(
    {
        *(aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten._assert_tensor_metadata.default),
        *(aten.sym_storage_offset.default, aten.sym_is_contiguous.default),
    }
)
_ZEROS = frozenset({aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default})
_REDUCTIONS = frozenset({aten.sum.dim_IntList, aten.mean.dim})


def constraint_of(node: Node) -> Constraint | None:
    """The constraint that a node puts on its operands and result; None for one that reads no tensor's values."""
    if node.op == "get_attr":
        return parameter_constraint
    if node.op != "call_function":
        return _refuse
    if node.target in _SHAPE_ONLY or node.target in SPLITS:
        return _created if node.target in _SHAPE_ONLY else None
    if node.target in SIZE_QUERIES or not any(map(is_tensor, (node, *node.all_input_nodes))):
        return None
    if str(node.target) == "transformers.grouped_mm_fallback.default":
        return GROUPED_FALLBACK
    return _TABLE.get(node.target, _refuse)


def tie(region: Region, out: Node, *operands: Any) -> None:
    """Elementwise with broadcasting: result and operands carry the same factors to the same power."""
    rank = len(region.sizes.shape(out))
    values = [out, *(value for value in operands if is_tensor(value))]
    labelled = [(value, labels) for value in values if (labels := region.get(value)) is not None]
    powers = {region.power[value] for value, _ in labelled}
    if len(powers) > 1:
        for _, labels in labelled:
            region.pin(out, labels, "would have to be scaled and unscaled by the same factor")
    if len(powers) != 1:
        return
    joint = from_shape(labelled[0][1], rank)
    for _, labels in labelled[1:]:
        joint = merged(region.factors, joint, from_shape(labels, rank))
    power = powers.pop()
    for value in values:
        region.assign(value, to_shape(region.factors, joint, region.sizes.shape(value)), power)


def parameter_constraint(region: Region, node: Node) -> None:
    """A parameter absorbs the factors; all its names and readers must agree."""
    labels = region.get(node)
    assert labels is not None
    name = str(node.target)
    if not region.program.is_parameter(name):
        region.pin(node, labels, f"is {name}, a buffer or constant")
        return
    tensor = region.program.stored(name)
    for other in node.graph.find_nodes(op="get_attr"):
        if other is not node and region.program.has_tensor(str(other.target)):
            twin = region.program.stored(str(other.target))
            if twin.shape == tensor.shape and twin.data_ptr() == tensor.data_ptr():
                region.assign(other, labels, region.power[node])


def _created(region: Region, node: Node) -> None:
    """Only the operand's shape is read; a result of zeros may be scaled by anything."""
    labels = region.get(node)
    if labels is not None and node.target not in _ZEROS:
        region.pin(node, labels, "is a constant")


def _refuse(region: Region, node: Node) -> None:
    ends = {"placeholder": "an input of the model", "output": "the output of the model"}
    what = ends.get(node.op, f"{node.target}, which is not linear in it")
    for value in (node, *node.all_input_nodes):
        labels = region.get(value)
        if labels is not None:
            region.pin(value, labels, f"is {what}" if value is node else f"is read by %{node.name}, {what}")


def is_tensor(value: Any) -> bool:
    """True for a node whose result is a tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def _unary(region: Region, node: Node) -> None:
    if node.meta["val"].is_floating_point():
        tie(region, node, node.args[0])
    else:
        _refuse(region, node)


def _add(region: Region, node: Node) -> None:
    one, other = node.args[:2]
    if is_tensor(one) and is_tensor(other):
        tie(region, node, one, other)
        return
    value, number = (one, other) if is_tensor(one) else (other, one)
    assert isinstance(value, Node)
    if isinstance(number, int | float) and number == 0:
        tie(region, node, value)
    elif region.get(node) is not None and _takes_offset(region, node, value, number):
        region.offsets[node] = cast(float, number)
    else:
        for scaled in (node, value):
            if (labels := region.get(scaled)) is not None:
                region.pin(scaled, labels, f"has {number} added to it in %{node.name}")


def _takes_offset(region: Region, node: Node, value: Node, number: Any) -> bool:
    """True for w + number if the parameter w can hold (w + number) / s - number without loss (float32 or wider)."""
    plain = node.target is aten.add.Tensor and not node.kwargs and isinstance(number, int | float)
    parameter = _own_parameter(region, value)
    return plain and parameter is not None and parameter.meta["val"].dtype.itemsize >= 4


def _own_parameter(region: Region, node: Node) -> Node | None:
    """The parameter that the value is, possibly cast, if it has no other reader."""
    while len(node.users) == 1 and (node.target in CASTS or node.target in SAME_VALUE):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    own = node.op == "get_attr" and len(node.users) == 1 and region.program.is_parameter(str(node.target))
    return node if own else None


def _mul(region: Region, node: Node) -> None:
    """Both operands' factors multiply; which operand takes a factor of the result is a choice."""
    one, other = node.args[:2]
    if not (isinstance(one, Node) and isinstance(other, Node) and is_tensor(one) and is_tensor(other)):
        tie(region, node, one, other)
        return
    labelled = [value for value in (node, one, other) if region.get(value) is not None]
    if one is other or len(labelled) == 3:
        for value in labelled:
            region.pin(node, region.labels[value], "multiplies two scaled values")
    elif len(labelled) == 2 and node in labelled:
        region.settled(node)
        tie(region, node, next(value for value in labelled if value is not node))
    elif len(labelled) == 2:
        region.settled(node)
        _cancel(region, node, one, other)
    elif labelled == [node]:
        region.choose(node, [_carried_by(node, value) for value in _candidates(region, node, one, other)])
    else:
        (value,) = labelled
        rest = other if value is one else one
        options = [_carried_by(node, value)]
        if _own_parameter(region, rest) is not None and math.prod(region.sizes.shape(rest)) > 1:
            options.insert(0, _cancelled(node, value, rest))
        region.choose(node, options)


def _candidates(region: Region, node: Node, *operands: Node) -> list[Node]:
    """Operands that may carry the result's factors: parameters first, without those of too small a shape."""
    shape = region.sizes.shape(node)
    labels = region.get(node)
    assert labels is not None
    varying = [dim - len(shape) for dim, size in enumerate(labels.shape) if size > 1]

    def fits(value: Node) -> bool:
        own = region.sizes.shape(value)
        return all(-dim <= len(own) and own[dim] == shape[dim] for dim in varying)

    candidates = [value for value in operands if fits(value)] or list(operands)
    return sorted(candidates, key=lambda value: _own_parameter(region, value) is None)


def _carried_by(node: Node, value: Node) -> Option:
    """Option: the result and one operand carry the same factors."""

    def option(region: Region) -> None:
        tie(region, node, value)

    return option


def _cancelled(node: Node, value: Node, other: Node) -> Option:
    """Option: the other operand undoes the factors of one."""

    def option(region: Region) -> None:
        _cancel(region, node, value, other)

    return option


def _cancel(region: Region, node: Node, one: Node, other: Node) -> None:
    """Two operands whose factors cancel in the result."""
    rank = len(region.sizes.shape(node))
    values = [value for value in (one, other) if region.get(value) is not None]
    joint = from_shape(region.labels[values[0]], rank)
    power = region.power[values[0]] * (1 if values[0] is one else -1)
    if len(values) == 2:
        joint = merged(region.factors, joint, from_shape(region.labels[other], rank))
        if region.power[other] != -power:
            region.pin(node, joint, "multiplies two scaled values")
            return
    region.assign(one, to_shape(region.factors, joint, region.sizes.shape(one)), power)
    region.assign(other, to_shape(region.factors, joint, region.sizes.shape(other)), -power)


def _div(region: Region, node: Node) -> None:
    if (labels := region.get(node.args[1])) is not None:
        region.pin(node, labels, "divides by it")
    tie(region, node, node.args[0])


def _where(region: Region, node: Node) -> None:
    if is_tensor(node.args[2]) or node.args[2] == 0:
        tie(region, node, node.args[1], node.args[2])
    else:
        _refuse(region, node)


def _masked_fill(region: Region, node: Node) -> None:
    if node.args[2] == 0:
        tie(region, node, node.args[0])
    else:
        _refuse(region, node)


def _reduce(region: Region, node: Node) -> None:
    """Sum or mean: the elements that are summed must carry one factor."""
    source, dims = node.args[0], operand(node, 1)
    assert isinstance(source, Node)
    rank = len(region.sizes.shape(source))
    dims = sorted({dim % rank for dim in dims}) if dims else list(range(rank))
    keep = bool(operand(node, 2, False))
    labels = region.get(source)
    if labels is not None:
        for dim in dims:
            labels = collapsed(region.factors, labels, dim)
        for dim in () if keep else reversed(dims):
            labels = labels.squeeze(dim)
        region.assign(node, labels, region.power[source])
    labels = region.get(node)
    if labels is not None:
        for dim in () if keep else dims:
            labels = labels.unsqueeze(dim)
        region.assign(source, labels, region.power[node])


def _cumsum(region: Region, node: Node) -> None:
    source = node.args[0]
    for value in (source, node):
        if (labels := region.get(value)) is not None and isinstance(value, Node):
            region.assign(value, collapsed(region.factors, labels, cast(int, node.args[1])), region.power[value])
    tie(region, node, source)


_TABLE: dict[Any, Constraint] = {
    **dict.fromkeys([*SAME_VALUE, *CASTS, *_HOMOGENEOUS], _unary),
    **dict.fromkeys(MOVEMENTS, movement_constraint),
    **dict.fromkeys([aten.index.Tensor, aten.index_select.default], index_constraint),
    **dict.fromkeys([aten.add.Tensor, aten.sub.Tensor], _add),
    **dict.fromkeys([aten.mul.Tensor, aten.mul.Scalar], _mul),
    **dict.fromkeys([aten.div.Tensor, aten.div.Scalar], _div),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    aten.cumsum.default: _cumsum,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    # In place, these two commute with scaling, also for all tensors that share the memory.
    **dict.fromkeys([aten.masked_fill.Scalar, aten.masked_fill_.Scalar], _masked_fill),
    aten.relu_.default: _unary,
    **MATMUL_CONSTRAINTS,
    **ATTENTION_CONSTRAINTS,
    **NORM_CONSTRAINTS,
    **CONVOLUTION_CONSTRAINTS,
    **EMBEDDING_CONSTRAINTS,
    **dict.fromkeys(_ZEROS, _created),
}
