"""attention(q, repeat(dequantize(k, ...)), repeat(dequantize(v, ...)), mask) with few queries, on a GPU ->
mx::attend_packed(q, k, ..., v, ..., mask).

A decode step with an MXCache: the kernel reads packed bytes, one exponent for a block, and decodes them in registers. A
cache that rotates keys has `rotate(dequantize(k))`; a rotation of the query gives the same scores. Where the newest or
the first tokens are exact, keys and values are `mx::read_cache`, and the result `mx::attend_packed_exact`.
"""

import math
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from mxcompile.formats import parse_format
from mxcompile.graph.edit import create_call
from mxcompile.inductor.rewrites.decompose_attention import erase_unread, replace_output
from mxcompile.inductor.rewrites.fuse_attention import (
    ATTENTIONS,
    fits,
    shape_of,
    single_query_operands,
    unexpanded,
    unrepeated,
)
from mxcompile.kernels.dispatch import why_no_packed_attention
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops import ATTEND_PACKED, ATTEND_PACKED_EXACT, DEQUANTIZE, READ_CACHE, ROTATE
from mxcompile.ops.exact_tokens import factor_of

aten = torch.ops.aten
_FACTORS: Final = (1, 2)


def fuse_packed_attention(graph: Graph) -> int:
    """Fuse all single-token attention over packed keys and values, in place. Returns the number of rewrites."""
    nodes = [node for target in ATTENTIONS for node in graph.find_nodes(op="call_function", target=target)]
    return sum(_rewrite(graph, node) for node in nodes)


def _rewrite(graph: Graph, node: Node) -> bool:
    if (operands := single_query_operands(node)) is None:
        return False
    (query, key, value), bias, scale = operands
    mask = unexpanded(bias)
    key, value = unrepeated(key), unrepeated(value)
    if READ_CACHE in (key.target, value.target):
        return _rewrite_exact(graph, node, (query, key, value, mask), scale)
    rotation, key = unrotated(key)
    if not is_packed(key) or not is_packed(value):
        return False
    values: list[Any] = [None if part is None else part.meta["val"] for part in (query, key, value, mask)]
    if not fits(*values) or why_no_packed_attention(values[0], _states(key), _states(value), values[3]) is not None:
        return False
    _insert(graph, node, query, key, value, mask, scale, rotation)
    return True


def _insert(
    graph: Graph, node: Node, query: Node, key: Any, value: Any, mask: Any, scale: Any, rotation: tuple[int, int]
) -> None:
    with graph.inserting_before(node):
        scale = 1 / math.sqrt(shape_of(query)[3]) if scale is None else scale
        block, factor = rotation
        if block > 1:
            query, scale = create_call(graph, ROTATE, query, block), scale * factor
        parts = (query, *key.args[:2], *value.args[:2], mask, scale, key.args[2], value.args[2], value.args[3])
        result = create_call(graph, ATTEND_PACKED, *parts, name=f"{node.name}_packed")
    _replace(graph, node, query, result)


def _replace(graph: Graph, node: Node, query: Node, result: Node) -> None:
    sources = [part for part in node.all_input_nodes if part is not query]
    replace_output(graph, node, result)
    for source in sources:
        erase_unread(graph, source)


def _rewrite_exact(graph: Graph, node: Node, operands: tuple[Any, Any, Any, Any], scale: Any) -> bool:
    query, key, value, mask = operands
    values: list[Any] = [None if part is None else part.meta["val"] for part in operands]
    # What one layer of a cache has read: both have the same places, position and window.
    if key.target is not value.target or key.args[5:7] != value.args[5:7] or key.args[9] != value.args[9]:
        return False
    states = [
        PackedStates(elements.meta["val"], scales.meta["val"], parse_format(read.args[7]), shape_of(read)[3])
        for read in (key, value)
        for elements, scales in [read.args[:2]]
    ]
    if (
        value.args[8] > 1
        or not fits(*values)
        or why_no_packed_attention(values[0], states[0], states[1], values[3]) is not None
    ):
        return False
    with graph.inserting_before(node):
        scale = 1 / math.sqrt(shape_of(query)[3]) if scale is None else scale
        turned, block = query, key.args[8]
        if block > 1:
            turned = create_call(graph, ROTATE, query, block)
            turned = create_call(graph, aten.mul.Tensor, turned, 2) if factor_of(block) > 1 else turned
        packed = (*key.args[:2], *value.args[:2])
        exact = [part for pair in zip(key.args[2:5], value.args[2:5], strict=True) for part in pair]
        parts = (query, turned, *packed, *exact, *key.args[5:7], mask, scale, key.args[7], value.args[7], key.args[9])
        result = create_call(graph, ATTEND_PACKED_EXACT, *parts, name=f"{node.name}_packed")
    _replace(graph, node, query, result)
    return True


def is_packed(node: Node) -> bool:
    """Whether a node decodes keys or values of a cache."""
    return node.target is DEQUANTIZE and len(node.args) == 5 and not node.kwargs and node.meta["val"].dim() == 4


def _states(node: Node) -> PackedStates:
    """The packed states of a `mx::dequantize`."""
    elements, scales, fmt, size = node.args[:4]
    return PackedStates(elements.meta["val"], scales.meta["val"], parse_format(str(fmt)), size)  # pyright: ignore


def unrotated(key: Any) -> tuple[tuple[int, int], Node]:
    """Block and factor of `rotate(x, block) * factor`, and x; a block of 1 and the key itself if it is not rotated."""
    factor, rotated = 1, key
    if key.target is aten.mul.Tensor and key.args[1] in _FACTORS:
        factor, rotated = key.args[1], key.args[0]
    if rotated.target is not ROTATE:
        return (1, 1), key
    return (rotated.args[1], factor), rotated.args[0]
