"""Inputs of a compiled graph: an MXWeight -> the tensors that hold it, of which the graph makes it again.

Otherwise AOTAutograd takes every weight apart at every call, in Python: milliseconds a token for a model with two
hundred of them. When the graph is traced, the weight that it makes leaves nothing but what is done with its parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from mxcompile.kernels.layout.planes import Scaling
from mxcompile.tensor.weight import MXLayout, MXWeight

CACHEABLE: Final = {f"{__name__}.weight_of": "1"}
"""For torch's cache of compiled graphs: the function that graphs call is known by its arguments. Change the number with
what it does."""


def unwrap_weights(
    module: GraphModule, values: Sequence[Any], source_of: Callable[[Any, str], Any]
) -> tuple[GraphModule, list[Any]]:
    """A graph of Dynamo's as one that takes weights in parts, and its inputs, given those of the first.

    source_of: Dynamo's source of an attribute, given that of the weight and the attribute's name.
    """
    graph, copies, parts = Graph(), dict[Node, Node](), dict[Node, list[Node]]()
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, values, strict=True):
        if isinstance(value, MXWeight):
            example: MXWeight = node.meta["example_value"]
            named = zip(example.__tensor_flatten__()[0], example.parts, strict=True)
            parts[node] = [
                _input(graph, node, part, source_of(_source(node), name), f"{node.name}_{name}") for name, part in named
            ]
        else:
            copies[node] = _input(graph, node, node.meta["example_value"], _source(node), str(node.target))
    for node, value in zip(placeholders, values, strict=True):
        if node in parts:
            layout, planes = replace(value.layout_, planes=None), value.layout_.planes
            args = (parts[node], astuple(layout), planes and tuple(planes), value.dtype)
            copies[node] = graph.call_function(weight_of, args)
    for node in module.graph.nodes:
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return _like(module, graph), unwrapped(values)


def unwrapped(values: Sequence[Any]) -> list[Any]:
    """Arguments with the parts of a weight in its place."""
    flat: list[Any] = []
    for value in values:
        if type(value) is MXWeight:
            flat += value.parts
        else:
            flat.append(value)
    return flat


def weight_of(
    parts: Sequence[Tensor], layout: tuple[Any, ...], planes: Sequence[int] | None, dtype: torch.dtype
) -> Any:
    """The MXWeight of these parts; layout: the fields of its MXLayout, but for `planes`."""
    elements, scales, *multiplier = parts
    spec = replace(MXLayout(*layout), planes=None if planes is None else Scaling(*planes))
    return MXWeight(elements, scales, spec, dtype, *multiplier)


def _input(graph: Graph, node: Node, value: Any, source: Any, name: str) -> Node:
    """An input that says of itself what one of Dynamo's does; its value is one without data, or it would be kept."""
    made: Any = graph.placeholder(name)
    made.meta = {"example_value": value}
    if "tensor_dict" in node.meta:
        made.meta["tensor_dict"] = node.meta["tensor_dict"]
    made._dynamo_source = source
    return made


def _source(node: Node) -> Any:
    return getattr(node, "_dynamo_source", None)


def _like(module: GraphModule, graph: Graph) -> GraphModule:
    """The graph with a module's attributes, and what AOTAutograd asks a module of Dynamo's for."""
    made: Any = GraphModule(module, graph)
    made.meta = dict(module.meta)
    if (sources := getattr(module, "_param_name_to_source", None)) is not None:
        made._param_name_to_source = sources
    return made
