"""Inline nested graphs that are only a region of forward: `with torch.autocast(...)`, gradient modes, checkpoints.

    wrap_with_autocast(region, x)  ->  the region's nodes, with the casts that autocast would make

torch.export makes a graph of its own of each such region, which no pass looks into. Casts are found from the recorded
dtypes: an op whose result has another dtype than its inputs give was run on inputs that autocast had cast.
Nested graphs that torch cannot run otherwise (torch.cond, while_loop, scan, map, flex_attention) stay calls; `analysis`
counts the weights that they read as misses.
"""

import operator
from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from mxcompile.errors import TraceError
from mxcompile.graph.dataflow import is_nested
from mxcompile.graph.edit import create_call

_AUTOCAST = "wrap_with_autocast"
_REGIONS: Final = {
    _AUTOCAST: (4, 5),
    "wrap_with_set_grad_enabled": (1, 2),
    "tag_activation_checkpoint": (0, 1),
    "invoke_subgraph": (0, 2),
}
"""Operator -> position of the nested graph among its arguments, and of the first value that it gets."""
_CAST_BY = "mxcompile_autocast"
"""Key of `Node.meta` on a nested graph's call: the dtype of the autocast region that it stands in."""
_LOW: Final = (torch.float32, torch.bfloat16, torch.float16)
_TO = torch.ops.aten.to.dtype


def inline_regions(root: GraphModule) -> None:
    """Inline all regions of a graph module in place; afterwards every call that is left has its fake value."""
    while (node := next((n for n in root.graph.nodes if _is_region(root, n)), None)) is not None:
        _inline(root, node)
    for node in root.graph.nodes:
        if is_nested(node) and "val" not in node.meta:
            items = {cast(int, user.args[1]): user.meta.get("val") for user in node.users if _is_item(user)}
            node.meta["val"] = tuple(items.get(index) for index in range(max(items, default=-1) + 1))


def _is_region(root: GraphModule, node: Node) -> bool:
    if not is_nested(node) or node.target.__name__ not in _REGIONS:  # pyright: ignore
        return False
    if not all(_is_item(user) for user in node.users):
        return False
    is_cast = _autocast_dtype(node) is not None
    return not is_cast or all(inner.target.__name__ in _REGIONS for inner in _nested_calls(_region(root, node)))  # pyright: ignore


def _nested_calls(module: GraphModule) -> Iterator[Node]:
    for node in module.graph.nodes:
        if is_nested(node):
            yield node
        elif node.op == "get_attr" and isinstance(inner := getattr(module, str(node.target), None), GraphModule):
            yield from _nested_calls(inner)


def _is_item(node: Node) -> bool:
    return node.target is operator.getitem


def _region(root: GraphModule, node: Node) -> GraphModule:
    source = node.args[_REGIONS[node.target.__name__][0]]  # pyright: ignore
    return cast(GraphModule, root.get_submodule(str(cast(Node, source).target)))


def _autocast_dtype(node: Node) -> torch.dtype | None:
    """The dtype to which autocast casts inside of the region, None if it casts nothing there."""
    if node.target.__name__ != _AUTOCAST:  # pyright: ignore
        return node.meta.get(_CAST_BY)
    device, dtype, is_enabled = node.args[:3]
    if not is_enabled:
        return None
    return cast(torch.dtype, dtype) or torch.get_autocast_dtype(str(device))


def _inline(root: GraphModule, call: Node) -> None:
    graph, region, first = root.graph, _region(root, call), _REGIONS[call.target.__name__][1]  # pyright: ignore
    values: dict[Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), call.args[first:], strict=True))
    for node in region.graph.find_nodes(op="get_attr"):
        with graph.inserting_before(call):
            name = _adopt_attribute(root, getattr(region, str(node.target)))
            values[node] = graph.create_node("get_attr", name, name=node.name)
        values[node].meta = dict(node.meta)
    with graph.inserting_before(call):
        results = cast(tuple[Any, ...], graph.graph_copy(region.graph, values))
    dtype = _autocast_dtype(call)
    for node, copied in values.items():
        if dtype is not None and is_nested(node):
            copied.meta[_CAST_BY] = dtype
        elif dtype is not None and node.op == "call_function":
            _restore_casts(graph, copied, dtype)
    for item in list(call.users):
        item.replace_all_uses_with(results[cast(int, item.args[1])])
        graph.erase_node(item)
    graph.erase_node(call)


def _adopt_attribute(root: GraphModule, value: Any) -> str:
    """Hold a region's tensor or nested graph in the outer module, under a new name."""
    kind = "graph" if isinstance(value, GraphModule) else "constant"
    name = next(name for index in range(10**6) if not hasattr(root, name := f"region_{kind}_{index}"))
    if isinstance(value, Tensor):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)
    return name


def _restore_casts(graph: Graph, node: Node, dtype: torch.dtype) -> None:
    """Cast the inputs of a node as autocast did when its result was recorded."""
    recorded = _float_dtypes(node.meta.get("val"))
    inputs = [source for source in node.all_input_nodes if _is_castable(source)]
    if not recorded or not inputs or {source.meta["val"].dtype for source in inputs} == set(recorded):
        return
    for candidate in (None, dtype, torch.float32):
        if _result_dtypes(node, candidate) == recorded:
            break
    else:
        raise TraceError(f"%{node.name}: {node.target} is run under autocast in a way that the graph does not show")
    for source in inputs if candidate is not None else ():
        if source.meta["val"].dtype != candidate:
            with graph.inserting_before(node):
                cast_node = create_call(graph, _TO, source, candidate)
            cast_node.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            node.replace_input_with(source, cast_node)


def _is_castable(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in _LOW


def _result_dtypes(node: Node, dtype: torch.dtype | None) -> list[torch.dtype] | None:
    """The float dtypes of the result on inputs of that dtype, None if the op refuses them."""

    def value(source: Node) -> Any:
        recorded = source.meta.get("val")
        return cast(Tensor, recorded).to(dtype) if dtype is not None and _is_castable(source) else recorded

    try:
        with torch.no_grad():
            return _float_dtypes(node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value)))  # pyright: ignore
    except (RuntimeError, TypeError, ValueError):
        return None


def _float_dtypes(value: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
