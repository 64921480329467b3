"""One Dynamo graph -> head, layer, tail: compiled apart, the layer once, and run in turn.

graph(x, w0, w1, ... wn) -> tail(layer(... layer(head(x, w0), w1) ..., wn))
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols

from mxcompile.inductor.private_api import own_symbol
from mxcompile.inductor.repeated_layers import find_repetition, sources
from mxcompile.inductor.rewrites.join_counters import postpone_counters
from mxcompile.inductor.rewrites.share_masks import share_masks
from mxcompile.inductor.unwrap_weights import like, weight_of

logger = logging.getLogger(__name__)
Compiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Piece:
    """A part of a graph: its calls, the nodes it takes (inputs of the whole graph, or results of other pieces) and the
    nodes it gives."""

    module: GraphModule
    inputs: tuple[Node, ...]
    results: tuple[Node, ...]


@dataclass(frozen=True)
class _Step:
    """call(values at `reads`) -> values at `writes`; `frees`: values that nothing reads any more."""

    call: Callable[..., Any]
    reads: Callable[[list[Any]], tuple[Any, ...]]
    writes: slice
    frees: tuple[int, ...]


class LayersInTurn:
    """A compiled graph whose equal layers are one compiled function. repetitions: how many of them it runs."""

    def __init__(self, steps: Sequence[_Step], results: Sequence[Any], size: int, repetitions: int) -> None:
        self._steps, self._results, self._size, self.repetitions = steps, results, size, repetitions

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the pieces. Returns the results of the whole graph."""
        values: list[Any] = [*inputs, *[None] * (self._size - len(inputs))]
        for step in self._steps:
            values[step.writes] = step.call(*step.reads(values))
            for index in step.frees:
                values[index] = None
        return [values[part] if isinstance(part, int) else part[0] for part in self._results]


def compile_in_pieces(module: GraphModule, inputs: Sequence[Any], compile_: Compiler) -> LayersInTurn | None:
    """Compile a graph whose MX weights are unwrapped; its equal layers once. None if it has none.

    inputs: example inputs of the graph. compile_: compiles one piece.
    """
    if postpone_counters(module.graph) + share_masks(module.graph):
        module.recompile()
    run = find_repetition(module.graph, _is_input)
    if run is None:
        logger.info("no equal layers: a graph of %d calls is compiled as a whole", len(module.graph.nodes))
        return None
    logger.info("%d equal layers of %d calls are compiled once", run.count, run.period)
    placeholders = module.graph.find_nodes(op="placeholder")
    (output,) = module.graph.find_nodes(op="output")
    values = dict(zip(placeholders, inputs, strict=True))
    numbers = [node for node in placeholders if isinstance(node.meta.get("example_value"), torch.SymInt)]
    first, *bodies, last = run.calls[: run.start], *map(run.body, range(run.count)), run.calls[run.stop :]
    given = [_results(first), *(tuple(each[i] for i in run.outputs) for each in bodies), _results(last)]
    head = _piece(module, first, given[0], numbers)
    body = _piece(module, bodies[0], given[1], numbers)
    tail = _piece(module, last, given[-1], numbers)
    calls = [compile_(piece.module, [_example(node, values) for node in piece.inputs]) for piece in (head, body, tail)]
    pieces = [(calls[0], head.inputs, given[0])]
    symbols = body.inputs[: len(body.inputs) - len(_flat(run.operands[0]))]
    pieces += [(calls[1], (*symbols, *_flat(operands)), given[i + 1]) for i, operands in enumerate(run.operands)]
    pieces += [(calls[2], tail.inputs, given[-1])]
    return _plan(placeholders, pieces, output.args[0], run.count)


def _is_input(node: Node) -> bool:
    return node.op == "placeholder" or node.target is weight_of


def _results(calls: Sequence[Node]) -> tuple[Node, ...]:
    inside = set(calls)
    return tuple(node for node in calls if any(user not in inside for user in node.users))


def _flat(nodes: Sequence[Node]) -> list[Node]:
    """Values that a piece takes for the nodes that it reads: for an MX weight its component tensors."""
    flat: list[Node] = []
    for node in nodes:
        flat += node.args[0] if node.target is weight_of else [node]  # pyright: ignore
    return flat


def _outside(calls: Sequence[Node]) -> list[Node]:
    """The nodes that calls read from outside, in the order of their first use."""
    inside = set(calls)
    return list(dict.fromkeys(source for node in calls for source in sources(node) if source not in inside))


def _symbols(nodes: Sequence[Node], numbers: Sequence[Node]) -> list[Node]:
    """Of the inputs that are numbers, one for each symbol in the sizes of values."""
    values: list[Any] = [node.meta.get("example_value") for node in nodes]
    used = {symbol for value in values if isinstance(value, Tensor | torch.SymInt) for symbol in free_symbols(value)}
    return [node for node in numbers if own_symbol(node.meta["example_value"]) in used]


def _piece(module: GraphModule, calls: Sequence[Node], results: Sequence[Node], numbers: Sequence[Node]) -> Piece:
    graph, copies = Graph(), dict[Node, Node]()
    outside = _outside(calls)
    symbols = _symbols([*calls, *_flat(outside)], numbers)
    inputs = [*symbols, *_flat(outside)]
    made = [_placeholder(graph, node, f"input_{number}") for number, node in enumerate(inputs)]
    for node, copy in zip(inputs, made, strict=True):
        copies.setdefault(node, copy)
    parts = iter(made[len(symbols) :])
    for node in outside:
        if node.target is weight_of:
            copies[node] = graph.call_function(weight_of, ([next(parts) for _ in node.args[0]], *node.args[1:]))  # pyright: ignore
            copies[node].meta = dict(node.meta)
        else:
            next(parts)
    for node in calls:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return Piece(like(module, graph), tuple(inputs), tuple(results))


def _placeholder(graph: Graph, node: Node, name: str) -> Node:
    """An input of a piece. It has no source: the inputs of a layer come from another place each time."""
    placeholder: Any = graph.placeholder(name)
    placeholder.meta = {"example_value": node.meta["example_value"]}
    placeholder._dynamo_source = None
    return placeholder


def _example(node: Node, values: dict[Node, Any]) -> Any:
    return values[node] if node in values else node.meta["example_value"]


def _plan(
    inputs: Sequence[Node],
    pieces: Sequence[tuple[Callable[..., Any], Sequence[Node], Sequence[Node]]],
    output: Any,
    repetitions: int,
) -> LayersInTurn:
    place = {node: number for number, node in enumerate(inputs)}
    for _, _, results in pieces:
        place.update({node: len(place) + number for number, node in enumerate(results)})
    last = {node: number for number, (_, reads, _) in enumerate(pieces) for node in reads}
    kept = {node for node in output if isinstance(node, Node)}
    steps: list[_Step] = []
    for number, (call, reads, results) in enumerate(pieces):
        read = [place[node] for node in reads]
        start = place[results[0]] if results else 0
        frees = tuple(place[node] for node, index in last.items() if index == number and node not in kept)
        steps.append(_Step(call, _getter(read), slice(start, start + len(results)), frees))
    results = [place[part] if isinstance(part, Node) else (part,) for part in output]
    return LayersInTurn(steps, results, len(place), repetitions)


def _getter(indices: Sequence[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(indices) == 1:
        return lambda values: (values[indices[0]],)
    return itemgetter(*indices) if indices else lambda _: ()
