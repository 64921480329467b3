"""Run batches forward, then backward segment by segment, and hand out the gradient of every matmul's output.

Only the values between two segments are kept; a segment is run again, with autograd, when its turn comes. The memory is
that of one segment of one batch, and of the hidden states between all segments.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.runs.run import BoundBatch, Runner
from mxcompile.graph.binding import NodeValues, bind_inputs, writes_in_place
from mxcompile.graph.dataflow import compute_nodes
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program

OnGradient: TypeAlias = Callable[[Matmul, NodeValues, Tensor], None]
"""Called with a matmul, the values that its node reads, and the gradient of its result."""
LossGradient: TypeAlias = Callable[[int, BoundBatch, NodeValues], dict[Node, Tensor]]
"""From the number of a batch, the batch, and the values of the outputs to the gradient of the loss by each of them."""


class BackwardRun:
    """segments: those of the matmuls, the last one first; `backward` takes them in this order.

    outputs: the values that the loss is a function of. loss: its gradient.
    """

    def __init__(
        self,
        program: Program,
        matmuls: Sequence[Matmul],
        batches: Iterable[Inputs],
        outputs: Sequence[Node],
        loss: LossGradient,
    ) -> None:
        forward = find_segments(program, matmuls)
        self.segments = forward[::-1]
        self._program, self._outputs, self._loss = program, tuple(outputs), loss
        self._runner = _RecordingRunner(program, matmuls)
        self._differentiable = reached_by(matmuls)
        inside = {node for segment in forward for node in segment.nodes}
        self._tail = tuple(node for node in compute_nodes(program.graph.nodes) if node not in inside)
        self._states: dict[Segment | None, list[BoundBatch]] = {segment: [] for segment in (*forward, None)}
        self._gradients: list[dict[Node, Tensor]] = []
        for batch in batches:
            self._forward(forward, BoundBatch.of(program, bind_inputs(program, batch), batch.weight))
        for index, batch in enumerate(self._states.pop(None)):
            self._gradients.append(self._backward(self._tail, batch, index, None))

    def forward(self, segment: Segment, nodes: Sequence[Node]) -> Iterator[tuple[BoundBatch, NodeValues]]:
        """Run all batches again through a segment that `backward` has not reached; yields the values of nodes."""
        for batch in self._states[segment]:
            made = [node for node in nodes if node not in batch.values]
            made_here = self._runner.run_nodes(segment.nodes, batch.fork(segment.nodes), None, made)
            yield batch, batch.values | made_here

    def backward(self, segment: Segment, on_gradient: OnGradient) -> Iterator[BoundBatch]:
        """Run all batches backward through the next segment; yields each when it is done."""
        self._runner.on_gradient = on_gradient
        for index, batch in enumerate(self._states.pop(segment)):
            self._gradients[index] = self._backward(segment.nodes, batch, index, self._gradients[index])
            yield batch

    def _forward(self, segments: Sequence[Segment], batch: BoundBatch) -> None:
        passed: set[Node] = set()
        for segment in segments:
            self._states[segment].append(batch.fork(segment.nodes))
            passed.update(segment.nodes)
            made = [node for node in segment.nodes if node.users.keys() - passed]
            values = batch.values | self._runner.run_nodes(segment.nodes, batch, None, made)
            batch = replace(batch, values={n: value for n, value in values.items() if n.users.keys() - passed})
        self._states[None].append(batch)

    def _backward(
        self, nodes: Sequence[Node], batch: BoundBatch, index: int, gradients: dict[Node, Tensor] | None
    ) -> dict[Node, Tensor]:
        """The gradients of the values that some nodes read, from those of what they make; None: from the loss."""
        leaves = {n: value.detach().requires_grad_() for n, value in batch.values.items() if self._flows(n, value)}
        read = {n: leaf.clone() for n, leaf in leaves.items()} if writes_in_place(nodes) else leaves
        inside = set(nodes)
        made = [node for node in (self._outputs if gradients is None else gradients) if node in inside]
        with torch.enable_grad():
            values = self._runner.run_with_gradients(nodes, replace(batch, values=batch.values | read), made)
        if gradients is None:
            carried = {node: batch.values[node] for node in self._outputs if node not in inside}
            gradients = self._loss(index, batch, {n: v.detach() for n, v in (values | carried).items()})
        pairs = [(values[node], gradients[node]) for node in made if node in gradients and values[node].requires_grad]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
        passed_on = {node: gradient for node, gradient in gradients.items() if node in leaves}
        for node, leaf in leaves.items():
            if leaf.grad is not None:
                passed_on[node] = leaf.grad + passed_on[node] if node in passed_on else leaf.grad
        return passed_on

    def _flows(self, node: Node, value: Any) -> bool:
        return node in self._differentiable and isinstance(value, Tensor) and value.is_floating_point()


class _RecordingRunner(Runner):
    """Calls `on_gradient` for the matmuls that take part in a backward pass."""

    def __init__(self, program: Program, matmuls: Iterable[Matmul]) -> None:
        super().__init__(program)
        self.on_gradient: OnGradient | None = None
        self._matmuls: Mapping[Node, Matmul] = {matmul.node: matmul for matmul in matmuls}

    def run_with_gradients(self, nodes: Sequence[Node], batch: BoundBatch, outputs: Sequence[Node]) -> NodeValues:
        """Compute nodes with autograd."""
        self.gradients = True
        try:
            return self.run_nodes(nodes, batch, None, outputs)
        finally:
            self.gradients = False

    def run_node(self, n: Node) -> Any:
        """Compute a node; the result of a matmul needs a gradient, also where no value before it does."""
        result = super().run_node(n)
        if n not in self._matmuls or not self.gradients or self.on_gradient is None:
            return result
        if not result.requires_grad:
            result = result + result.new_zeros(()).requires_grad_()
        values = {source: self.env[source] for source in n.all_input_nodes}
        result.register_hook(partial(self._record, self.on_gradient, self._matmuls[n], values))
        return result

    @staticmethod
    def _record(on_gradient: OnGradient, matmul: Matmul, values: NodeValues, gradient: Tensor) -> None:
        on_gradient(matmul, {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}, gradient)


def reached_by(matmuls: Iterable[Matmul]) -> set[Node]:
    """The nodes whose values depend on a matmul's."""
    reached: set[Node] = set()
    nodes = [matmul.node for matmul in matmuls]
    while nodes:
        node = nodes.pop()
        if node not in reached:
            reached.add(node)
            nodes.extend(node.users)
    return reached
