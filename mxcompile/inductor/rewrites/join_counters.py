"""length_1 += 1; length_2 += 1; ... -> foreach_add([length_1, length_2, ...], 1), on a GPU.

Every layer of a static cache counts its own tokens: a launch each for one number. Where layers are compiled apart, the
counters advance at the end of the graph, so that they meet there.
"""

import operator
from collections import Counter
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from mxcompile.graph.edit import create_call
from mxcompile.inductor.repeated_layers import memory_of

aten = torch.ops.aten
DEVICE: Final = "cuda"


def join_counters(graph: Graph) -> int:
    """Join all counters of a graph that advance by the same number, in place. Returns the number of joined calls."""
    groups: dict[int, list[tuple[Node, Node]]] = {}
    for copy in graph.find_nodes(op="call_function", target=aten.copy_.default):
        counter, total = copy.args[:2]
        is_sum = total.target is aten.add.Tensor and total.args[0] is counter and not total.kwargs
        if is_sum and isinstance(total.args[1], int) and set(total.users) == {copy} and _is_counter(counter):
            groups.setdefault(total.args[1], []).append((copy, total))
    return sum(_join(graph, step, pairs) for step, pairs in groups.items() if len(pairs) > 1)


def postpone_counters(graph: Graph) -> int:
    """Let all counters of a Dynamo graph that nothing reads later advance at its end. Returns how many do."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    sharing = Counter(map(memory_of, graph.nodes))
    (output,) = graph.find_nodes(op="output")
    advances = [
        node
        for node in graph.find_nodes(op="call_method", target="add_")
        if _advances_last(node, order) and sharing[memory_of(node)] == 2  # the counter and this result
    ]
    for node in advances:
        output.prepend(node)
    return len(advances)


def _advances_last(call: Node, order: dict[Node, int]) -> bool:
    """Whether a call adds a number to a counter, and is the last that reads it."""
    counter, *numbers = call.args
    is_sum = not call.users and not call.kwargs and [type(number) for number in numbers] == [int]
    return is_sum and _is_counter(counter) and max(counter.users, key=order.__getitem__) is call  # pyright: ignore


def _is_counter(node: Any) -> bool:
    value = node.meta.get("val", node.meta.get("example_value"))
    is_number = value is not None and value.dim() == 0 and value.dtype == torch.int64 and value.device.type == DEVICE
    return node.op == "placeholder" and is_number


def _join(graph: Graph, step: int, pairs: list[tuple[Node, Node]]) -> bool:
    with graph.inserting_before(pairs[0][0]):
        joined: Any = graph.call_function(aten._foreach_add.Scalar, ([copy.args[0] for copy, _ in pairs], step))
        joined.meta["val"] = [total.meta["val"] for _, total in pairs]
        for index, (_, total) in enumerate(pairs):
            total.replace_all_uses_with(create_call(graph, operator.getitem, joined, index))
            graph.erase_node(total)
    return True
