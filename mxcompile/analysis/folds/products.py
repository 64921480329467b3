"""Constraints of matmuls, attention, norms, convolutions and embeddings.

A matmul out = a @ w is linear in both operands. A factor on a's inner dimension k must be undone on w's, and a factor
on out's channels n must come from w's.
"""

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.factors import collapsed, merged, to_shape
from mxcompile.analysis.folds.region import Constraint, Region
from mxcompile.graph.dataflow import operand

aten = torch.ops.aten
ChannelAxis = tuple[Any, int, int]
"""(value, dimension, sign): one of the values whose channels carry the same factors; sign: of the power."""


def _matmul(
    region: Region, node: Node, a: int, w: int, k: int, n: int, bias: int | None = None, grouped: bool = False
) -> None:
    left, right = operand(node, a), operand(node, w)
    rank = len(region.sizes.shape(right))
    if rank < 2 or len(region.sizes.shape(left)) < 1:
        _pin_all(region, node, "multiplies by a vector")
        return
    batch = 0 if grouped or rank == 2 else len(region.sizes.shape(node)) - 2
    _contract(region, node, (left, -1), (right, k, n), (node, -1), batch)
    added = None if bias is None else operand(node, bias)
    if isinstance(added, Node):
        _added(region, node, added)


def _contract(
    region: Region, node: Node, left: tuple[Node, int], right: tuple[Node, int, int], out: tuple[Node, int], batch: int
) -> None:
    """left[k] right[k, n] -> out[n], with factors of their own along `batch` leading dimensions."""
    weight, k, n = right
    labels = region.get(weight)
    inner: list[ChannelAxis] = [(*left, 1), (weight, k, -1)]
    outer: list[ChannelAxis] = [(*out, 1), (weight, n, 1)]
    scaled = [axes for axes in (inner, outer) if region.is_scaled(axes[0][0])]
    if labels is None or not region.free_factors(labels):
        kept = scaled[:1]
    elif (labels.shape[k] > 1) == (labels.shape[n] > 1):
        kept = []
        region.pin(weight, labels, "would have to be scaled along both dimensions of a product")
    else:
        kept = [inner if labels.shape[k] > 1 else outer]
    for axes in scaled:
        if axes not in kept:
            own = region.labels[axes[0][0]]
            region.pin(node, own, f"multiplies it by %{weight.name}, which is scaled along its other dimension too")
    for axes in kept:
        relate(region, node, axes, batch)


def relate(region: Region, node: Node, axes: list[ChannelAxis], batch: int = 0) -> None:
    """The channels along these axes carry the same factors, each to the power of the axis's sign."""
    joint: Tensor | None = None
    labelled = [(value, dim, sign, labels) for value, dim, sign in axes if (labels := region.get(value)) is not None]
    powers = {region.power[value] * sign for value, _, sign, _ in labelled}
    if len(powers) > 1:
        for _, _, _, labels in labelled:
            region.pin(node, labels, "multiplies two scaled values")
        return
    power = powers.pop() if powers else 0
    for _, dim, _, labels in labelled:
        frame = channels_of(region, labels, dim, batch)
        joint = frame if joint is None else merged(region.factors, joint, frame)
    for value, dim, sign in axes if joint is not None else ():
        assert joint is not None
        region.assign(value, from_channels(region, joint, region.sizes.shape(value), dim, batch), power * sign)


def channels_of(region: Region, labels: Tensor, dim: int, batch: int) -> Tensor:
    """Labels as `[channels]`, or `[..., channels]` with the batch dimensions in front."""
    rank = labels.dim()
    dim %= rank
    if batch:
        other = rank - 1 if dim == rank - 2 else rank - 2
        return collapsed(region.factors, labels, other).squeeze(other)
    for axis in range(rank):
        labels = labels if axis == dim else collapsed(region.factors, labels, axis)
    return labels.reshape(-1)


def from_channels(region: Region, channels: Tensor, shape: tuple[int, ...], dim: int, batch: int) -> Tensor:
    """The labels of a value of that shape whose channels along `dim` have these; `channels_of` undone."""
    rank = len(shape)
    dim %= rank
    if batch:
        other = rank - 1 if dim == rank - 2 else rank - 2
        kept = tuple(size for axis, size in enumerate(shape) if axis != other)
        channels = to_shape(region.factors, channels, kept)
        return channels.expand(*channels.shape[:-1], kept[-1]).unsqueeze(other)
    return channels.expand(shape[dim]).reshape([shape[dim] if axis == dim else 1 for axis in range(rank)])


def _added(region: Region, node: Node, bias: Node) -> None:
    """A bias, broadcast against the result."""
    labels, own = region.get(node), region.get(bias)
    if labels is not None:
        region.assign(bias, to_shape(region.factors, labels, region.sizes.shape(bias)), region.power[node])
    elif own is not None:
        rank = len(region.sizes.shape(node))
        region.assign(node, own.reshape((1,) * (rank - own.dim()) + tuple(own.shape)), region.power[bias])


def _pin_all(region: Region, node: Node, reason: str) -> None:
    for value in (node, *node.all_input_nodes):
        if (labels := region.get(value)) is not None:
            region.pin(node, labels, reason)


def attention(region: Region, node: Node) -> None:
    """A head's result is a weighted sum of its values over tokens: channel d of v is channel d of the result."""
    value = node.args[2]
    assert isinstance(value, Node)
    for score in node.all_input_nodes:
        if (labels := region.get(score)) is not None and (score is not value or score in node.args[:2]):
            region.pin(node, labels, "computes attention scores from it")
    heads, own_heads = region.sizes.shape(node)[-3:-2], region.sizes.shape(value)[-3:-2]
    shared = heads[0] // own_heads[0] if heads else 1
    labels = region.get(value)
    if labels is not None:
        frame = collapsed(region.factors, labels, -2)
        if shared > 1 and frame.shape[-3] > 1:
            frame = frame.repeat_interleave(shared, -3)
        region.assign(node, frame, region.power[value])
    labels = region.get(node)
    if labels is not None:
        frame = collapsed(region.factors, labels, -2)
        if shared > 1 and frame.shape[-3] > 1:
            frame = collapsed(region.factors, frame.unflatten(-3, (-1, shared)), -3).squeeze(-3)
        region.assign(value, frame, region.power[node])


def _norm(region: Region, node: Node, bias_at: int | None) -> None:
    """norm(x) * weight + bias: the parameters scale the channels of the result, x cannot be scaled."""
    source, shape, weight = node.args[0], node.args[1], operand(node, 2)
    bias = None if bias_at is None else operand(node, bias_at)
    if (labels := region.get(source)) is not None:
        region.pin(node, labels, "normalizes it")
    if not isinstance(weight, Node) or len(shape) != 1:  # pyright: ignore[reportArgumentType]
        if (labels := region.get(node)) is not None:
            region.pin(node, labels, "is a norm without a weight per channel")
        return
    axes = [(value, -1, 1) for value in (node, weight, bias) if isinstance(value, Node)]
    relate(region, node, axes)


def _convolution(region: Region, node: Node) -> None:
    source, weight, bias = node.args[0], node.args[1], operand(node, 2)
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    groups = operand(node, 6, 1)
    shape = region.sizes.shape(source)
    if len(shape) != len(region.sizes.shape(weight)):
        _pin_all(region, node, "is a convolution without a batch dimension")
    elif groups == 1:
        _contract(region, node, (source, 1), (weight, 1, 0), (node, 1), 0)
    elif groups == shape[1] == region.sizes.shape(node)[1]:
        _depthwise(region, node, source, weight)
    else:
        _pin_all(region, node, "is a convolution in groups")
    if isinstance(bias, Node):
        relate(region, node, [(node, 1, 1), (bias, 0, 1)])


def _depthwise(region: Region, node: Node, source: Node, weight: Node) -> None:
    """Channel by channel: the weight absorbs the result's factors, or undoes the input's."""
    if region.is_scaled(node) == region.is_scaled(source):
        _pin_all(region, node, "is a depthwise convolution of scaled values")
    elif region.is_scaled(node):
        relate(region, node, [(node, 1, 1), (weight, 0, 1)])
    else:
        relate(region, node, [(source, 1, 1), (weight, 0, -1)])


def _embedding(region: Region, node: Node) -> None:
    relate(region, node, [(node, -1, 1), (node.args[0], -1, 1)])


_TWO_OPERANDS = {"a": 0, "w": 1, "k": -2, "n": -1}
_WITH_BIAS = {"a": 1, "w": 2, "k": -2, "n": -1, "bias": 0}
MATMUL_OPERANDS: Final[dict[Any, dict[str, int]]] = {
    aten.linear.default: {"a": 0, "w": 1, "k": -1, "n": -2, "bias": 2},
    **dict.fromkeys([aten.mm.default, aten.bmm.default, aten.matmul.default], _TWO_OPERANDS),
    **dict.fromkeys([aten.addmm.default, aten.baddbmm.default], _WITH_BIAS),
    aten._grouped_mm.default: _TWO_OPERANDS | {"grouped": True},
}
"""Of each op that multiplies: the positions of its operands, and the right one's dimensions k and n."""
GROUPED_OPERANDS: Final = _TWO_OPERANDS | {"grouped": True}
"""For `transformers.grouped_mm_fallback`, an op that exists only once transformers has been imported."""
MATMUL_CONSTRAINTS: Final[dict[Any, Constraint]] = {
    target: partial(_matmul, **operands) for target, operands in MATMUL_OPERANDS.items()
}
GROUPED_FALLBACK: Final[Constraint] = partial(_matmul, **GROUPED_OPERANDS)
ATTENTION_CONSTRAINTS: Final[dict[Any, Constraint]] = {aten.scaled_dot_product_attention.default: attention}
NORM_CONSTRAINTS: Final[dict[Any, Constraint]] = {
    aten.layer_norm.default: partial(_norm, bias_at=3),
    aten.rms_norm.default: partial(_norm, bias_at=None),
}
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
CONVOLUTION_CONSTRAINTS: Final[dict[Any, Constraint]] = dict.fromkeys(_CONVOLUTIONS, _convolution)
EMBEDDING_CONSTRAINTS: Final[dict[Any, Constraint]] = {aten.embedding.default: _embedding}
