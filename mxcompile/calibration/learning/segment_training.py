"""Train the weights of one segment, rounded at every step, towards the outputs of the exact model.

Batches enter the segment as the quantized model has them (`TwinRun`). The target is the exact model's output, or what
the float weights would make of the same input, or a value between the two; for the last segment it may be the model's
predictions. An eighth of the batches is held out, and decides which state is kept.

Beside the program's own weights, which are the best state so far, a segment's weights are in memory rounded as they are
now, and three times more: as latents, offsets and gradients. That is 16 bytes a weight.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, cycle, islice, zip_longest

import torch
from torch import Tensor
from torch.fx import Node
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LinearLR

from mxcompile.analysis.matmuls import Matmul
from mxcompile.analysis.segments import Segment
from mxcompile.calibration.compared_outputs import ComparedOutputs, output_nodes
from mxcompile.calibration.learning.latent_weights import LatentWeight, Trained
from mxcompile.calibration.learning.losses import capped_error, kl_divergence_sum
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.altered_run import AlteredRun, Prepare
from mxcompile.calibration.runs.run import BoundBatch, Runner, for_autograd
from mxcompile.calibration.runs.twin_run import TwinRun
from mxcompile.errors import PassError
from mxcompile.graph.dataflow import compute_nodes
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import LossCurve

_CHECKS = 4  # how often the held-out batches are looked at


@dataclass(frozen=True)
class TrainingPlan:
    """steps: of `batch` calibration batches each. rate: of the optimizer at first; it falls to zero linearly.

    target: 1: the exact model's outputs; 0: those of the float weights on the quantized model's inputs. dropped: share
    of the tokens, those with the largest errors, that a step ignores. choices: how often scales are chosen anew.
    """

    trained: Trained
    steps: int
    rate: float
    batch: int
    target: float
    dropped: float
    choices: int


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on the held-out batches before and after training, NaN without such batches. curve: of both."""

    before: float
    after: float
    curve: LossCurve


class SegmentOutputs:
    """What a segment is trained towards: the values that later nodes read.

    `expect` gathers the targets; before it, the weights that `float_weights` names must not have been trained.
    """

    def __init__(self, program: Program, twin_run: TwinRun, segment: Segment) -> None:
        self.nodes: Sequence[Node] = segment.nodes
        self._program, self._twin_run, self._segment = program, twin_run, segment
        self.outputs: Sequence[Node] = tuple(n for n in segment.outputs if _is_float(n))
        self._targets: list[dict[Node, Tensor]] = []

    def expect(self, batches: Sequence[BoundBatch], float_weights: Mapping[str, Tensor], share: float) -> None:
        """Compute the targets of all batches. share: as `TrainingPlan.target`."""
        exact = self._twin_run.exact_batches(self._segment)
        runner = AlteredRun(self._program, {}, float_weights)
        for batch, other in zip(batches, exact, strict=True):
            ready, targets = self._twin_run.ready(batch), self._twin_run.ready(other).values
            exact_values = {node: targets.get(self._twin_run.exact_node(node)) for node in self.outputs}
            if share < 1:
                own = runner.run_nodes(self.nodes, ready.fork(self.nodes), None, self.outputs)
                self._targets.append({n: _between(own[n], exact_values[n], share) for n in self.outputs})
            else:
                self._targets.append({n: value for n, value in exact_values.items() if value is not None})

    def ready(self, batch: BoundBatch) -> BoundBatch:
        """A batch to be run with gradients, its values on the device."""
        ready = self._twin_run.ready(batch).fork(self.nodes)
        return replace(ready, values={node: for_autograd(value) for node, value in ready.values.items()})

    def loss(self, index: int, batch: BoundBatch, values: Mapping[Node, Tensor], dropped: float) -> Tensor:
        """The loss of one batch; `values`: of the outputs, of a run of the nodes."""
        losses: list[Tensor] = []
        for node, target in self._targets[index].items():
            if target.shape == values[node].shape:
                rows = [batch.visibility.rows(node, value) for value in (target, values[node])]
                losses.append(capped_error(rows[0], rows[1], dropped))
        return torch.stack(losses).sum() if losses else torch.zeros(())


class Predictions(SegmentOutputs):
    """What the last segment is trained towards: the logits of the model."""

    def __init__(self, program: Program, twin_run: TwinRun, segment: Segment) -> None:
        super().__init__(program, twin_run, segment)
        compared = ComparedOutputs(twin_run.exact)
        passed = {node for other in twin_run.segments for node in other.nodes}
        tail = [node for node in compute_nodes(program.graph.nodes) if node not in passed]
        self.nodes = (*segment.nodes, *tail)
        names = [name for name, node in compared.nodes.items() if compared.is_logits(node.meta["val"].shape)]
        self.outputs = tuple(output_nodes(program)[name] for name in names)
        self._tail = [twin_run.exact_node(node) for node in tail]
        self._exact: list[BoundBatch] = []
        self._teacher = Runner(twin_run.exact)

    def expect(self, batches: Sequence[BoundBatch], float_weights: Mapping[str, Tensor], share: float) -> None:
        """Keep the exact model's batches behind the segment."""
        del batches, float_weights, share
        self._exact = self._twin_run.exact_batches(self._segment)

    def loss(self, index: int, batch: BoundBatch, values: Mapping[Node, Tensor], dropped: float) -> Tensor:
        """Mean KL(exact || now) of the visible tokens."""
        del dropped
        exact, twins = self._twin_run.ready(self._exact[index]), map(self._twin_run.exact_node, self.outputs)
        expected = self._teacher.run_nodes(self._tail, exact.fork(self._tail), None, twins)
        losses: list[Tensor] = []
        for node, target in zip(self.outputs, expected.values(), strict=True):
            rows = [batch.visibility.rows(node, value) for value in (target, values[node])]
            losses.append(kl_divergence_sum(rows[0], rows[1]) / max(1, rows[0][..., 0].numel()))
        return torch.stack(losses).sum()


class SegmentTraining:
    """weights: those in training, by matmul. importance: of their input channels, by the weights' names.

    batches: as they enter the segment. aim: what they are trained towards, which has its targets. keep: called where
    the weights are better on the held-out batches than before.

    Of several processes, each has some of the batches. Steps take them from one process after the other, and gradients
    and losses are summed, so that all processes change their weights alike.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[Matmul, LatentWeight],
        importance: Mapping[str, Tensor],
        prepare: Mapping[Matmul, Prepare],
        batches: Sequence[BoundBatch],
        aim: SegmentOutputs,
        plan: TrainingPlan,
        keep: Callable[[], None],
    ) -> None:
        self._weights, self._importance, self._aim, self._plan, self._keep = weights, importance, aim, plan, keep
        self._batches = list(batches)
        self._program, self._student, self._prepare = program, AlteredRun(program, prepare), prepare
        self._losses: list[tuple[int, float]] = []
        self._ranks = ranks_of(program)
        self._counts = self._ranks.gather(len(self._batches))
        self._before = sum(self._counts[: self._ranks.number])

    def train(self) -> HeldOutLoss:
        """Train, and keep the state with the least loss on the held-out batches, if that is not the first.

        Raises PassError, which names the step, if the loss becomes NaN or infinite.
        """
        total = sum(self._counts)
        held = range(total - max(1, total // 8), total)
        if total < 2:
            return HeldOutLoss(math.nan, math.nan, LossCurve((), ()))
        before = least = self._mean_loss(held)
        held_out = [(0, before)]
        for step in self._steps(held.start):
            loss = self._mean_loss(held)
            held_out.append((step, loss))
            if loss < least:
                least = loss
                self._keep()
        return HeldOutLoss(before, least, LossCurve(tuple(self._losses), tuple(held_out)))

    def _steps(self, count: int) -> Iterator[int]:
        """Train on the first `count` batches; yields the steps done, `_CHECKS` times."""
        plan, parameters = self._plan, [weight.parameter for weight in self._weights.values()]
        optimizer = (SGD if plan.trained is Trained.ROUNDING else Adam)(parameters, lr=plan.rate)
        schedule = LinearLR(optimizer, 1.0, 0.0, plan.steps)
        order = cycle(_in_turn(self._counts, count))
        checks, choices = _ends(plan.steps, _CHECKS), _ends(plan.steps, plan.choices + 1)[:-1]
        for step in range(1, plan.steps + 1):
            loss = self._backward(list(islice(order, plan.batch)))
            self._note(step, loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            for matmul, weight in self._weights.items():
                weight.keep_bound()
                if step in choices:
                    weight.choose_exponents(self._importance[matmul.parameter])
            if step in checks:
                yield step

    def _note(self, step: int, loss: float) -> None:
        """Keep the loss of a step. Raises PassError if it is not finite."""
        if not math.isfinite(loss):
            first = next(iter(self._weights))
            raise PassError(
                f"the loss is {loss} at step {step} of {self._plan.steps}, in the segment of {where(first.node)}: take "
                f"a smaller rate than {self._plan.rate:g}; at step 1, look at the batches"
            )
        self._losses.append((step, loss))
        self._program.loss = loss

    def _backward(self, indices: Sequence[int]) -> float:
        """Give all weights the gradient of the loss on some batches; returns its mean."""
        total = 0.0
        rounded = {matmul: weight.values().requires_grad_() for matmul, weight in self._weights.items()}
        for index in self._own(indices):
            loss = self._loss(index, rounded, gradients=True)
            total += loss.item()
            if loss.requires_grad:
                loss.backward()  # pyright: ignore[reportUnknownMemberType]
        gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in rounded.values()]
        del rounded
        self._student.change(self._prepare, {})
        gradients = self._ranks.sum_all(gradients)[::-1]
        for weight in self._weights.values():
            weight.backward(gradients.pop())
        return self._mean(total, indices)

    def _mean_loss(self, indices: Sequence[int]) -> float:
        """The weighted mean of the losses on some batches."""
        rounded = {matmul: weight.values() for matmul, weight in self._weights.items()}
        total = sum(self._loss(index, rounded, gradients=False).item() for index in self._own(indices))
        self._student.change(self._prepare, {})
        return self._mean(total, indices)

    def _mean(self, total: float, indices: Sequence[int]) -> float:
        """The weighted mean of losses on some batches of all processes. total: of those that this process has."""
        weight = sum(self._batches[index].visibility.weight for index in self._own(indices))
        sums = self._ranks.gather((total, weight))
        return sum(total for total, _ in sums) / sum(weight for _, weight in sums)

    def _own(self, indices: Sequence[int]) -> list[int]:
        """Those of some batches that this process has, counted from its first."""
        return [i - self._before for i in indices if 0 <= i - self._before < len(self._batches)]

    def _loss(self, index: int, rounded: Mapping[Matmul, Tensor], *, gradients: bool) -> Tensor:
        tensors = {matmul.parameter: matmul.rows(values) for matmul, values in rounded.items()}
        self._student.change(self._prepare, tensors)
        self._student.gradients = gradients
        with torch.set_grad_enabled(gradients):
            batch = self._aim.ready(self._batches[index])
            values = self._student.run_nodes(self._aim.nodes, batch, None, self._aim.outputs)
            dropped = self._plan.dropped if gradients else 0.0
            return self._aim.loss(index, batch, values, dropped) * batch.visibility.weight


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _between(own: Tensor, exact: Tensor | None, share: float) -> Tensor:
    return own if exact is None or exact.shape != own.shape else own.lerp(exact, share)


def _in_turn(counts: Sequence[int], limit: int) -> list[int]:
    """The first `limit` batches, one from each process in turn. counts: how many consecutive ones each process has."""
    ends = list(accumulate(counts))
    parts = [range(end - count, min(end, limit)) for end, count in zip(ends, counts, strict=True)]
    return [index for turn in zip_longest(*parts) for index in turn if index is not None]


def _ends(steps: int, parts: int) -> list[int]:
    """The steps at the ends of so many equal parts."""
    return [steps * (index + 1) // parts for index in range(parts)]
