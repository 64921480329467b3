"""Norm -> matmul groups: a norm's output, the parameters that scale its channels, and every matmul that reads it.

Found from data flow: the producer is a multiplication by a one-dimensional parameter (or one plus it, as Gemma writes
it), or a fused layer/RMS norm; the consumers are all readers through casts, views and slices that keep the channel
dimension last. A group is foldable if every consumer is a matmul whose weight nothing else reads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mxcompile.analysis.dataflow import CASTS, SAME_VALUE, destinations, operand
from mxcompile.analysis.matmuls import Matmul, find_matmuls
from mxcompile.ledger import Miss
from mxcompile.program import Program, where

aten = torch.ops.aten

_FUSED_NORMS: dict[Any, tuple[int, int | None]] = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2, None)}
_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default})
_ALONG_A_DIM = frozenset({aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.unsqueeze.default})


@dataclass(frozen=True)
class NormGroup:
    """value: the norm's output. weight, bias: names of the parameters that scale and shift its channels.

    offset: 1.0 if the norm multiplies by (1 + weight), else 0.0. consumers: all matmuls that read the value.
    """

    value: Node
    weight: str
    bias: str | None
    offset: float
    consumers: tuple[Matmul, ...]


def find_norm_groups(program: Program, wanted: Iterable[Matmul]) -> tuple[list[NormGroup], list[Miss]]:
    """The groups that hold the wanted matmuls, and a miss with its reason for every one that is in none."""
    by_node = {matmul.node: matmul for matmul in find_matmuls(program)[0]}
    groups: dict[Node, NormGroup | str] = {}
    misses: list[Miss] = []
    for matmul in wanted:
        value = _producer(matmul.activation)
        if value not in groups:
            groups[value] = _group(program, value, by_node)
        group = groups[value]
        if isinstance(group, str):
            misses.append(Miss(where(matmul.node), group))
    return [group for group in groups.values() if isinstance(group, NormGroup)], misses


def _group(program: Program, value: Node, by_node: dict[Node, Matmul]) -> NormGroup | str:
    scale = _channel_scale(program, value)
    if isinstance(scale, str):
        return scale
    weight, bias, offset = scale
    consumers: list[Matmul] = []
    for read_as, reader in _channel_readers(value):
        matmul = by_node.get(reader)
        if matmul is None or matmul.activation is not read_as or matmul.bias is read_as:
            return f"%{value.name} is also read by {reader.target} ({where(reader)}), which cannot absorb a scale"
        if matmul.is_lowered or destinations(matmul.root) != {matmul.node}:
            return f"the weight {matmul.parameter!r} of {where(reader)} is read elsewhere too"
        consumers.append(matmul)
    return NormGroup(value, weight, bias, offset, tuple(consumers))


def _producer(activation: Node) -> Node:
    """The node that made a matmul's input, behind casts, copies and channel-preserving views."""
    while activation.target in CASTS or activation.target in SAME_VALUE or _keeps_channels(activation):
        activation = activation.args[0]  # pyright: ignore[reportAssignmentType]
    return activation


def _channel_readers(value: Node) -> Iterator[tuple[Node, Node]]:
    """(value as it is read, reader) for every reader, looking through what `_producer` looks through."""
    for user in value.users:
        if user.target in SAME_VALUE or user.target in CASTS or _keeps_channels(user):
            yield from _channel_readers(user)
        else:
            yield value, user


def _keeps_channels(node: Node) -> bool:
    """True for an op that rearranges leading dimensions and leaves the last one whole and in place."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return False
    before, after = source.meta["val"], node.meta["val"]
    if node.target in _RESHAPES:
        return bool(before.shape[-1] == after.shape[-1])
    if node.target in _ALONG_A_DIM:
        dim = operand(node, 1) % (before.dim() + (node.target is aten.unsqueeze.default))
        return dim != (after.dim() - 1 if node.target is aten.unsqueeze.default else before.dim() - 1)
    return False


def _channel_scale(program: Program, value: Node) -> tuple[str, str | None, float] | str:
    """(weight, bias, offset) of the norm that makes the value, or why it is none."""
    if value.target in _FUSED_NORMS:
        weight_at, bias_at = _FUSED_NORMS[value.target]
        weight = operand(value, weight_at)
        bias = None if bias_at is None else operand(value, bias_at)
        if not isinstance(weight, Node) or len(operand(value, 1)) != 1:
            return f"%{value.name} is a norm without a per-channel weight"
        parameters = [n for n in (weight, bias) if isinstance(n, Node)]
        if not all(_own_parameter(program, n, value) for n in parameters):
            return f"the parameters of %{value.name} are read elsewhere too"
        return str(weight.target), str(bias.target) if isinstance(bias, Node) else None, 0.0
    if value.target is aten.mul.Tensor:
        for factor in value.args:
            scale = _as_weight(program, factor, value) if isinstance(factor, Node) else None
            if scale is not None:
                return scale[0], None, scale[1]
    made_by = value.target if value.op == "call_function" else value.op
    return f"its input %{value.name} comes from {made_by}, not from a norm with a weight"


def _as_weight(program: Program, factor: Node, reader: Node) -> tuple[str, float] | None:
    """(parameter, offset) if the factor is a one-dimensional parameter, or one plus it, that only `reader` uses."""
    offset, channels = 0.0, reader.meta["val"].shape[-1]
    while factor.op != "get_attr":
        if len(factor.users) > 1:
            return None
        if factor.target is aten.add.Tensor and offset == 0.0 and factor.args[1] == 1.0 and not factor.kwargs:
            offset = 1.0
        elif factor.target not in CASTS and factor.target not in SAME_VALUE:
            return None
        factor, reader = factor.args[0], factor  # pyright: ignore[reportAssignmentType]
    shape = factor.meta["val"].shape
    fits = tuple(shape) == (channels,) and _own_parameter(program, factor, reader)
    return (str(factor.target), offset) if fits else None


def _own_parameter(program: Program, node: Node, reader: Node) -> bool:
    return node.op == "get_attr" and program.is_parameter(str(node.target)) and set(node.users) == {reader}
