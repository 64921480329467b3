"""Segments: a graph cut where little has to be carried on, so that calibration can go through it piece by piece.

A cut goes behind the node after which the fewest values are still to be read: in a language model the residual stream,
once an attention or an MLP has been added to it. What no parameter has touched (masks, position embeddings) is carried
along and does not count.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import SymInt
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul
from mxcompile.graph.dataflow import computing
from mxcompile.graph.program import Program

_INPUTS = 4


@dataclass(frozen=True)
class Segment:
    """nodes: a run of the graph's computing nodes. matmuls: the wanted ones among them. gives: values made in it that
    are read after it, in graph order.
    """

    nodes: tuple[Node, ...]
    matmuls: tuple[Matmul, ...]
    gives: tuple[Node, ...]

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The distinct values that its matmuls multiply, in order."""
        return tuple(dict.fromkeys(matmul.activation for matmul in self.matmuls))

    def reading(self, value: Node) -> tuple[Matmul, ...]:
        """Its matmuls that read a value."""
        return tuple(matmul for matmul in self.matmuls if matmul.activation is value)


def find_segments(
    program: Program, matmuls: Sequence[Matmul], uncut: Iterable[Collection[Node]] = ()
) -> tuple[Segment, ...]:
    """Cut the graph up to the last wanted matmul (and what follows it until the next cut) into segments.

    A segment holds matmuls with at most four different inputs, unless `uncut` demands more: sets of values, none of
    which may be carried from one segment to the next.
    """
    if not matmuls:
        return ()
    nodes = computing(program.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    carried = _carried(nodes, place, _from_parameters(program))
    bound = set[Node]().union(*uncut)
    by_node = {matmul.node: matmul for matmul in matmuls}
    segments: list[Segment] = []
    start = 0
    while any(node in by_node for node in nodes[start:]):
        end = _best_end(nodes, start, by_node, carried, bound)
        part = tuple(nodes[start:end])
        gives = tuple(node for node in part if _last_reader(node, place) >= end)
        segments.append(Segment(part, tuple(by_node[node] for node in part if node in by_node), gives))
        start = end
    return tuple(segments)


def _best_end(
    nodes: list[Node], start: int, wanted: dict[Node, Matmul], carried: list[set[Node]], bound: set[Node]
) -> int:
    """The first end of least carried values among those that give the segment one to four inputs.

    Where nothing can be cut so soon: among those that give it no more inputs than the first possible end.
    """
    best, least, most = len(nodes), None, _INPUTS
    inputs: set[Node] = set()
    for end in range(start + 1, len(nodes) + 1):
        matmul = wanted.get(nodes[end - 1])
        if matmul is not None:
            inputs.add(matmul.activation)
        if len(inputs) > most and least is not None:
            break
        values = carried[end - 1]
        if inputs and not values & bound and (least is None or len(values) < least):
            best, least, most = end, len(values), max(most, len(inputs))
    return best


def _from_parameters(program: Program) -> set[Node]:
    """Computed values that depend on a parameter."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            own = program.is_parameter(str(node.target))
        else:
            own = any(source in found for source in node.all_input_nodes)
        if own:
            found.add(node)
    return found


def _carried(nodes: list[Node], place: dict[Node, int], counted: set[Node]) -> list[set[Node]]:
    """For every node, the counted values made up to it that are read after it."""
    ends: dict[int, list[Node]] = {}
    result: list[set[Node]] = []
    alive: set[Node] = set()
    for index, node in enumerate(nodes):
        last = _last_reader(node, place)
        if last > index and node in counted and not isinstance(node.meta.get("val"), int | SymInt):
            alive = alive | {node}
            ends.setdefault(last, []).append(node)
        alive = alive - set(ends.pop(index, ()))
        result.append(alive)
    return result


def _last_reader(node: Node, place: dict[Node, int]) -> int:
    """Place of the last node that reads the value; behind all of them for the graph's output."""
    return max((place.get(user, len(place)) for user in node.users), default=-1)
