"""Knowledge distillation: train some tensors of a Program towards the outputs of another Program."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from mxcompile.calibration.compared_outputs import ComparedOutputs, output_nodes
from mxcompile.calibration.learning.aims import Aims
from mxcompile.calibration.learning.inner_terms import NEXT_TOKENS, next_tokens
from mxcompile.calibration.learning.losses import kl_divergence_sum
from mxcompile.calibration.learning.schedule import Schedule, Training
from mxcompile.calibration.learning.teacher import Teacher
from mxcompile.calibration.learning.trained_tensors import TrainedTensors
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.altered_run import AlteredRun
from mxcompile.calibration.runs.run import BoundBatch, for_autograd
from mxcompile.graph.binding import NodeValues, bind_inputs
from mxcompile.graph.dataflow import compute_nodes, mutated_tensors
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program

_ZEROS = "zeros only in the float model"
_UNLIKE = "its values are not the float model's at all: an earlier pass has permuted, rotated or scaled them"


class Distillation:
    """Of several processes, each runs some rows of every batch, and losses and gradients are summed.

    student: runs `program`, whose tensors are trained. exact: the teacher, run unchanged. aims: what is minimized.
    comes_again: whether batches do; False: nothing of the teacher is kept for the next time.

    outputs: names of the outputs that are compared (`compared_outputs.py`). left_out: why others are not, by name;
    batches add to it. training_losses: (step, loss) of all steps of `train`; the last is not finite if it diverged.
    """

    def __init__(
        self,
        program: Program,
        student: AlteredRun,
        exact: Program,
        aims: Aims | None = None,
        *,
        comes_again: bool = True,
    ) -> None:
        self._program, self._student, self._exact, self._aims = program, student, exact, aims or Aims()
        self._ranks = ranks_of(program)
        self._compared = ComparedOutputs(exact)
        self.outputs = tuple(self._compared.nodes)
        self.training_losses: list[tuple[int, float]] = []
        self._rows = self._dealt_rows() if self._ranks.count > 1 else None
        self._nodes = compute_nodes(program.graph.nodes)
        self._teacher = Teacher(exact, self._compared.nodes.values() if comes_again else ())

    @property
    def left_out(self) -> dict[str, str]:
        """Why outputs are not compared, by name."""
        return self._compared.left_out

    def loss(self, batch: Inputs, expected: Mapping[str, Tensor] | None = None) -> Tensor | None:
        """Mean KL(exact || student) for logits; relative squared error for other outputs. Summed over the outputs.

        Or what else the aims say. Times the weight of the batch. None if no output of it can be compared (all zeros,
        NaN, or other tokens than the teacher's). Its gradient is that of the rows that this process has run. expected:
        what `expected` returns, to compare several students on one batch.
        """
        expected = self.expected(batch) if expected is None else expected
        actual = self._values(True, batch, self._aims.student_nodes)
        known: list[Tensor] = []
        if self._aims.predictions:
            outputs = {name: value for name, value in expected.items() if name in self.outputs}
            distances = {name: self._distance(name, value, actual[name]) for name, value in outputs.items()}
            known = self._known(distances) if self._ranks.count == 1 else self._known_together(distances)
            if not known:
                return None
        known += [term.value(expected, actual) for term in self._aims.terms]
        return torch.stack(known).sum() * batch.weight if known else None

    def expected(self, batch: Inputs) -> dict[str, Tensor]:
        """The teacher's outputs by name, and what else the aims compare."""
        return self._values(False, batch, self._aims.exact_nodes, self._aims.tokens)

    def leave_out_unlike(self, batch: Inputs) -> bool:
        """Leave out values inside the student that are not those of the teacher at all, judged on one batch.

        Returns whether anything is left to compare.
        """
        if not self._aims.exact_nodes:
            return self._aims.predictions or bool(self._aims.terms)
        self._student.gradients = False
        expected = self.expected(batch)
        actual = self._values(True, batch, self._aims.student_nodes)
        unlike = {name for term in self._aims.terms for name in term.unlike(expected, actual)}
        self.left_out.update(dict.fromkeys((f"%{name}" for name in sorted(unlike)), _UNLIKE))
        terms = (term.without(unlike) for term in self._aims.terms)
        self._aims = replace(self._aims, terms=tuple(term for term in terms if term.nodes))
        return self._aims.predictions or bool(self._aims.terms)

    def _known(self, distances: "Mapping[str, _Distance | str]") -> list[Tensor]:
        """The distances of the outputs that can be compared; the reasons against the others go to `left_out`."""
        known: list[Tensor] = []
        for name, distance in distances.items():
            if isinstance(distance, str):
                self._compared.leave_out(name, distance)
            elif isinstance(distance.unit, int):
                known.append(distance.error / max(1, distance.unit))
            elif not distance.unit:
                self._compared.leave_out(name, _ZEROS)
            else:
                known.append(distance.error / distance.unit)
        return known

    def _known_together(self, distances: "Mapping[str, _Distance | str]") -> list[Tensor]:
        """`_known` of all processes' rows, each with the gradient of this one's."""
        own = {n: d if isinstance(d, str) else (d.error.item(), float(d.unit)) for n, d in distances.items()}
        by_process = self._ranks.gather(own)
        known: list[Tensor] = []
        for name in self.outputs:
            reports = [each[name] for each in by_process if name in each]
            sums = [report for report in reports if not isinstance(report, str)]
            unit = sum(unit for _, unit in sums)
            if reasons := [report for report in reports if isinstance(report, str)]:
                self._compared.leave_out(name, reasons[0])
            elif not unit:
                self._compared.leave_out(name, _ZEROS)
            else:
                total, part = sum(error for error, _ in sums) / unit, distances.get(name)
                value = torch.tensor(total, dtype=torch.float32, device=self._ranks.device)
                if isinstance(part, _Distance):
                    share = part.error / unit
                    value = share + (value.to(share.device) - share.detach())
                known.append(value)
        return known

    def mean_loss(self, tensors: Mapping[str, Tensor], batches: Sequence[Inputs]) -> float:
        """Weighted mean of the batches' losses, some tensors replaced by `tensors`; NaN if none can be compared."""
        self._student.tensors, self._student.gradients = dict(tensors), False
        losses = [(loss.item(), batch.weight) for batch in batches if (loss := self.loss(batch)) is not None]
        return sum(loss for loss, _ in losses) / sum(weight for _, weight in losses) if losses else math.nan

    def train(
        self, trained: TrainedTensors, batches: Iterable[Inputs], schedule: Schedule
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Train tensors with Adam on a cosine schedule.

        Yields (step, trained tensors) as often as there are snapshots, at equal distances, the last time after the last
        step. Ends at a loss that is NaN or infinite. With a resume folder, training goes on after the last snapshot of
        an interrupted run.
        """
        steps = schedule.steps
        training = Training(trained, steps, schedule.rate)
        ends = [steps * (index + 1) // schedule.snapshots for index in range(schedule.snapshots)]
        finished = 0
        for end in ends:
            saved = training.load(self._program, f"{end:05}")
            if saved is None:
                break
            self.left_out.update(saved["left_out"] | self.left_out)
            self.training_losses = [(step, loss) for step, loss in saved["losses"]]
            finished = end
            yield end, trained.detached()
        order = cycle(batches)
        for step in self._program.track(range(1, steps + 1)):
            of_step = list(islice(order, schedule.batch))
            if step <= finished:
                continue
            loss = self._step(training, of_step)
            if loss is not None:
                self.training_losses.append((step, loss))
                self._program.loss = loss
                if not math.isfinite(loss):
                    return
            if step in ends:
                notes = {"left_out": self.left_out, "losses": self.training_losses}
                training.save(self._program, f"{step:05}", notes)
                yield step, trained.detached()

    def _step(self, training: Training, batches: Sequence[Inputs]) -> float | None:
        """One step on some batches, unless a loss is not finite; returns their mean loss, None if there is none."""
        trained, losses = training.trained, list[float]()
        with torch.enable_grad():
            self._student.tensors, self._student.gradients = trained.tensors(), True
            training.optimizer.zero_grad()
            for index, batch in enumerate(batches):
                loss = self._backward(batch, 1 / len(batches), again=index + 1 < len(batches))
                if loss is not None and not math.isfinite(loss):
                    return loss
                losses += [] if loss is None else [loss]
            if losses:
                trained.collect_gradients()
                self._sum_gradients(trained.parameters)
            training.optimizer.step()
        trained.keep_bounds()
        training.schedule.step()
        return sum(losses) / len(losses) if losses else None

    def _backward(self, batch: Inputs, share: float, *, again: bool) -> float | None:
        """Add a share of the gradient of one batch's loss, which is returned; None if there is nothing to train.

        again: the tensors in training, computed once, will be read by another batch.
        """
        loss = self.loss(batch)
        if loss is None or not self._ranks.any(loss.requires_grad):
            return None
        value = loss.item()
        if loss.requires_grad and math.isfinite(value):
            (loss * share).backward(retain_graph=again)  # pyright: ignore[reportUnknownMemberType]
        return value

    def _sum_gradients(self, tensors: Sequence[Tensor]) -> None:
        if self._ranks.count > 1:
            gradients = self._ranks.sum_all([torch.zeros_like(t) if t.grad is None else t.grad for t in tensors])
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient

    def _dealt_rows(self) -> str | None:
        """The size, as traced, of the dimension whose items processes divide: the first of all compared outputs.

        None if the outputs have none in common, or a graph writes to buffers: each process then runs all of a batch.
        """
        outputs = output_nodes(self._exact)
        firsts = [outputs[name].meta["val"].shape[0] for name in self.outputs]
        inputs = [node.meta.get("val") for node in self._exact.graph.find_nodes(op="placeholder")]
        shapes = [list(map(str, value.shape)) for value in inputs if isinstance(value, Tensor)]
        sizes = set(map(str, firsts))
        if len(sizes) != 1 or not isinstance(firsts[0], SymInt) or mutated_tensors(self._exact.graph):
            return None
        (size,) = sizes
        dealt, elsewhere = any(shape[:1] == [size] for shape in shapes), any(size in shape[1:] for shape in shapes)
        return size if dealt and not elsewhere else None

    def _own_rows(self, inputs: NodeValues) -> NodeValues:
        """The inputs of one batch with the rows that this process runs.

        Inputs whose first dimension has another symbol, as a mask's, are divided too if they have as many rows.
        """
        shapes = {n: list(n.meta["val"].shape) for n in inputs if isinstance(n.meta.get("val"), Tensor)}
        inner = {str(size) for shape in shapes.values() for size in shape[1:]}
        free = [n for n, shape in shapes.items() if isinstance(shape[0] if shape else 0, SymInt)]
        free = [n for n in free if str(shapes[n][0]) not in inner]
        count = next((len(inputs[n]) for n in free if str(shapes[n][0]) == self._rows), 0)
        if self._rows is None or any(len(inputs[n]) not in (1, count) for n in free):
            return inputs
        return {
            n: value[self._ranks.rows(count)] if n in free and len(value) == count else value
            for n, value in inputs.items()
        }

    def _values(
        self, of_student: bool, batch: Inputs, inner: Mapping[str, Node], tokens: Node | None = None
    ) -> dict[str, Tensor]:
        """The compared outputs and inner values by name, of student or teacher, without the rows that a mask hides."""
        program = self._program if of_student else self._exact
        every = output_nodes(program)
        outputs = {name: every[name] for name in self.outputs} | dict(inner)
        inputs = {n: for_autograd(value) for n, value in self._own_rows(bind_inputs(program, batch)).items()}
        if any(isinstance(value, Tensor) and value.dim() and not len(value) for value in inputs.values()):
            return {}
        bound = BoundBatch.of(program, inputs)
        if of_student:  # its program may be the teacher's, with other tensors
            values = self._student.run_nodes(self._nodes, bound, None, outputs.values())
        else:
            values = self._teacher.values(batch, bound, outputs.values())
        rows = {name: bound.visibility.rows(node, values[node]) for name, node in outputs.items()}
        if tokens is not None:
            logits = outputs[self.outputs[0]]
            ids = next_tokens(inputs[tokens], bound.visibility.elements(tokens, inputs[tokens]))
            rows[NEXT_TOKENS] = bound.visibility.rows(logits, ids)
        return rows

    def _distance(self, name: str, expected: Tensor, actual: Tensor) -> "_Distance | str":
        """The distance of an output, or why it cannot be compared."""
        if expected.shape != actual.shape:
            return f"{list(expected.shape)} in the float model, {list(actual.shape)} rounded"
        if expected.isnan().any():
            return "NaN in the float model"
        if self._compared.is_logits(expected.shape):
            return _Distance(kl_divergence_sum(expected, actual), expected[..., 0].numel())
        finite = expected.isfinite()
        energy = torch.where(finite, expected, 0.0).float().square().sum()
        return _Distance(torch.where(finite, actual - expected, 0.0).float().square().sum(), energy)


class _Distance(NamedTuple):
    """error: summed over rows. unit: their number, or the energy of the exact rows, by which it is divided."""

    error: Tensor
    unit: Tensor | int
