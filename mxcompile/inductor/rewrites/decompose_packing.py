"""quantize(x), dequantize(elements, scales), read_cache(...) of a cache -> the pointwise operations of the reference.

A decode step rounds the key and value of a token and reads all others; a prompt rounds those of all its tokens.
Decomposed, Inductor fuses the first with what writes to the cache, and on a CPU the second with the sums of
attention, so that bytes are decoded where they are read. The arithmetic is the reference's own, which is exact but
for the one rounding of an element.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

from torch import Tensor
from torch.func import functionalize
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from mxcompile.inductor.private_api import select_decomp_table
from mxcompile.ops import DEQUANTIZE, QUANTIZE, READ_CACHE
from mxcompile.ops.exact_tokens import read_cache
from mxcompile.ops.linears import dequantize_at_once, quantize

_OF_A_CACHE: Final = 4  # dimensions: batch, kv heads, tokens, and a head's
_TENSORS: Final = {QUANTIZE: 1, DEQUANTIZE: 2}
_DECOMPOSITIONS: Final[dict[Any, Callable[..., Any]]] = {QUANTIZE: quantize, DEQUANTIZE: dequantize_at_once}


def decompose_packing(graph: Graph) -> int:
    """Decompose the packing and unpacking of a cache in place. Returns the number of rewrites."""
    for node in graph.find_nodes(op="call_function", target=READ_CACHE):
        _inline(graph, node)
    nodes = [node for target in _TENSORS for node in graph.find_nodes(op="call_function", target=target)]
    nodes = [node for node in nodes if _is_of_a_cache(node)]
    for node in nodes:
        _decompose(graph, node)
    return len(nodes)


def _is_of_a_cache(node: Node) -> bool:
    target: Any = node.target
    values = [_value(part) for part in node.args[: _TENSORS[target]]]
    return not node.kwargs and all(value is not None and _has_heads(value) for value in values)


def _has_heads(value: Tensor) -> bool:
    """Batch and tokens may be symbols, as in a prompt of any length; an empty tensor stays with the operator."""
    *counts, size = value.shape
    is_known = value.dim() == _OF_A_CACHE and type(size) is int and size > 0
    return is_known and all(type(count) is not int or count > 0 for count in counts)


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _decompose(graph: Graph, node: Node) -> None:
    target: Any = node.target
    count = _TENSORS[target]
    rest = node.args[count:]

    def of(*values: Tensor) -> Any:
        return _DECOMPOSITIONS[target](*values, *rest)

    _replace(graph, node, insert_traced(graph, node, of, node.args[:count]))


def _inline(graph: Graph, node: Node) -> None:
    """A `mx::read_cache` that no attention has taken: what it dequantizes is then decomposed like the rest."""

    def read(*values: Tensor) -> Tensor:
        tensors = iter(values)
        arguments: list[Any] = [next(tensors) if isinstance(part, Node) else part for part in node.args]
        return read_cache(*arguments)

    tensors = [part for part in node.args if isinstance(part, Node)]
    _replace(graph, node, insert_traced(graph, node, functionalize(read), tensors))


def insert_traced(graph: Graph, node: Node, function: Callable[..., Any], tensors: Sequence[Any]) -> Any:
    """Insert what `function(*tensors)` computes before `node`, decomposed. Returns its results: a node, or several."""
    values: list[Any] = [_value(part) for part in tensors]
    with values[0].fake_mode:
        traced = make_fx(function, decomposition_table=select_decomp_table())(*values)
    inner = traced.graph
    inner.eliminate_dead_code()
    outer: dict[Node, Any] = dict(zip(inner.find_nodes(op="placeholder"), tensors, strict=True))
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(inner, outer)
    for old, new in outer.items():
        if old.op == "call_function":
            new.meta = dict(old.meta)
    return results


def _replace(graph: Graph, node: Node, results: Any) -> None:
    if isinstance(results, Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem, "a tuple is only taken apart"
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
