"""Segments: a graph cut where few values are live, so that calibration can run it segment by segment.

A segment ends at the node behind which the fewest values are live: in a language model only the residual stream, once
an attention or an MLP has been added to it. Values that depend on no parameter (masks, position embeddings) do not
count.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import SymInt
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul
from mxcompile.graph.dataflow import compute_nodes
from mxcompile.graph.program import Program

_INPUTS = 4


@dataclass(frozen=True)
class Segment:
    """A run of consecutive computing nodes.

    matmuls: the wanted ones among them. outputs: the values made in it that later nodes read, in graph order.
    """

    nodes: tuple[Node, ...]
    matmuls: tuple[Matmul, ...]
    outputs: tuple[Node, ...]

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The distinct values that its matmuls multiply, in order."""
        return tuple(dict.fromkeys(matmul.activation for matmul in self.matmuls))

    def readers_of(self, value: Node) -> tuple[Matmul, ...]:
        """Its matmuls that read a value."""
        return tuple(matmul for matmul in self.matmuls if matmul.activation is value)


def find_segments(
    program: Program, matmuls: Sequence[Matmul], indivisible: Iterable[Collection[Node]] = ()
) -> tuple[Segment, ...]:
    """Cut the graph into segments, up to the last wanted matmul and what follows it until the next cut.

    A segment holds matmuls with at most four different inputs, unless `indivisible` forces more.
    indivisible: sets of values that must not be live across a cut.
    """
    if not matmuls:
        return ()
    nodes = compute_nodes(program.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    live = _live_after(nodes, position, _from_parameters(program))
    bound = set[Node]().union(*indivisible)
    by_node = {matmul.node: matmul for matmul in matmuls}
    segments: list[Segment] = []
    start = 0
    while any(node in by_node for node in nodes[start:]):
        end = _best_end(nodes, start, by_node, live, bound)
        run = tuple(nodes[start:end])
        outputs = tuple(node for node in run if _last_reader(node, position) >= end)
        segments.append(Segment(run, tuple(by_node[node] for node in run if node in by_node), outputs))
        start = end
    return tuple(segments)


def _best_end(
    nodes: list[Node], start: int, wanted: dict[Node, Matmul], live: list[set[Node]], bound: set[Node]
) -> int:
    """The first end with the fewest live values among those at which the segment has one to four inputs.

    If none of these is possible: among the ends at which it has no more inputs than at the first possible end.
    """
    best, least, most = len(nodes), None, _INPUTS
    inputs: set[Node] = set()
    for end in range(start + 1, len(nodes) + 1):
        matmul = wanted.get(nodes[end - 1])
        if matmul is not None:
            inputs.add(matmul.activation)
        if len(inputs) > most and least is not None:
            break
        values = live[end - 1]
        if inputs and not values & bound and (least is None or len(values) < least):
            best, least, most = end, len(values), max(most, len(inputs))
    return best


def _from_parameters(program: Program) -> set[Node]:
    """Computed values that depend on a parameter."""
    dependent: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            depends = program.is_parameter(str(node.target))
        else:
            depends = any(source in dependent for source in node.all_input_nodes)
        if depends:
            dependent.add(node)
    return dependent


def _live_after(nodes: list[Node], position: dict[Node, int], counted: set[Node]) -> list[set[Node]]:
    """For every node, the counted values made up to it that are read after it."""
    ends: dict[int, list[Node]] = {}
    result: list[set[Node]] = []
    alive: set[Node] = set()
    for index, node in enumerate(nodes):
        last = _last_reader(node, position)
        if last > index and node in counted and not isinstance(node.meta.get("val"), int | SymInt):
            alive = alive | {node}
            ends.setdefault(last, []).append(node)
        alive = alive - set(ends.pop(index, ()))
        result.append(alive)
    return result


def _last_reader(node: Node, position: dict[Node, int]) -> int:
    """Position of the last node that reads the value; that of the graph's output is behind all others."""
    return max((position.get(user, len(position)) for user in node.users), default=-1)
