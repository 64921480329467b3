"""Train tensors of a rounded Program segment by segment, towards what the segments of the traced float model return.

A batch enters a segment as the quantized model has it, so that a segment also makes up for errors before it. Only one
segment is run with gradients, and only its tensors are in training.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.finished_parts import load_part, save_part
from mxcompile.calibration.learning.aims import Compared
from mxcompile.calibration.learning.distilled import Distilled
from mxcompile.calibration.learning.inner_terms import InnerTerm, compared_term
from mxcompile.calibration.learning.schedule import Schedule, Training
from mxcompile.calibration.learning.trained_tensors import SCALES, TrainedTensors
from mxcompile.calibration.quantizers import input_roundings, trainable_roundings
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.altered_run import AlteredRun
from mxcompile.calibration.runs.backward_run import reached_by
from mxcompile.calibration.runs.run import BoundBatch, for_autograd
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.errors import PassError
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program
from mxcompile.graph.records import LossCurve, Miss

Make = Callable[[Sequence[str]], TrainedTensors]
"""From the names of some tensors to them in training."""


def distill_segments(
    program: Program,
    name: str,
    make: Make,
    originals: Mapping[str, Tensor],
    activation: MXFormat | None,
    schedule: Schedule,
    compared: Compared,
) -> Distilled:
    """Train tensors, each with the first segment that reads it; see `distilled.distill`.

    Tensors behind the last segment stay as they are. Raises PassError in several processes, and if the graph has other
    segments than the traced one.
    """
    if program.origin is None:
        raise PassError(f"{name} needs the traced float model: run it in a pipeline")
    if ranks_of(program).count > 1:
        raise PassError(f"{name}{{scope=segment}} works in one process: take scope=model, or start it without torchrun")
    if not schedule.steps or len(program.batches) < 2:
        few = "training needs a held-out batch: give two or more calibration batches"
        return Distilled(None, few if schedule.steps else "steps=0")
    run = _SegmentRun(program, name, program.origin, activation, compared)
    tensors, losses, curves = dict[str, Tensor](), dict[str, dict[str, float]](), dict[str, LossCurve]()
    left_out: list[Miss] = []
    for index, segment in enumerate(program.track(run.segments)):
        own = [n for n in originals if n not in tensors and _is_read(program, n, segment)]
        found = _restored(program, index)
        if found is None:
            found = run.train(index, make, own, schedule)
            save_part(program, f"{index:04}", found.tensors, [{"curve": asdict(found.curve), "reason": found.reason}])
        device = {n: originals[n.removesuffix(SCALES)].device for n in found.tensors}
        tensors |= {n: value.to(device[n]) for n, value in found.tensors.items()}
        where = f"segment {index + 1}"
        left_out += [Miss(where, f"{found.reason}: its tensors stay unchanged")] if found.reason and own else []
        if found.curve.held_out:
            held_out = [loss for _, loss in found.curve.held_out]
            losses[where] = {"loss_before": held_out[0], "loss_after": min(held_out)}
            curves[where] = found.curve
        run.advance(segment, tensors)
    behind = [n for n in originals if not any(_is_read(program, n, segment) for segment in run.segments)]
    left_out += [Miss(n, "no segment reads it: it stays unchanged") for n in behind]
    reason = "" if tensors else "training did not lower the loss of any segment"
    return Distilled(tensors or None, reason, tuple(left_out), losses, curves)


@dataclass(frozen=True)
class _Found:
    """tensors: the best ones, none if the untrained are. reason: why none."""

    tensors: dict[str, Tensor]
    curve: LossCurve
    reason: str = ""


class _SegmentRun:
    """The two models in lockstep; segments: of the one in training."""

    def __init__(
        self, program: Program, name: str, exact: Program, activation: MXFormat | None, compared: Compared
    ) -> None:
        matmuls = choose(program).matmuls
        nodes = {matmul.node.name for matmul in matmuls}
        self.segments = find_segments(program, matmuls)
        twins = find_segments(exact, [m for m in choose(exact).matmuls if m.node.name in nodes])
        if len(twins) != len(self.segments):
            raise PassError(f"{name}{{scope=segment}}: earlier passes changed the segments of the graph: scope=model")
        loss = compared.inner
        assert loss is not None
        roundings = input_roundings(program, matmuls, activation)
        self._program, self._name, self._twins = program, name, dict(zip(self.segments, twins, strict=True))
        self._plain, self._trainable = roundings, trainable_roundings(roundings)
        self._advancing, self._student = AlteredRun(program, roundings), AlteredRun(program, self._trainable)
        self._sweep, self._exact = Sweep(program, program.batches, self._advancing), Sweep(exact, program.batches)
        reached = reached_by(matmuls)
        outputs = {segment: [node for node in segment.outputs if node in reached] for segment in self.segments}
        self._terms = {segment: compared_term(exact, nodes, loss, 1.0) for segment, nodes in outputs.items()}

    def advance(self, segment: Segment, tensors: Mapping[str, Tensor]) -> None:
        """Run all batches through a segment. tensors: the trained ones so far."""
        self._advancing.change(self._plain, tensors)
        self._sweep.advance(segment)
        if segment in self._twins:
            self._exact.advance(self._twins.pop(segment))

    def train(self, index: int, make: Make, names: Sequence[str], schedule: Schedule) -> _Found:
        """Train the tensors of a segment; the batches must have come to it."""
        segment = self.segments[index]
        if not names:
            return _Found({}, LossCurve((), ()))
        self._exact.advance(self._twins.pop(segment))
        term, trained = self._terms[segment], make(names)
        term = term.without(term.unlike(*self._rows(segment, term, 0, trained.detached(), gradients=False)))
        if not term.nodes:
            return _Found({}, LossCurve((), ()), "what it returns is not the float model's: a pass has changed it")
        return self._search(segment, term, trained, schedule)

    def _search(self, segment: Segment, term: InnerTerm, trained: TrainedTensors, schedule: Schedule) -> _Found:
        count = len(self._sweep.batches)
        seen = cycle(range(count - max(1, count // 8)))
        held = range(count - max(1, count // 8), count)
        training = Training(trained, schedule.steps, schedule.rate)
        losses, best = list[tuple[int, float]](), dict[str, Tensor]()
        held_out = [(0, self._mean(segment, term, held, trained.detached()))]
        parts = min(schedule.snapshots, schedule.steps)
        checks = {schedule.steps * (part + 1) // parts for part in range(parts)}
        for step in range(1, schedule.steps + 1):
            losses.append((step, self._step(segment, term, next(seen), training)))
            if not math.isfinite(losses[-1][1]):
                raise PassError(
                    f"{self._name}: the loss is {losses[-1][1]} at step {step} of {schedule.steps} of a segment: take "
                    f"a smaller rate than {schedule.rate:g}; at step 1, look at the batches"
                )
            if step in checks:
                now = trained.detached()
                held_out.append((step, self._mean(segment, term, held, now)))
                best = now if held_out[-1][1] < min(loss for _, loss in held_out[:-1]) else best
        reason = "" if best else f"training did not lower the loss ({held_out[0][1]:.4g})"
        return _Found(best, LossCurve(tuple(losses), tuple(held_out)), reason)

    def _step(self, segment: Segment, term: InnerTerm, index: int, training: Training) -> float:
        with torch.enable_grad():
            expected, actual = self._rows(segment, term, index, training.trained.tensors(), gradients=True)
            loss = term.value(expected, actual)
            training.optimizer.zero_grad()
            self._program.loss = value = loss.item()
            if loss.requires_grad and math.isfinite(value):
                loss.backward()  # pyright: ignore[reportUnknownMemberType]
            training.trained.collect_gradients()
        training.optimizer.step()
        training.trained.keep_bounds()
        training.schedule.step()
        return value

    def _mean(self, segment: Segment, term: InnerTerm, indices: Sequence[int], tensors: Mapping[str, Tensor]) -> float:
        weights = [self._sweep.batches[index].visibility.weight for index in indices]
        rows = (self._rows(segment, term, index, tensors, gradients=False) for index in indices)
        losses = [term.value(*pair).item() * weight for pair, weight in zip(rows, weights, strict=True)]
        return sum(losses) / sum(weights)

    def _rows(
        self, segment: Segment, term: InnerTerm, index: int, tensors: Mapping[str, Tensor], *, gradients: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The visible rows of what the segment returns for a batch, in the float model and in that in training."""
        self._student.change(self._trainable, {**self._advancing.tensors, **tensors})
        self._student.gradients = gradients
        batch = self._sweep.ready(self._sweep.batches[index]).fork(segment.nodes)
        values = {node: for_autograd(value) for node, value in batch.values.items()} if gradients else batch.values
        batch = replace(batch, values=values)
        computed = self._student.run_nodes(segment.nodes, batch, None, term.nodes.values())
        exact = self._exact.ready(self._exact.batches[index]).values
        expected = {n: _visible(batch, term.nodes[n], exact[node]) for n, node in term.exact.items()}
        return expected, {n: _visible(batch, node, computed[node]) for n, node in term.nodes.items()}


def _visible(batch: BoundBatch, node: Node, value: Tensor) -> Tensor:
    return batch.visibility.rows(node, value)


def _is_read(program: Program, name: str, segment: Segment) -> bool:
    inside = set(segment.nodes)
    return any(user in inside for node in program.graph.find_nodes(op="get_attr", target=name) for user in node.users)


def _restored(program: Program, index: int) -> _Found | None:
    """What an interrupted run has found of a segment."""
    saved = load_part(program, f"{index:04}")
    return None if saved is None else _Found(saved[0], LossCurve.of(saved[1][0]["curve"]), saved[1][0]["reason"])
