"""graph(weight) -> graph(elements, scales, multiplier): component tensors of an MXWeight become the graph's inputs.

Otherwise AOTAutograd flattens every weight at every call, in Python: milliseconds a token for a model with 200 of them.
The graph rebuilds the weight from its components; tracing leaves only the operations on these.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from mxcompile.inductor.private_api import lazy_graph_module
from mxcompile.kernels.layout.planes import PlanarScaling
from mxcompile.tensor.weight import MXLayout, MXWeight

CACHEABLE: Final = {f"{__name__}.weight_of": "2"}
"""Tells torch's cache of compiled graphs that `weight_of` depends on its arguments alone. Change the number with its
code."""


def unwrap_weights(
    module: GraphModule, values: Sequence[Any], source_of: Callable[[Any, str], Any]
) -> tuple[GraphModule, list[Any]]:
    """Rewrite a Dynamo graph to take component tensors instead of MX weights. Returns it and its example inputs.

    values: example inputs of the graph. source_of: makes Dynamo's source of an attribute from the source of the weight
    and the attribute's name.
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
    return like(module, graph), unwrapped(values)


def unwrapped(values: Sequence[Any]) -> list[Any]:
    """The arguments with each MXWeight replaced by its component tensors."""
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
    """Rebuild an MXWeight from its component tensors. layout: the fields of its MXLayout without `planes`."""
    elements, scales, *multiplier = parts
    spec = replace(MXLayout(*layout), planes=None if planes is None else PlanarScaling(*planes))
    return MXWeight(elements, scales, spec, dtype, *multiplier)


def _input(graph: Graph, node: Node, value: Any, source: Any, name: str) -> Node:
    """A placeholder with the metadata that Dynamo gives to one; its example value is fake, or it would stay alive."""
    placeholder: Any = graph.placeholder(name)
    placeholder.meta = {"example_value": value}
    if "tensor_dict" in node.meta:
        placeholder.meta["tensor_dict"] = node.meta["tensor_dict"]
    placeholder._dynamo_source = source
    return placeholder


def _source(node: Node) -> Any:
    return getattr(node, "_dynamo_source", None)


def like(module: GraphModule, graph: Graph) -> GraphModule:
    """A graph module with the attributes of `module`, and with what AOTAutograd reads from a Dynamo module."""
    like: Any = lazy_graph_module(module, graph)  # no code is written for a graph that is only taken apart
    like.meta = dict(module.meta)
    if (sources := getattr(module, "_param_name_to_source", None)) is not None:
        like._param_name_to_source = sources
    return like
