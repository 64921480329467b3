"""attention(q, k, v, mask) of one query a head on the CPU -> softmax(sum(q * k) * scale + mask), sum(p * v).

torch's kernel is made for many queries. For one, each token of a text that is being generated, it takes longer to start
than to compute, and it is handed keys and values that are repeated for every query head, a copy of the cache. Sums of
products Inductor merges with what makes keys, values and mask, and nothing is copied.

As in that kernel sums are in float32, and where a mask leaves nothing the result is zero.
"""

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
_CONVERT = torch.ops.prims.convert_element_type.default
_SMALLEST = torch.finfo(torch.float32).tiny


def open_attention(graph: Graph) -> int:
    """Rewrite all attention of one query in place; returns how many there were."""
    found = [node for node in graph.find_nodes(op="call_function", target=_ATTENTION) if _has_one_query(node)]
    for node in found:
        _open(graph, node)
    return len(found)


def _has_one_query(node: Node) -> bool:
    """Whether each head has one query, which sees all keys, and only the output is used."""
    query, key, mask = (part.meta["val"] if isinstance(part, Node) else None for part in (*node.args[:2], _mask(node)))
    dropout_or_causal = any(node.args[3:]) or node.kwargs.get("dropout_p") or node.kwargs.get("is_causal")
    if query is None or key is None or dropout_or_causal or not gives_only_output(node):
        return False
    (heads, queries), shared = query.shape[1:3], key.shape[1]
    is_known = all(isinstance(size, int) for size in (heads, queries, shared, query.shape[3]))
    if mask is not None and (
        not mask.dtype.is_floating_point or (mask.dim() > 2 and mask.shape[1] != 1 and heads != shared)
    ):
        return False
    return is_known and queries == 1


def gives_only_output(node: Node) -> bool:
    """Whether of the results of attention only the first is used."""
    return all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)


def replace_output(graph: Graph, node: Node, result: Node) -> None:
    """Use `result` in place of the first result of attention, and erase that."""
    for part in list(node.users):
        part.replace_all_uses_with(result)
        graph.erase_node(part)
    graph.erase_node(node)


def _mask(node: Node) -> Any:
    return node.kwargs.get("attn_mask")


def _open(graph: Graph, node: Node) -> None:
    """Queries `[batch, shared heads, heads, 1, size]` with keys `[batch, shared heads, 1, keys, size]`."""
    of_query, of_key = (part.meta["val"] for part in node.args[:2])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    heads, shared, size, scale = of_query.shape[1], of_key.shape[1], of_query.shape[3], node.kwargs.get("scale")
    with graph.inserting_before(node):

        def call(target: Any, *args: Any) -> Node:
            made = graph.call_function(target, args)
            made.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
            return made

        query, key, value = (call(_CONVERT, part, torch.float32) for part in node.args[:3])
        query = call(aten.reshape.default, query, [-1, shared, heads // shared, 1, size])
        key, value = (call(aten.unsqueeze.default, part, 2) for part in (key, value))
        scores = call(aten.sum.dim_IntList, call(aten.mul.Tensor, query, key), [-1])
        scores = call(aten.mul.Tensor, scores, 1 / math.sqrt(size) if scale is None else scale)
        if (mask := _mask(node)) is not None:
            scores = call(aten.add.Tensor, scores, mask)
        most = call(aten.clamp_min.default, call(aten.amax.default, scores, [-1], True), torch.finfo(torch.float32).min)
        powers = call(aten.exp.default, call(aten.sub.Tensor, scores, most))
        total = call(aten.clamp_min.default, call(aten.sum.dim_IntList, powers, [-1], True), _SMALLEST)
        shares = call(aten.unsqueeze.default, call(aten.div.Tensor, powers, total), -1)
        result = call(aten.sum.dim_IntList, call(aten.mul.Tensor, shares, value), [-2])
        result = call(
            _CONVERT, call(aten.reshape.default, result, [-1, heads, 1, value.meta["val"].shape[-1]]), of_query.dtype
        )
    replace_output(graph, node, result)
