"""Enclose what torch.vmap runs in a nested graph: its values have a hidden dimension, which no pass may touch.

    _vmap_increment_nesting(...), ..., _vmap_decrement_nesting()  ->  vmapped(graph, *operands)

Masks of attention are made by vmap in some models, flex_attention always makes them so.
"""

import operator
from collections.abc import Sequence
from typing import Any, Final

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import has_side_effect

from mxcompile.graph.dataflow import reads_graph, vmapped

_STEPS: Final = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}


def enclose_vmaps(root: GraphModule) -> None:
    """Replace each outermost vmap of a graph module by a call of a nested graph, in place."""
    regions: list[list[Node]] = []
    depth = 0
    for node in root.graph.nodes:
        step = _STEPS.get(getattr(node.target, "__name__", ""), 0) if node.op == "call_function" else 0
        if step > 0 and depth == 0:
            regions.append([])
        if depth + step > 0 or step < 0:
            regions[-1].append(node)
        depth += step
    for index, region in enumerate(regions):
        _enclose(root, region, f"vmap_graph_{index}")


def _enclose(root: GraphModule, nodes: Sequence[Node], name: str) -> None:
    inner = [node for node in nodes if node.op != "get_attr" or reads_graph(node)]
    inside = set(inner)
    operands = list(dict.fromkeys(source for node in inner for source in node.all_input_nodes if source not in inside))
    results = [node for node in inner if set(node.users) - inside]
    last = nodes[-1]
    with root.graph.inserting_after(last):
        source = root.graph.create_node("get_attr", name, name=name)
    with root.graph.inserting_after(source):
        call = root.graph.create_node("call_function", vmapped, (source, *operands), name="vmapped")
    call.meta = {"val": tuple(node.meta.get("val") for node in results), **_stack(nodes[0])}
    setattr(root, name, _module(root, inner, operands, results))
    after = call
    for index, node in enumerate(results):
        with root.graph.inserting_after(after):
            after = root.graph.create_node("call_function", operator.getitem, (call, index), name=node.name)
        after.meta = dict(node.meta)
        node.replace_all_uses_with(after, lambda user: user not in inside)
    for node in reversed(inner):
        root.graph.erase_node(node)


def _module(root: GraphModule, nodes: Sequence[Node], operands: Sequence[Node], results: Sequence[Node]) -> GraphModule:
    graph = Graph()
    values: dict[Node, Node] = {}
    for operand in operands:
        values[operand] = graph.placeholder(operand.name)
        values[operand].meta = dict(operand.meta)
    for node in nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
        if getattr(node.target, "__name__", "") in _STEPS:  # what opens and closes a vmap is no dead code
            has_side_effect(node.target)  # pyright: ignore[reportArgumentType]
    graph.output(tuple(values[node] for node in results))
    return GraphModule(root, graph)


def _stack(node: Node) -> dict[str, Any]:
    stack = node.meta.get("nn_module_stack")
    return {} if stack is None else {"nn_module_stack": stack}
