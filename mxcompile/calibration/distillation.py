"""Gradient descent on some tensors of a Program, towards what another Program says to the same batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.calibration.altered_run import AlteredRun
from mxcompile.calibration.run import Runner, bind_inputs
from mxcompile.graph.dataflow import computing
from mxcompile.graph.inputs import Inputs, named_leaves
from mxcompile.graph.program import Program

_ROWS, _SMALLEST_UNIT = 1024, 1e-3


class Distillation:
    """student: runs the program being trained. exact: what it is trained towards, run as it is."""

    def __init__(self, program: Program, student: AlteredRun, exact: Program) -> None:
        self._program, self._student, self._exact = program, student, exact
        matmuls = [matmul for matmul in find_matmuls(exact)[0] if matmul.parameter in exact.output_heads]
        self._heads = {int(matmul.node.meta["val"].shape[-1]) for matmul in matmuls}

    def loss(self, batch: Inputs) -> Tensor:
        """Mean KL(exact || student) of predictions; the relative squared error of outputs that are none."""
        wanted = self._outputs(self._exact, Runner(self._exact), batch)
        given = self._outputs(self._program, self._student, batch)
        return torch.stack([self._distance(value, given[name]) for name, value in wanted.items()]).sum()

    def mean_loss(self, tensors: Mapping[str, Tensor], batches: Sequence[Inputs]) -> float:
        """Mean loss over batches with other values for some tensors."""
        self._student.tensors, self._student.gradients = dict(tensors), False
        return sum(self.loss(batch).item() for batch in batches) / len(batches)

    def train(
        self, tensors: Mapping[str, Tensor], batches: Iterable[Inputs], steps: int, rate: float, looks: int
    ) -> Iterator[dict[str, Tensor]]:
        """Other values for tensors, found by Adam with a cosine schedule; each moves in units of its mean magnitude.

        Yields them as they are after each of `looks` equal parts of the steps.
        """
        units = {name: tensor.abs().float().mean().clamp(min=_SMALLEST_UNIT) for name, tensor in tensors.items()}
        moves = {name: torch.zeros_like(t, dtype=torch.float32, requires_grad=True) for name, t in tensors.items()}
        optimizer = torch.optim.Adam(moves.values(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        def moved() -> dict[str, Tensor]:
            return {name: (t.float() + units[name] * moves[name]).to(t.dtype) for name, t in tensors.items()}

        ends = {steps * (look + 1) // looks for look in range(looks)}
        for step, batch in enumerate(self._program.through(list(islice(cycle(batches), steps))), 1):
            self._student.tensors, self._student.gradients = moved(), True
            optimizer.zero_grad()
            self.loss(batch).backward()  # pyright: ignore[reportUnknownMemberType]
            optimizer.step()
            schedule.step()
            if step in ends:
                yield {name: tensor.detach() for name, tensor in moved().items()}

    def _outputs(self, program: Program, runner: Runner, batch: Inputs) -> dict[str, Tensor]:
        """Predictions of a program with output heads, else all float outputs, by their place."""
        output = program.graph.output_node()
        leaves = {name: leaf for name, leaf in named_leaves(output.args) if isinstance(leaf, Node)}
        floats = {
            n: v for n, v in leaves.items() if isinstance(v.meta["val"], Tensor) and v.meta["val"].is_floating_point()
        }
        heads = {n: v for n, v in floats.items() if v.meta["val"].shape[-1] in self._heads}
        wanted = heads or floats
        nodes = computing(program.graph.nodes)
        values = runner.run_nodes(nodes, bind_inputs(program, batch), None, wanted.values())
        return {name: values[node] for name, node in wanted.items()}

    def _distance(self, wanted: Tensor, given: Tensor) -> Tensor:
        if wanted.shape[-1] not in self._heads:
            return (given - wanted).square().sum() / wanted.square().sum()
        rows = zip(wanted.flatten(0, -2).split(_ROWS), given.flatten(0, -2).split(_ROWS), strict=True)
        return torch.stack([_divergence(*pair) for pair in rows]).sum() / wanted[..., 0].numel()


def straight_through(prepare: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """prepare(x), with the gradient of x."""
    return x + (prepare(x.detach()) - x.detach())


def _divergence(wanted: Tensor, given: Tensor) -> Tensor:
    log_p, log_q = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()
