"""Knowledge distillation: train some tensors of a Program towards the outputs of another Program."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.calibration.altered_run import AlteredRun
from mxcompile.calibration.run import Runner, bind_inputs
from mxcompile.graph.dataflow import compute_nodes
from mxcompile.graph.inputs import Inputs, named_leaves
from mxcompile.graph.program import Program

_ROWS, _SMALLEST_UNIT = 1024, 1e-3


class Distillation:
    """student: runs `program`, whose tensors are trained. exact: the teacher, run unchanged."""

    def __init__(self, program: Program, student: AlteredRun, exact: Program) -> None:
        self._program, self._student, self._exact = program, student, exact
        matmuls = [matmul for matmul in find_matmuls(exact)[0] if matmul.parameter in exact.output_heads]
        self._heads = {int(matmul.node.meta["val"].shape[-1]) for matmul in matmuls}

    def loss(self, batch: Inputs) -> Tensor:
        """Mean KL(exact || student) for logits; relative squared error for other outputs. Summed over the outputs."""
        expected = self._outputs(self._exact, Runner(self._exact), batch)
        actual = self._outputs(self._program, self._student, batch)
        return torch.stack([self._distance(value, actual[name]) for name, value in expected.items()]).sum()

    def mean_loss(self, tensors: Mapping[str, Tensor], batches: Sequence[Inputs]) -> float:
        """Mean loss over batches with some tensors replaced by `tensors`."""
        self._student.tensors, self._student.gradients = dict(tensors), False
        return sum(self.loss(batch).item() for batch in batches) / len(batches)

    def train(
        self, tensors: Mapping[str, Tensor], batches: Iterable[Inputs], steps: int, rate: float, snapshots: int
    ) -> Iterator[dict[str, Tensor]]:
        """Train `tensors` with Adam on a cosine schedule; each moves in units of its mean magnitude.

        Yields the trained tensors `snapshots` times, at equal distances, the last time after the last step.
        """
        units = {name: tensor.abs().float().mean().clamp(min=_SMALLEST_UNIT) for name, tensor in tensors.items()}
        moves = {name: torch.zeros_like(t, dtype=torch.float32, requires_grad=True) for name, t in tensors.items()}
        optimizer = torch.optim.Adam(moves.values(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        def moved() -> dict[str, Tensor]:
            return {name: (t.float() + units[name] * moves[name]).to(t.dtype) for name, t in tensors.items()}

        snapshot_steps = {steps * (index + 1) // snapshots for index in range(snapshots)}
        for step, batch in enumerate(self._program.track(list(islice(cycle(batches), steps))), 1):
            self._student.tensors, self._student.gradients = moved(), True
            optimizer.zero_grad()
            self.loss(batch).backward()  # pyright: ignore[reportUnknownMemberType]
            optimizer.step()
            schedule.step()
            if step in snapshot_steps:
                yield {name: tensor.detach() for name, tensor in moved().items()}

    def _outputs(self, program: Program, runner: Runner, batch: Inputs) -> dict[str, Tensor]:
        """Logits by output name; all float outputs if the program has no output head."""
        output = program.graph.output_node()
        leaves = {name: leaf for name, leaf in named_leaves(output.args) if isinstance(leaf, Node)}
        floats = {
            n: v for n, v in leaves.items() if isinstance(v.meta["val"], Tensor) and v.meta["val"].is_floating_point()
        }
        heads = {n: v for n, v in floats.items() if v.meta["val"].shape[-1] in self._heads}
        outputs = heads or floats
        nodes = compute_nodes(program.graph.nodes)
        values = runner.run_nodes(nodes, bind_inputs(program, batch), None, outputs.values())
        return {name: values[node] for name, node in outputs.items()}

    def _distance(self, expected: Tensor, actual: Tensor) -> Tensor:
        if expected.shape[-1] not in self._heads:
            return (actual - expected).square().sum() / expected.square().sum()
        rows = zip(expected.flatten(0, -2).split(_ROWS), actual.flatten(0, -2).split(_ROWS), strict=True)
        return torch.stack([_kl_divergence(*pair) for pair in rows]).sum() / expected[..., 0].numel()


def straight_through(prepare: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """prepare(x) in the forward pass, the identity in the backward pass (straight-through estimator)."""
    return x + (prepare(x.detach()) - x.detach())


def _kl_divergence(expected: Tensor, actual: Tensor) -> Tensor:
    """KL(expected || actual) in nats, summed over rows of logits `[tokens, vocabulary]`."""
    log_p, log_q = expected.float().log_softmax(-1), actual.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()
