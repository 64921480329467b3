"""Insert nodes into a Program, with a readable name, a fake value, and the module path of their neighbour."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mxcompile.graph.program import Program

BLOCK_AXIS = "mx_block_axis"
"""Key of `Node.meta` on a weight's `mx::dequantize`: the parameter's dimension along which the blocks run, -1 or -2."""

PACKS = "mx_packs"
"""Key of `Node.meta` on a `get_attr` of packed elements or scales: the name of the parameter that they pack."""


def insert_call(
    program: Program, before: Node, target: Any, args: tuple[Any, ...], name: str | None, **kwargs: Any
) -> Node:
    """Insert `name = target(*args, **kwargs)` in front of `before`, with its module path. name: None for any."""
    with program.graph.inserting_before(before):
        node = create_call(program.graph, target, *args, name=name, **kwargs)
    _adopt(node, before)
    return node


def create_call(graph: Graph, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> Node:
    """`target(*args, **kwargs)` at the graph's insertion point, with its fake value in `meta["val"]`."""
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]), **map_arg(kwargs, lambda n: n.meta["val"]))
    return node


def insert_tensor(program: Program, before: Node, name: str) -> Node:
    """Insert a `get_attr` of the program's tensor of that full name in front of `before`."""
    with program.graph.inserting_before(before):
        node = program.graph.create_node("get_attr", name, name=name.replace(".", "_"))
    node.meta["val"] = fake_like(before, program.tensor(name))
    _adopt(node, before)
    return node


def parameter_name(node: Node) -> str:
    """Name of the parameter that a `get_attr` reads, in float or packed."""
    return str(node.meta.get(PACKS, node.target))


def fake_like(node: Node, tensor: Tensor) -> Tensor:
    """A fake tensor of the tensor's shape and dtype, of the fake mode that the node's graph was traced in."""
    for candidate in node.graph.nodes:
        mode = getattr(candidate.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode.from_tensor(tensor, static_shapes=True)
    return torch.empty_like(tensor, device="meta")


def _adopt(node: Node, neighbour: Node) -> None:
    stack = neighbour.meta.get("nn_module_stack")
    if stack is not None:
        node.meta["nn_module_stack"] = stack
