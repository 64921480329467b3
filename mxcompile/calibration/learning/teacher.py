"""Outputs of the float model for batches that come again and again: what enters its output head is kept.

Kept logits would take `vocabulary / hidden size` times the memory; from a kept value they are the same to the bit.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.calibration.runs.run import BoundBatch, Runner
from mxcompile.graph.binding import NodeValues
from mxcompile.graph.dataflow import compute_nodes, mutated_tensors
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program

_LARGEST_KEPT: Final = 4 << 30  # bytes, on the program's device


class Teacher:
    """program: the float model, which does not change. outputs: nodes that are asked for again and again.

    Whole forward passes are made for other nodes, where the outputs depend on more than what enters the head, where a
    mask hides rows, where the program's tensors lie in files, and behind the first 4 GiB.
    """

    def __init__(self, program: Program, outputs: Iterable[Node]) -> None:
        self._outputs = tuple(outputs)
        self._runner, self._nodes = Runner(program), compute_nodes(program.graph.nodes)
        changes = program.mapped is not None or bool(mutated_tensors(program.graph))
        self._head = None if changes else _head(program, self._outputs)
        self._tail = [] if self._head is None else _between(self._nodes, self._head, self._outputs)
        self._kept: dict[int, tuple[Inputs, Tensor]] = {}
        self._bytes = 0

    def values(self, batch: Inputs, bound: BoundBatch, nodes: Iterable[Node]) -> NodeValues:
        """The values of some nodes. bound: the batch as it enters the graph."""
        nodes = tuple(nodes)
        if self._head is None or bound.visibility.hides or not {*nodes} <= {*self._outputs}:
            return self._runner.run_nodes(self._nodes, bound, None, nodes)
        if id(batch) in self._kept:
            entering = BoundBatch({self._head: self._kept[id(batch)][1]}, bound.visibility, bound.buffers)
            return self._runner.run_nodes(self._tail, entering, None, self._outputs)
        values = self._runner.run_nodes(self._nodes, bound, None, (*self._outputs, self._head))
        self._keep(batch, values.pop(self._head))
        return values

    def _keep(self, batch: Inputs, value: Tensor) -> None:
        if self._bytes + value.nbytes <= _LARGEST_KEPT:
            self._bytes += value.nbytes
            self._kept[id(batch)] = batch, value


def _head(program: Program, outputs: Sequence[Node]) -> Node | None:
    """What enters the output head, if all outputs can be computed from it."""
    entering = {m.activation for m in find_matmuls(program)[0] if m.parameter in program.output_heads}
    if len(entering) != 1:
        return None
    (head,) = entering
    tail = _between(compute_nodes(program.graph.nodes), head, outputs)
    inputs = {source for node in tail for source in node.all_input_nodes if source.op != "get_attr"}
    complete = inputs <= {head, *tail} and set(outputs) <= {*tail}
    return head if complete else None


def _between(nodes: Sequence[Node], start: Node, outputs: Sequence[Node]) -> list[Node]:
    """The nodes, in order, that outputs need once the value of `start` is known, as far as they depend on it."""
    behind = {start}
    for node in nodes:
        if any(source in behind for source in node.all_input_nodes):
            behind.add(node)
    needed = {*outputs}
    for node in reversed(nodes):
        if node in needed and node in behind and node is not start:
            needed.update(node.all_input_nodes)
    return [node for node in nodes if node in needed and node in behind and node is not start]
