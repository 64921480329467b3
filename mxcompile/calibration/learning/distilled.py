"""Train tensors of a rounded Program towards the traced float model, and keep what held-out batches approve of."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.calibration.learning.aims import Aims
from mxcompile.calibration.learning.distillation import Distillation
from mxcompile.calibration.learning.schedule import Schedule
from mxcompile.calibration.learning.trained_tensors import TrainedTensors
from mxcompile.calibration.quantizers import input_roundings, trainable_roundings
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.altered_run import AlteredRun
from mxcompile.calibration.runs.run import visible_batches
from mxcompile.errors import PassError
from mxcompile.formats import MXFormat
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.graph.records import LossCurve, Miss

ALL = "all"


@dataclass(frozen=True)
class Distilled:
    """tensors: the trained tensors, None if they stay as they are. reason: why. left_out: outputs that were not
    compared, and why training ended early. losses: on the held-out batches before and after training, by what was
    trained: "all" or segments. curves: of them and of the steps."""

    tensors: dict[str, Tensor] | None
    reason: str = ""
    left_out: tuple[Miss, ...] = ()
    losses: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    curves: dict[str, LossCurve] = field(default_factory=dict[str, LossCurve])


def distill(
    program: Program,
    name: str,
    make: Callable[[], TrainedTensors],
    originals: Mapping[str, Tensor],
    activation: MXFormat | None,
    schedule: Schedule,
    aims: Aims | None = None,
) -> Distilled:
    """Train tensors to minimize KL(traced float model || program), inputs rounded as at run time.

    name: of the pass, for errors. make: returns what is trained; originals: the same tensors untrained. aims: what to
    minimize in its place. An eighth of the batches, at least one, is held out: the snapshot with the least loss on them
    is taken, if that is a gain.
    Raises PassError if the loss becomes NaN or infinite before the first snapshot, and for aims inside the model in
    several processes.
    """
    if program.origin is None:
        raise PassError(f"{name} needs the traced float model: run it in a pipeline")
    if not schedule.steps:
        return Distilled(None, "steps=0")
    aims = aims or Aims()
    if ranks_of(program).count > 1 and aims.terms:
        raise PassError(
            f"{name} compares values inside the model, which works in one process: take loss=kl, attention=0 and "
            "kurtosis=0, or start it without torchrun"
        )
    batches = _Batches.of(program, schedule.guard)
    if batches is None:
        own = f" beside the {schedule.guard} of another domain" if schedule.guard else ""
        return Distilled(None, f"training needs a held-out batch: give two or more calibration batches{own}")
    schedule = schedule.of(len(batches.seen))
    roundings = input_roundings(program, choose(program).matmuls, activation)
    distillation = Distillation(program, AlteredRun(program, trainable_roundings(roundings)), program.origin, aims)
    if not distillation.leave_out_unlike(batches.seen[0]):
        return Distilled(None, "nothing inside the model can be compared with the float model", _left_out(distillation))
    return _result(name, distillation, schedule, _search(distillation, make, originals, batches, schedule))


@dataclass(frozen=True)
class _Batches:
    """seen: to train on. held: held out, to choose the best state by. guard: of another domain."""

    seen: Sequence[Inputs]
    held: Sequence[Inputs]
    guard: Sequence[Inputs]

    @classmethod
    def of(cls, program: Program, guard: int) -> "_Batches | None":
        """Those of the program that have visible tokens, the last `guard` of another domain; None if too few."""
        count = len(program.batches) - guard
        batches = visible_batches(program, program.batches[:count]) if count > 0 else ()
        if len(batches) < 2:
            return None
        seen = len(batches) - max(1, len(batches) // 8)
        others = visible_batches(program, program.batches[count:]) if guard else ()
        return cls(batches[:seen], batches[seen:], others)


@dataclass(frozen=True)
class _Found:
    """best: the best state, None if the untrained one is. loss: its loss. held_out: (step, loss) of all states.

    refused: how many states had less loss on the held-out batches and more on those of the other domain.
    """

    best: dict[str, Tensor] | None
    loss: float
    held_out: list[tuple[int, float]]
    refused: int = 0


def _search(
    distillation: Distillation,
    make: Callable[[], TrainedTensors],
    originals: Mapping[str, Tensor],
    batches: _Batches,
    schedule: Schedule,
) -> _Found:
    """Train, and find the best state."""
    first = distillation.mean_loss(originals, batches.held)
    if math.isnan(first):
        return _Found(None, first, [(0, first)])
    most = distillation.mean_loss(originals, batches.guard) if batches.guard else math.inf
    best, least, refused, held_out = None, first, 0, [(0, first)]
    for step, trained in distillation.train(make(), batches.seen, schedule):
        loss = distillation.mean_loss(trained, batches.held)
        held_out.append((step, loss))
        if loss < least and batches.guard and distillation.mean_loss(trained, batches.guard) > most:
            refused += 1
        elif loss < least:
            best, least = trained, loss
    return _Found(best, least, held_out, refused)


def _result(name: str, distillation: Distillation, schedule: Schedule, found: _Found) -> Distilled:
    left_out = _left_out(distillation)
    before = found.held_out[0][1]
    if math.isnan(before):
        return Distilled(None, "no output can be compared with the float model's", left_out)
    curve = LossCurve(tuple(distillation.training_losses), tuple(found.held_out))
    left_out += _divergence(name, curve, schedule)
    if found.refused:
        reason = "more loss on the batches of the other domain than before training: not taken"
        left_out += (Miss(f"{found.refused} states", reason),)
    if found.best is not None:
        losses = {"loss_before": before, "loss_after": found.loss}
        return Distilled(found.best, "", left_out, {ALL: losses}, {ALL: curve})
    least = min((loss for _, loss in found.held_out[1:]), default=math.nan)
    losses = {"loss_before": before, "loss_after": least}
    reason = f"training did not lower the loss ({before:.4g} to {least:.4g})"
    return Distilled(None, reason, left_out, {ALL: losses}, {ALL: curve})


def _left_out(distillation: Distillation) -> tuple[Miss, ...]:
    left_out = distillation.left_out.items()
    return tuple(Miss(n if n.startswith("%") else f"output {n}", f"not compared: {why}") for n, why in left_out)


def _divergence(name: str, curve: LossCurve, schedule: Schedule) -> tuple[Miss, ...]:
    """Why training ended early. Raises PassError if there is no state from before."""
    step, loss = curve.training[-1] if curve.training else (0, 0.0)
    if math.isfinite(loss):
        return ()
    reason = f"the loss is {loss} at step {step} of {schedule.steps}"
    advice = f"take a smaller rate than {schedule.rate:g}, or a bound"
    if len(curve.held_out) < 2:
        raise PassError(f"{name}: {reason}, before any state could be kept: {advice}; at step 1, look at the batches")
    return (Miss(f"step {step}", f"{reason}, where training ended, and the best state before it is taken: {advice}"),)
