"""Calibration segment by segment: all batches through one part of the graph, then through the next.

Between two segments each batch is held as the few values that are still to be read; statistics live as long as the
segment they are about. A pass that changes weights in between sees, in later segments, the effect of what it did.
"""

from collections.abc import Container, Iterable, Iterator, Sequence

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.segments import Segment
from mxcompile.calibration.run import NodeValues, Observers, Runner, bind_inputs, copied_if_mutated, feed_observers
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program


class Sweep:
    """Batches on their way through a Program.

    states: for every batch, the values known now that are still to be read. runner: what computes nodes; a variant of
    `Runner` shows later segments the model as that variant computes it.
    """

    def __init__(self, program: Program, batches: Iterable[Inputs], runner: Runner | None = None) -> None:
        self.runner = runner or Runner(program)
        self.states: list[NodeValues] = [bind_inputs(program, batch) for batch in batches]
        self._passed: set[Node] = set()

    def observe(self, segment: Segment, observers: Observers) -> None:
        """Show values of a segment to observers, and stay in front of it: computes no more than that needs."""
        nodes = _up_to(self._ahead(segment), observers)
        for state in self.states:
            self._run(nodes, copied_if_mutated(state, nodes), observers, ())

    def values(self, segment: Segment, nodes: Sequence[Node]) -> Iterator[NodeValues]:
        """Batch by batch, what some values of a segment, or carried to it, are; stays in front of it."""
        ahead = _up_to(self._ahead(segment), nodes)
        inside = [node for node in nodes if node in ahead]
        for state in self.states:
            made = self.runner.run_nodes(ahead, copied_if_mutated(state, ahead), None, inside) if ahead else {}
            yield {node: state[node] for node in nodes if node in state} | made

    def approach(self, segment: Segment, value: Node, limit: int) -> None:
        """Move all batches to where a value of the segment has been made, if they then hold at most `limit` bytes.

        What is asked for later is computed from there, with the same result. Otherwise they stay where they are.
        """
        nodes = _up_to(self._ahead(segment), [value])
        if nodes and self.states:
            first = self._behind(nodes, copied_if_mutated(self.states[0], nodes))
            if _bytes(first) * len(self.states) <= limit:
                self._move(nodes, {}, first)

    def advance(self, segment: Segment, observers: Observers | None = None) -> None:
        """Move all batches behind a segment, showing its values to observers on the way (held or still to be made)."""
        self._move(self._ahead(segment), observers or {})

    def _move(self, nodes: Sequence[Node], observers: Observers, first: NodeValues | None = None) -> None:
        """Move all batches behind some nodes; first: what that makes of the first one, if it is known."""
        for index, state in enumerate(self.states):
            known = first if index == 0 else None
            self.states[index] = self._behind(nodes, state, observers) if known is None else known
        self._passed.update(nodes)

    def _behind(self, nodes: Sequence[Node], state: NodeValues, observers: Observers | None = None) -> NodeValues:
        """What a batch holds behind some nodes: what is read by others that it has not passed."""
        passed = self._passed.union(nodes)
        gives = [node for node in nodes if node.users.keys() - passed]
        known = state | self._run(nodes, state, observers or {}, gives)
        return {node: value for node, value in known.items() if node.users.keys() - passed}

    def _ahead(self, segment: Segment) -> tuple[Node, ...]:
        """The nodes of a segment that have not been passed."""
        return tuple(node for node in segment.nodes if node not in self._passed)

    def _run(
        self, nodes: Sequence[Node], state: NodeValues, observers: Observers, wanted: Iterable[Node]
    ) -> NodeValues:
        show = feed_observers(observers)
        for node in observers.keys() & state.keys():
            show(node, state[node])
        return self.runner.run_nodes(nodes, state, show, wanted)


def _up_to(nodes: Sequence[Node], wanted: Container[Node]) -> Sequence[Node]:
    """The nodes up to the last wanted one."""
    return nodes[: max((place for place, node in enumerate(nodes, start=1) if node in wanted), default=0)]


def _bytes(values: NodeValues) -> int:
    """Bytes of all tensors, of several views of one only once."""
    storages = [value.untyped_storage() for value in values.values() if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
