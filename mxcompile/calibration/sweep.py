"""Calibration segment by segment: all batches through one part of the graph, then through the next.

Between two segments each batch is held as the few values that are still to be read; statistics live as long as the
segment they are about. A pass that changes weights in between sees, in later segments, the effect of what it did.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch.fx import Node

from mxcompile.analysis.segments import Segment
from mxcompile.calibration.run import Observers, Runner, Values, arguments, showing, unshared
from mxcompile.inputs import Inputs
from mxcompile.program import Program


class Sweep:
    """Batches on their way through a Program.

    states: for every batch, the values known now that are still to be read. runner: what computes nodes; a variant of
    `Runner` shows later segments the model as that variant computes it.
    """

    def __init__(self, program: Program, batches: Iterable[Inputs], runner: Runner | None = None) -> None:
        self.runner = runner or Runner(program)
        self.states: list[Values] = [arguments(program, batch) for batch in batches]
        self._passed: set[Node] = set()

    def observe(self, segment: Segment, observers: Observers) -> None:
        """Show values of a segment to observers, and stay in front of it: computes no more than that needs."""
        last = max((place for place, node in enumerate(segment.nodes, start=1) if node in observers), default=0)
        for state in self.states:
            self._run(segment.nodes[:last], unshared(state, segment.nodes), observers, ())

    def values(self, segment: Segment, nodes: Sequence[Node]) -> Iterator[Values]:
        """Batch by batch, what some values of a segment, or carried to it, are; stays in front of it."""
        last = max((place for place, node in enumerate(segment.nodes, start=1) if node in nodes), default=0)
        inside = [node for node in nodes if node in segment.nodes]
        for state in self.states:
            made = self.runner.run_nodes(segment.nodes[:last], unshared(state, segment.nodes), None, inside)
            yield {node: state[node] for node in nodes if node in state} | made

    def advance(self, segment: Segment, observers: Observers | None = None) -> None:
        """Move all batches behind a segment, showing its values to observers on the way."""
        self._passed.update(segment.nodes)
        for index, state in enumerate(self.states):
            known = state | self._run(segment.nodes, state, observers or {}, segment.gives)
            self.states[index] = {node: value for node, value in known.items() if node.users.keys() - self._passed}

    def _run(self, nodes: Sequence[Node], state: Values, observers: Observers, wanted: Iterable[Node]) -> Values:
        show = showing(observers)
        for node in observers.keys() & state.keys():
            show(node, state[node])
        return self.runner.run_nodes(nodes, state, show, wanted)
