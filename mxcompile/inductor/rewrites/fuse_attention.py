"""attention(q, repeat(k), repeat(v), mask) with one query per head, on a GPU -> mx::attend(q, k, v, mask).

transformers passes keys and values to torch's kernels repeated for every query head: for each token, several copies of
the whole cache. `mx::attend` reads them as the cache holds them.
"""

import math
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.operator_schemas import normalize_function

from mxcompile.graph.dataflow import shapes_are_equal
from mxcompile.graph.edit import create_call
from mxcompile.inductor.rewrites.decompose_attention import replace_output, uses_only_output
from mxcompile.kernels.dispatch import why_no_attention
from mxcompile.ops import ATTEND

aten = torch.ops.aten
ATTENTIONS = (
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
)
_COPIES = frozenset({aten.clone.default, aten.slice.Tensor, aten.alias.default})
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default})
_EXPAND = aten.expand.default


def fuse_attention(graph: Graph) -> int:
    """Fuse all single-token attention of the graph in place, on a GPU. Returns the number of rewrites."""
    nodes = [node for target in ATTENTIONS for node in graph.find_nodes(op="call_function", target=target)]
    return sum(_rewrite(graph, node) for node in nodes)


def single_query_operands(node: Node) -> tuple[list[Node], Any, float | None] | None:
    """Query, key and value, the mask and the scale of a call that rewrites know how to replace, else None."""
    call = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)  # pyright: ignore[reportArgumentType]
    if call is None or not uses_only_output(node):
        return None
    options = call.kwargs
    tensors = [options[name] for name in ("query", "key", "value")]
    scale = options["scale"]
    known = scale is None or isinstance(scale, float)
    if options["dropout_p"] or options["is_causal"] or not known or not _has_one_query(tensors):
        return None
    return tensors, options.get("attn_bias"), scale


def _rewrite(graph: Graph, node: Node) -> bool:
    if (operands := single_query_operands(node)) is None:
        return False
    tensors, bias, scale = operands
    mask = unexpanded(bias)
    query, *pair = tensors
    short = [unrepeated(part) for part in pair]
    key, value = short if shapes_are_equal(*(shape_of(part)[:2] for part in short)) else pair
    values: list[Any] = [None if part is None else part.meta["val"] for part in (query, key, value, mask)]
    if not fits(*values) or why_no_attention(*values) is not None:
        return False
    with graph.inserting_before(node):
        args = (query, key, value, mask, 1 / math.sqrt(shape_of(query)[3]) if scale is None else scale)
        result = create_call(graph, ATTEND, *args, name=f"{node.name}_single_token")
    replace_output(graph, node, result)
    for part in (*pair, bias):
        _erase_unused(graph, part)
    return True


def _has_one_query(tensors: list[Node]) -> bool:
    """Whether each head has one query, and all sizes but batch and cache length are static."""
    shapes = [shape_of(part) for part in tensors]
    known = all(isinstance(size, int) for shape in shapes for size in (shape[1], shape[3]))
    return known and isinstance(shapes[0][2], int) and shapes[0][2] == 1


def fits(query: Any, key: Any, value: Any, mask: Any) -> bool:
    """Whether the sizes are known to be what `mx::attend` takes.

    Keys and values are as many, as attention takes nothing else; yet one number may be known and the other a symbol,
    after calls with another kind of cache.
    """
    rows, sizes = tuple(query.shape[:3]), () if mask is None else tuple(mask.shape)
    broadcasts = len(sizes) <= 4 and any(_broadcasts(sizes, (*rows, part.shape[2])) for part in (key, value))
    same = shapes_are_equal(key.shape[:2], value.shape[:2]) and shapes_are_equal(query.shape[:1], key.shape[:1])
    return broadcasts and same


def _broadcasts(sizes: tuple[Any, ...], scores: tuple[Any, ...]) -> bool:
    pairs = zip(reversed(sizes), reversed(scores), strict=False)
    return all(statically_known_true(a == 1) or statically_known_true(a == b) for a, b in pairs)


def unrepeated(node: Node) -> Node:
    """The keys or values `[batch, shared, keys, size]` whose heads `node` repeats `n` times; `node` if it repeats none.

    reshape(expand(unsqueeze(x, 2), [batch, shared, n, keys, size]), [batch, shared * n, keys, size])
    """
    view = _uncopied(node)
    repeated = _uncopied(view.args[0]) if view.target in _VIEWS else view
    single = repeated.args[0] if repeated.target is _EXPAND else None
    single = None if single is None else _uncopied(single)
    if single is None or single.target not in _VIEWS:
        return node
    source, n = single.args[0], shape_of(repeated)[2]
    if not isinstance(source, Node) or len(shape_of(source)) != 4 or len(shape_of(repeated)) != 5:
        return node
    batch, shared, keys, size = shape_of(source)
    is_repeat = (
        isinstance(n, int)
        and shapes_are_equal(shape_of(single), (batch, shared, 1, keys, size))
        and shapes_are_equal(shape_of(repeated), (batch, shared, n, keys, size))
        and shapes_are_equal(shape_of(node), (batch, shared * n, keys, size))
    )
    return source if is_repeat else node


def _uncopied(node: Any) -> Node:
    """The node behind copies, aliases and slices that take everything."""
    while node.target in _COPIES and shapes_are_equal(shape_of(node), shape_of(node.args[0])):
        node = node.args[0]
    return node


def unexpanded(mask: Any) -> Any:
    """The mask behind expansions."""
    while isinstance(mask, Node) and mask.target is _EXPAND:
        mask = mask.args[0]
    return mask


def shape_of(node: Node) -> tuple[Any, ...]:
    """The sizes of a node's value."""
    return tuple(node.meta["val"].shape)


def _erase_unused(graph: Graph, node: Any) -> None:
    """Erase a view or copy without users, and its sources likewise."""
    while isinstance(node, Node) and not node.users and node.target in (*_COPIES, *_VIEWS, _EXPAND):
        source = node.args[0]
        graph.erase_node(node)
        node = source
