"""keys[place] = rope(k); values[place] = v; round(attend(rope(q), keys, values)) -> mx::attend_next, on a GPU.

The step of one token in a static cache: the kernel of attention rotates queries and keys (RoPE on halves), writes to
the cache, and rounds its result for the matmul after it. Otherwise these are six kernels. What a model does otherwise
is left out: rotated already, or rounded later, or a cache that is written in another way (`mx::attend`).

The operator writes to the cache where the graph has a functional `index_put` and copies its result back at the end:
nothing else may read the cache in between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from mxcompile.formats import MXFormat, ScaleRule, parse_format, parse_scale_rule
from mxcompile.graph.dataflow import operand, shapes_are_equal
from mxcompile.graph.edit import create_call
from mxcompile.inductor.rewrites.decompose_attention import erase_unread
from mxcompile.kernels.dispatch import why_no_attention
from mxcompile.ops import ATTEND, ATTEND_NEXT, QUANTIZE_DEQUANTIZE

aten = torch.ops.aten
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default})
_IOTA = torch.ops.prims.iota.default


@dataclass(frozen=True)
class Write:
    """`cache[:, :, position] = value`: the functional write, and the node that copies its result to the cache."""

    cache: Node
    position: Node
    value: Node
    written: Node
    copied: Node


def fuse_next_token(graph: Graph) -> int:
    """Fuse `mx::attend` with the writes to its cache, in place. Returns the number of rewrites."""
    return sum(_rewrite(graph, node) for node in graph.find_nodes(op="call_function", target=ATTEND))


def _rewrite(graph: Graph, node: Node) -> bool:
    args: Any = node.args
    query, keys, values, mask, scale = args
    key_write, value_write = write_of(keys, node), write_of(values, node)
    if key_write is None or value_write is None or key_write.position is not value_write.position:
        return False
    if not _fits(query, key_write, value_write):
        return False
    query, key, rotation = rotation_of(query, key_write.value)
    operands: Any = [part and part.meta["val"] for part in (query, keys, values, mask)]

    def why_not(rounding: tuple[MXFormat, ScaleRule]) -> str | None:
        return why_no_attention(operands[0], operands[1], operands[2], operands[3], rounding)

    rounding, roundings = rounding_behind(node, operands[2].shape[3], why_not)
    with graph.inserting_before(node):
        position = position_of(key_write.position)
        args = (query, key, value_write.value, key_write.cache, value_write.cache, position, *rotation)
        result = create_call(graph, ATTEND_NEXT, *args, mask, scale, *rounding, name=f"{node.name}_next")
    for rounded in roundings:
        rounded.replace_all_uses_with(rounded.all_input_nodes[0])
        graph.erase_node(rounded)
    node.replace_all_uses_with(result)
    for write in (key_write, value_write):
        graph.erase_node(write.copied)
    erase_unread(graph, node)
    return True


def write_of(part: Any, reader: Node) -> Write | None:
    """The write of one token to a cache that only `reader` reads, if that is what a node is."""
    if part.target is not aten.index_put.default or operand(part, 3):
        return None
    cache, indices, value = part.args[:3]
    copies = [user for user in part.users if user.target is aten.copy_.default and user.args[0] is cache]
    is_alone = set(part.users) == {reader, *copies} and set(cache.users) == {part, *copies}
    is_third = len(indices) == 3 and indices[0] is None and indices[1] is None and isinstance(indices[2], Node)
    if cache.op != "placeholder" or len(copies) != 1 or copies[0].users or not is_alone or not is_third:
        return None
    index = indices[2].meta["val"]
    one = index.dtype == torch.int64 and tuple(index.shape) == (1,)
    return Write(cache, indices[2], value, part, copies[0]) if one else None


def _fits(query: Any, key: Write, value: Write) -> bool:
    for write in (key, value):
        cache, new = write.cache.meta["val"], write.value.meta["val"]
        sizes = (cache.shape[0], cache.shape[1], 1, cache.shape[3])
        if new.dtype != cache.dtype or not shapes_are_equal(new.shape, sizes) or not cache.is_contiguous():
            return False
    return query.meta["val"].dtype == key.cache.meta["val"].dtype


def position_of(index: Node) -> Node:
    """The number behind an index of one element: `length` of `arange(1) + length`."""
    terms: Any = index.args if index.target is aten.add.Tensor and not index.kwargs else ()
    for first, second in (terms, terms[::-1]) if len(terms) == 2 else ():
        is_zero = isinstance(first, Node) and first.target is _IOTA and first.kwargs.get("start") == 0
        if is_zero and isinstance(second, Node) and second.meta["val"].dtype == torch.int64:
            return second
    return index


def rotation_of(query: Node, key: Node) -> tuple[Node, Node, tuple[Node | None, Node | None]]:
    """Query and key before RoPE, and its cos and sin; as they are, and None, if they are not rotated alike."""
    queries, keys = _rotated(query), _rotated(key)
    if queries is None or keys is None or queries[1:] != keys[1:]:
        return query, key, (None, None)
    return queries[0], keys[0], queries[1:]


def _rotated(node: Node) -> tuple[Node, Node, Node] | None:
    """(x, cos, sin) of `x * cos + cat([-x[half:], x[:half]]) * sin`; None for anything else."""
    products: Any = node.args if node.target is aten.add.Tensor and not node.kwargs else ()
    if len(products) != 2 or any(getattr(part, "target", None) is not aten.mul.Tensor for part in products):
        return None
    for straight, turned in (products, products[::-1]):
        for half_turned, sin in (turned.args, turned.args[::-1]):
            x = _half_turned(half_turned)
            factors: list[Any] = [part for part in straight.args if part is not x]
            if x is not None and len(factors) == 1 and _are_of_rows(x, factors[0], sin):
                return x, factors[0], sin
    return None


def _half_turned(node: Any) -> Node | None:
    """x of `cat([-x[..., half:], x[..., :half]], -1)`, of an even static size."""
    halves: Any = node.args[0] if isinstance(node, Node) and node.target is aten.cat.default else ()
    if len(halves) != 2:
        return None
    negated, first = halves
    second = negated.args[0] if negated.target is aten.neg.default else None
    if second is None or any(part.target is not aten.slice.Tensor for part in (first, second)):
        return None
    x, size = first.args[0], first.args[0].meta["val"].shape[-1]
    last = x.meta["val"].dim() - 1
    if not isinstance(size, int) or size % 2 or second.args[0] is not x or operand(node, 1) % (last + 1) != last:
        return None
    ranges = [[operand(part, index) for index in range(1, 5)] for part in (first, second)]
    ends = [(dim % (last + 1), start or 0, min(end, size), step) for dim, start, end, step in ranges]
    return x if ends == [(last, 0, size // 2, 1), (last, size // 2, size, 1)] else None


def _are_of_rows(x: Node, cos: Any, sin: Any) -> bool:
    """Whether cos and sin are the same for all heads of a token, `[batch or 1, 1, 1, size]`."""
    batch, _, _, size = x.meta["val"].shape
    for part in (cos, sin):
        shape = part.meta["val"].shape if isinstance(part, Node) else ()
        of_batch = len(shape) == 4 and any(shapes_are_equal(shape, (n, 1, 1, size)) for n in (1, batch))
        if not of_batch or not part.meta["val"].is_floating_point():
            return False
    return x.meta["val"].dtype == cos.meta["val"].dtype == sin.meta["val"].dtype


def rounding_behind(
    node: Node, size: int, why_not: Callable[[tuple[MXFormat, ScaleRule]], str | None]
) -> tuple[tuple[str | None, str | None], list[Node]]:
    """Format and rule by which the result of attention is rounded, in whole heads of `size`, if all that reads it is
    rounded; and the nodes that do so. why_not: a reason why the kernel of attention cannot round so."""
    current, merged = node, False
    while len(current.users) == 1:
        user = next(iter(current.users))
        if user.target is QUANTIZE_DEQUANTIZE:
            fmt, rule = map(str, user.args[1:])
            width = user.meta["val"].shape[-1]
            whole = merged and isinstance(width, int) and width % size == 0
            if whole and why_not((parse_format(fmt), parse_scale_rule(rule))) is None:
                return (fmt, rule), [user]
            break
        is_permute = not merged and user.target is aten.permute.default and [*operand(user, 1)] == [0, 2, 1, 3]
        if not is_permute and user.target not in _VIEWS:
            break
        current, merged = user, merged or is_permute
    return (None, None), []
