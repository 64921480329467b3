"""Which nodes read a Program's own tensors (parameters, buffers, constants), and what for.

A tensor is followed through everything that is computed from such tensors alone (transposes, slices, `W + B @ A`,
weight norm) to the nodes that combine it with data. A node that may contract (a convolution, a recurrent layer, einsum,
an operator that nobody here knows) reads a weight; one of `_ELEMENTWISE` or `_MOVES` reads a table, a mask, an offset.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from mxcompile.graph.dataflow import mutated_tensors, nested_graphs

aten = torch.ops.aten

Sources = Mapping[Node, tuple[Node, ...]]
"""Value that depends on no data -> the `get_attr` nodes that it is computed from."""

EMBEDDING: Final = aten.embedding.default
LOOKUPS: Final = frozenset(
    {"embedding", "embedding_bag", "gather", "index", "index_select", "take", "take_along_dim", "_embedding_bag"}
)
_SHAPE_OF_OTHERS: Final = frozenset({"expand_as", "reshape_as", "type_as", "view_as"})
"""They take only a shape or dtype from their other arguments."""
_ELEMENTWISE: Final = frozenset(
    [
        "complex",
        "dropout",
        "feature_dropout",
        "greater",
        "greater_equal",
        "lerp",
        "less",
        "less_equal",
        "masked_fill",
        "masked_fill_",
        "multiply",
        "not_equal",
        "polar",
        "prelu",
        "rrelu",
        "rsub",
        "subtract",
        "where",
        "__and__",
        "__or__",
        "__xor__",
    ]
)  # fmt: skip
"""Elementwise operators without torch's tag."""
_MOVES: Final = LOOKUPS | frozenset(
    [
        "_to_copy",
        "batch_norm",
        "broadcast_tensors",
        "broadcast_to",
        "bucketize",
        "cat",
        "clone",
        "concat",
        "concatenate",
        "constant_pad_nd",
        "contiguous",
        "copy",
        "copy_",
        "cudnn_batch_norm",
        "diagonal_scatter",
        "dstack",
        "expand",
        "expand_as",
        "flatten",
        "flip",
        "fused_rms_norm",
        "grid_sampler",
        "grid_sampler_2d",
        "group_norm",
        "hstack",
        "index_add",
        "index_copy",
        "index_fill",
        "index_put",
        "index_put_",
        "instance_norm",
        "layer_norm",
        "masked_scatter",
        "masked_select",
        "meshgrid",
        "native_batch_norm",
        "native_group_norm",
        "native_layer_norm",
        "pad",
        "repeat",
        "repeat_interleave",
        "reshape",
        "rms_norm",
        "roll",
        "scaled_dot_product_attention",
        "scatter",
        "scatter_add",
        "scatter_reduce",
        "searchsorted",
        "select_scatter",
        "slice_scatter",
        "stack",
        "tile",
        "to",
        "type_as",
        "upsample_bicubic2d",
        "upsample_bilinear2d",
        "upsample_linear1d",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_trilinear3d",
        "view_as",
        "vstack",
    ]
)  # fmt: skip
"""Operators that move, join, normalize or resample values, or take a mask."""


def tensor_sources(graph: Graph, data: Collection[Node] = ()) -> Sources:
    """The values that depend on no data. data: nodes whose results count as data, whatever they read.

    Tensors that the graph writes to (caches, counters) are data.
    """
    written = set(mutated_tensors(graph))
    sources: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        if node in data or not holds_tensor(node):
            continue
        if node.op == "get_attr" and node.target not in written:
            sources[node] = (node,)
        elif node.op == "call_function" and node.target is not EMBEDDING:
            inputs = value_inputs(node)
            if all(value in sources for value in inputs):
                sources[node] = tuple(dict.fromkeys(source for value in inputs for source in sources[value]))
    return sources


def read_tensors(node: Node, sources: Sources) -> list[Node]:
    """The tensors of two or more dimensions that a node reads, directly or computed from others."""
    read = dict.fromkeys(tensor for value in value_inputs(node) for tensor in sources.get(value, ()))
    return [tensor for tensor in read if tensor.meta["val"].dim() >= 2]


def holds_tensor(node: Node) -> bool:
    """True if the node's value is a tensor or contains one."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def ancestors(node: Node, sources: Sources) -> Iterator[Node]:
    """The node and every value of `sources` that it is computed from."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        yield current
        new = [value for value in current.all_input_nodes if value in sources and value not in seen]
        seen.update(new)
        stack += new


def contracts(node: Node) -> bool:
    """True if the node may multiply what it reads as a matrix: anything that is not known to do something else.

    A lookup in three or more dimensions counts too if it selects the matrices that a matmul multiplies by. A call of
    nested graphs counts if a node of theirs does.
    """
    if graphs := nested_graphs(node):
        return any(contracts(inner) for graph in graphs for inner in graph.nodes if value_inputs(inner))
    schema = getattr(node.target, "_schema", None)
    if schema is None or str(node.target).startswith("mx."):
        return isinstance(node.target, torch._ops.HigherOrderOperator)  # pyright: ignore[reportPrivateUsage]
    name = _name(node)
    if name in LOOKUPS:
        return _selects_matrices(node)
    is_elementwise = torch.Tag.pointwise in node.target.tags or name in _ELEMENTWISE  # pyright: ignore
    is_view = bool(schema.arguments) and schema.arguments[0].alias_info is not None
    return not (is_elementwise or is_view or name in _MOVES)


def _selects_matrices(lookup: Node) -> bool:
    table = lookup.args[0]
    if not isinstance(table, Node) or table.meta["val"].dim() < 3:
        return False
    return any("mm" in _name(reader) or _name(reader) in ("matmul", "einsum") for reader in _readers(lookup))


def _readers(node: Node) -> Iterator[Node]:
    """The nodes that read a value, also through views, copies and casts."""
    for user in node.users:
        schema: Any = getattr(user.target, "_schema", None)
        is_view = schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None
        if is_view or _name(user) in ("clone", "contiguous", "reshape", "to", "_to_copy"):
            yield from _readers(user)
        else:
            yield user


def value_inputs(node: Node) -> list[Node]:
    """The inputs whose values count, not only their shapes."""
    name = _name(node)
    if name.endswith("_like") or name.startswith("new_"):
        return []
    inputs = [value for value in node.all_input_nodes if holds_tensor(value)]
    return inputs[:1] if name in _SHAPE_OF_OTHERS else inputs


def _name(node: Node) -> str:
    """The operator's name without namespace and overload."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).rpartition("::")[2]
