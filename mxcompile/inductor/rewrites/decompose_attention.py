"""attention(q, k, v, mask) with one query per head, on the CPU -> p = softmax(sum(q * k) * scale + mask); sum(p * v).

Single-token attention is decomposed into reductions that Inductor fuses with the producers of K, V and the mask.
torch's kernel is made for many queries: for one it takes longer to start than to compute, and it needs keys and values
repeated for every query head, a copy of the whole cache.

As in torch's kernel, reductions are in float32, and a query whose mask excludes every key gives zero.
"""

import math
import operator
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from mxcompile.graph.edit import create_call

aten = torch.ops.aten
SINGLE_QUERY = aten._scaled_dot_product_flash_attention_for_cpu.default
_CONVERT = torch.ops.prims.convert_element_type.default
_SMALLEST = torch.finfo(torch.float32).tiny


def decompose_attention(graph: Graph) -> int:
    """Decompose all single-token attention of the graph in place. Returns the number of rewrites."""
    nodes = [node for node in graph.find_nodes(op="call_function", target=SINGLE_QUERY) if has_one_query(node)]
    for node in nodes:
        _decompose(graph, node)
    return len(nodes)


def has_one_query(node: Node) -> bool:
    """Whether each head has one query that attends to all keys, and only the output is used."""
    query, key, mask = (
        part.meta["val"] if isinstance(part, Node) else None for part in (*node.args[:2], mask_of(node))
    )
    dropout_or_causal = any(node.args[3:]) or node.kwargs.get("dropout_p") or node.kwargs.get("is_causal")
    if query is None or key is None or dropout_or_causal or not uses_only_output(node):
        return False
    (heads, queries), shared = query.shape[1:3], key.shape[1]
    is_known = all(isinstance(size, int) for size in (heads, queries, shared, query.shape[3]))
    if mask is not None and (
        not mask.dtype.is_floating_point or (mask.dim() > 2 and mask.shape[1] != 1 and heads != shared)
    ):
        return False
    return is_known and queries == 1


def uses_only_output(node: Node) -> bool:
    """Whether only the first result of an attention call is used."""
    return all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)


def replace_output(graph: Graph, node: Node, result: Node) -> None:
    """Replace the first result of an attention call by `result`, and erase the call."""
    for part in list(node.users):
        part.replace_all_uses_with(result)
        graph.erase_node(part)
    graph.erase_node(node)


def erase_unread(graph: Graph, node: Node) -> None:
    """Erase a call without users, and what only it reads."""
    unread = {node}
    while unread:
        current = unread.pop()
        if current.op == "call_function" and not current.users and not current.is_impure():
            sources = current.all_input_nodes
            graph.erase_node(current)
            unread.update(sources)


def mask_of(node: Node) -> Any:
    """The mask of an attention call, or None."""
    return node.kwargs.get("attn_mask")


def _decompose(graph: Graph, node: Node) -> None:
    """Queries `[batch, shared heads, heads, 1, size]` with keys `[batch, shared heads, 1, keys, size]`."""
    of_query, of_key = (part.meta["val"] for part in node.args[:2])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    heads, shared, size, scale = of_query.shape[1], of_key.shape[1], of_query.shape[3], node.kwargs.get("scale")
    with graph.inserting_before(node):
        call = partial(create_call, graph)
        query, key, value = (call(_CONVERT, part, torch.float32) for part in node.args[:3])
        query = call(aten.reshape.default, query, [-1, shared, heads // shared, 1, size])
        key, value = (call(aten.unsqueeze.default, part, 2) for part in (key, value))
        scores = call(aten.sum.dim_IntList, call(aten.mul.Tensor, query, key), [-1])
        scores = call(aten.mul.Tensor, scores, 1 / math.sqrt(size) if scale is None else scale)
        if (mask := mask_of(node)) is not None:
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
