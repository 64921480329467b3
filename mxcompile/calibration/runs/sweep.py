"""Sequential calibration: run all batches through one segment of the graph, then through the next.

Between two segments, each batch is held as the few values that later segments read. A pass that changes weights between
two segments sees the effect in the inputs of later segments. If the program keeps its tensors in files, it also keeps
values there that would exceed `MappedTensors.states`.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.segments import Segment
from mxcompile.calibration.ranks.dealing import observing, own_batches
from mxcompile.calibration.runs.not_finite import check_statistics
from mxcompile.calibration.runs.run import BoundBatch, Observers, Runner, feed_observers
from mxcompile.calibration.statistics.observers import values_of
from mxcompile.graph.binding import NodeValues, bind_inputs, writes_in_place
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program


class Sweep:
    """Calibration batches on their way through a Program.

    Of several processes (`ranks/`), each runs its share of the batches, and observers get the statistics of all.

    batches: for every batch of this process, the computed values that nodes ahead still read, which of their rows
    count, and what it has written to buffers. runner: computes the nodes; a subclass of `Runner` (such as `AlteredRun`)
    also determines the inputs of later segments.
    """

    def __init__(self, program: Program, batches: Iterable[Inputs], runner: Runner | None = None) -> None:
        self.runner, batches = runner or Runner(program), tuple(batches)
        share, self._before = own_batches(program, batches)
        own = [batches[index] for index in share]
        self.batches = [BoundBatch.of(program, bind_inputs(program, batch), batch.weight) for batch in own]
        self._program, self._inputs = program, batches
        self._passed: set[Node] = set()
        self._bytes = [_bytes(batch.values) for batch in self.batches]
        self._may_keep = program.mapped is not None and not writes_in_place(program.graph.nodes)

    @property
    def states(self) -> list[NodeValues]:
        """For every batch, the computed values that nodes ahead still read."""
        return [batch.values for batch in self.batches]

    def observe(self, segment: Segment, observers: Observers) -> None:
        """Feed visible rows of a segment to observers without advancing; computes only the nodes that this needs.

        Raises InputError, as `advance` does, if a batch makes a statistic NaN or Inf.
        """
        nodes = _up_to(self._ahead(segment), observers)
        with observing(self._program, observers, self._before) as own:
            for state in self.batches:
                self._run(nodes, self.ready(state).fork(nodes), own, ())
        self._check(observers)

    def values(self, segment: Segment, nodes: Sequence[Node]) -> Iterator[NodeValues]:
        """Yield, for each batch, values of a segment or carried into it, all of their rows, without advancing."""
        ahead = _up_to(self._ahead(segment), nodes)
        inside = [node for node in nodes if node in ahead]
        for state in map(self.ready, self.batches):
            computed = self.runner.run_nodes(ahead, state.fork(ahead), None, inside) if ahead else {}
            yield {node: state.values[node] for node in nodes if node in state.values} | computed

    def approach(self, segment: Segment, value: Node, limit: int) -> None:
        """Advance all batches to just after a node of the segment, if they then hold at most `limit` bytes.

        This changes no result: later requests are computed from there. Otherwise the batches stay where they are. On a
        GPU they also do if they would exceed `MappedTensors.states`: values are computed again sooner than read from
        files.
        """
        mapped = self._program.mapped
        if mapped is not None and mapped.device.type != "cpu":
            limit = min(limit, mapped.states)
        nodes = _up_to(self._ahead(segment), [value])
        if nodes and self.batches:
            first = self._behind(nodes, self.ready(self.batches[0]).fork(nodes))
            if _bytes(first.values) * len(self.batches) <= limit:
                self._move(nodes, {}, first)

    def advance(self, segment: Segment, observers: Observers | None = None) -> None:
        """Run all batches through a segment, and feed its values and those carried into it to observers.

        Raises InputError, which names the batch, if the value of an observer is not finite.
        """
        with observing(self._program, observers or {}, self._before) as own:
            self._move(self._ahead(segment), own)
        self._check(observers or {})

    def ready(self, batch: BoundBatch) -> BoundBatch:
        """A batch of `batches` with its values on the device."""
        if not self._may_keep:
            return batch
        return replace(batch, values={n: _applied(self._program.in_use, value) for n, value in batch.values.items()})

    def _held(self, index: int, batch: BoundBatch) -> BoundBatch:
        """The batch as it is held until it runs on: its values in files if all would need too much memory."""
        self._bytes[index] = _bytes(batch.values)
        mapped = self._program.mapped
        if mapped is None or not self._may_keep or sum(self._bytes) <= mapped.states:
            return batch
        self._bytes[index] = 0
        keep = partial(mapped.keep, in_use=False)
        return replace(batch, values={node: _applied(keep, value) for node, value in batch.values.items()})

    def _check(self, observers: Observers) -> None:
        for node, kinds in observers.items():
            check_statistics(self._program, self._inputs, node, values_of(kinds))

    def _move(self, nodes: Sequence[Node], observers: Observers, first: BoundBatch | None = None) -> None:
        """Run all batches through some nodes; first: the first batch's state after them, if already computed."""
        for index, state in enumerate(self.batches):
            computed = first if index == 0 else None
            computed = self._behind(nodes, self.ready(state), observers) if computed is None else computed
            self.batches[index] = self._held(index, computed)
        self._passed.update(nodes)

    def _behind(self, nodes: Sequence[Node], state: BoundBatch, observers: Observers | None = None) -> BoundBatch:
        """The state of a batch after some nodes: the values that nodes ahead of it read."""
        passed = self._passed.union(nodes)
        outputs = [node for node in nodes if node.users.keys() - passed]
        values = state.values | self._run(nodes, state, observers or {}, outputs)
        return replace(state, values={node: value for node, value in values.items() if node.users.keys() - passed})

    def _ahead(self, segment: Segment) -> tuple[Node, ...]:
        """The nodes of a segment that the batches have not passed yet."""
        return tuple(node for node in segment.nodes if node not in self._passed)

    def _run(
        self, nodes: Sequence[Node], state: BoundBatch, observers: Observers, outputs: Iterable[Node]
    ) -> NodeValues:
        update = feed_observers(observers, state.visibility)
        for node in observers.keys() & state.values.keys():
            update(node, state.values[node])
        return self.runner.run_nodes(nodes, state, update, outputs)


def _up_to(nodes: Sequence[Node], wanted: Container[Node]) -> Sequence[Node]:
    """The nodes up to and including the last wanted one."""
    return nodes[: max((index for index, node in enumerate(nodes, start=1) if node in wanted), default=0)]


def _applied(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The result for a tensor; any other value, and a tensor that is larger than its memory, as it is."""
    return function(value) if isinstance(value, Tensor) and value.is_contiguous() else value


def _bytes(values: NodeValues) -> int:
    """Bytes of all tensors; storage shared by views counts once."""
    storages = [value.untyped_storage() for value in values.values() if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
