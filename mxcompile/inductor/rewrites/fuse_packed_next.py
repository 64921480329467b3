"""cache[place] = quantize(rope(k)), quantize(v); round(attend_packed(rope(q), cache)) -> mx::attend_packed_next.

The step of one token in a static cache of packed keys and values, on a GPU in one launch: it rotates query and key
(RoPE on halves), rounds key and value, writes their bytes and scales, attends, and rounds its result for the matmul
after it. What a model does otherwise is left out, as in `fuse_next_token.py`: the operator also writes where the graph
has functional writes and copies their results back at the end.
"""

import operator
from typing import Any

from torch.fx import Graph, Node

from mxcompile.formats import ScaleRule, parse_format, parse_scale_rule
from mxcompile.graph.dataflow import shapes_are_equal
from mxcompile.graph.edit import create_call
from mxcompile.inductor.rewrites.decompose_attention import erase_unread
from mxcompile.inductor.rewrites.fuse_next_token import Write, position_of, rotation_of, rounding_behind, write_of
from mxcompile.kernels.dispatch import why_no_packed_attention
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops import ATTEND_PACKED, ATTEND_PACKED_NEXT, QUANTIZE


def fuse_packed_next(graph: Graph) -> int:
    """Fuse `mx::attend_packed` with the writes to its cache, in place. Returns the number of rewrites."""
    return sum(_rewrite(graph, node) for node in graph.find_nodes(op="call_function", target=ATTEND_PACKED))


def _rewrite(graph: Graph, node: Node) -> bool:
    args: Any = node.args
    query, states, (mask, scale, *formats, size) = args[0], args[1:5], args[5:]
    writes = [write for part in states if (write := write_of(part, node)) is not None]
    if len(writes) < len(states) or any(write.position is not writes[0].position for write in writes):
        return False
    key, value = _quantized(writes[0], writes[1], formats[0]), _quantized(writes[2], writes[3], formats[1])
    if key is None or value is None or not _fits(query, key, value, size, writes):
        return False
    operands = [part and part.meta["val"] for part in (query, *states, mask)]

    def why_not(rounding: Any) -> str | None:
        keys = PackedStates(operands[1], operands[2], parse_format(formats[0]), operands[0].shape[3])
        values = PackedStates(operands[3], operands[4], parse_format(formats[1]), size)
        return why_no_packed_attention(operands[0], keys, values, operands[5], rounding)

    unrotated: Any = key.args[0]
    turned, new_key, rotation = rotation_of(query, unrotated)
    rounding, roundings = rounding_behind(node, size, why_not)
    rules = (formats[0], key.args[2], formats[1], value.args[2])
    with graph.inserting_before(node):
        position = position_of(writes[0].position)
        parts = (turned, new_key, value.args[0], *(write.cache for write in writes), position, *rotation)
        result = create_call(
            graph, ATTEND_PACKED_NEXT, *parts, mask, scale, *rules, *rounding, name=f"{node.name}_next"
        )
    for rounded in roundings:
        rounded.replace_all_uses_with(rounded.all_input_nodes[0])
        graph.erase_node(rounded)
    node.replace_all_uses_with(result)
    for write in writes:
        graph.erase_node(write.copied)
    erase_unread(graph, node)
    return True


def _quantized(elements: Write, scales: Write, fmt: str) -> Node | None:
    """The one rounding whose elements and scales are written; None if they come from elsewhere."""
    sources = [write.value.args for write in (elements, scales) if write.value.target is operator.getitem]
    if len(sources) < 2 or sources[0][0] is not sources[1][0] or [index for _, index in sources] != [0, 1]:
        return None
    rounded: Any = sources[0][0]
    known = isinstance(rounded, Node) and rounded.target is QUANTIZE and rounded.args[1] == fmt
    return rounded if known and parse_scale_rule(str(rounded.args[2])) is not ScaleRule.MSE else None


def _fits(query: Node, key: Node, value: Node, size: int, writes: list[Write]) -> bool:
    """Whether one token of the query's dtype is written to caches that are contiguous."""
    for rounded, width, write in ((key, query.meta["val"].shape[3], writes[0]), (value, size, writes[2])):
        new: Any = rounded.args[0].meta["val"]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue, reportUnknownMemberType]
        batch, kv_heads = write.cache.meta["val"].shape[:2]
        if new.dtype != query.meta["val"].dtype or not shapes_are_equal(new.shape, (batch, kv_heads, 1, width)):
            return False
    return all(write.cache.meta["val"].is_contiguous() for write in writes)
