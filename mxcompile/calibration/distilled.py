"""Train tensors of a rounded Program towards the traced float model, and keep what held-out batches approve of."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.calibration.altered_run import AlteredRun
from mxcompile.calibration.distillation import Distillation
from mxcompile.calibration.quantizers import input_roundings, trainable_roundings
from mxcompile.calibration.run import visible_batches
from mxcompile.calibration.trained_tensors import TrainedTensors
from mxcompile.errors import PassError
from mxcompile.formats import MXFormat
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.graph.records import Miss

_SNAPSHOTS, _LARGEST_EPOCHS = 4, 5


@dataclass(frozen=True)
class Schedule:
    """steps: of one batch each; at most five epochs unless `repeats`. rate: Adam's at first; it decays to zero along a
    cosine. snapshots: how often the held-out batches are looked at."""

    steps: int
    rate: float
    snapshots: int = _SNAPSHOTS
    repeats: bool = False


@dataclass(frozen=True)
class Distilled:
    """tensors: the trained tensors, None if they stay as they are. reason: why. left_out: outputs that were not
    compared. losses: on the held-out batches before and after training."""

    tensors: dict[str, Tensor] | None
    reason: str = ""
    left_out: tuple[Miss, ...] = ()
    losses: dict[str, float] = field(default_factory=dict[str, float])


def distill(
    program: Program,
    name: str,
    make: Callable[[], TrainedTensors],
    originals: Mapping[str, Tensor],
    activation: MXFormat | None,
    schedule: Schedule,
) -> Distilled:
    """Train tensors to minimize KL(traced float model || program), inputs rounded as at run time.

    name: of the pass, for errors. make: returns what is trained; originals: the same tensors untrained. An eighth of
    the batches, at least one, is held out: the snapshot with the least loss on them is taken, if that is a gain.
    """
    if program.origin is None:
        raise PassError(f"{name} needs the traced float model: run it in a pipeline")
    if not schedule.steps:
        return Distilled(None, "steps=0")
    batches = visible_batches(program, program.batches)
    if len(batches) < 2:
        return Distilled(None, "training needs a held-out batch: give two or more calibration batches")
    roundings = input_roundings(program, choose(program).matmuls, activation)
    distillation = Distillation(program, AlteredRun(program, trainable_roundings(roundings)), program.origin)
    count = len(batches) - max(1, len(batches) // 8)
    best, losses = _best(distillation, make, originals, (batches[:count], batches[count:]), schedule)
    left_out = tuple(Miss(f"output {path}", f"not compared: {why}") for path, why in distillation.left_out.items())
    if math.isnan(losses["loss_before"]):
        return Distilled(None, "no output can be compared with the float model's", left_out)
    if best is None:
        change = f"({losses['loss_before']:.4g} to {losses['loss_after']:.4g})"
        return Distilled(None, f"training did not lower the loss {change}", left_out, losses)
    return Distilled(best, "", left_out, losses)


def _best(
    distillation: Distillation,
    make: Callable[[], TrainedTensors],
    originals: Mapping[str, Tensor],
    batches: tuple[Sequence[Inputs], Sequence[Inputs]],
    schedule: Schedule,
) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
    """The best snapshot on the held-out batches, None if the untrained tensors are better; and the losses there."""
    seen, held = batches
    before = distillation.mean_loss(originals, held)
    if math.isnan(before):
        return None, {"loss_before": before, "loss_after": before}
    best, least = None, math.inf
    steps = schedule.steps if schedule.repeats else min(schedule.steps, _LARGEST_EPOCHS * len(seen))
    for trained in distillation.train(make(), seen, steps, schedule.rate, min(schedule.snapshots, steps)):
        loss = distillation.mean_loss(trained, held)
        if loss < least:
            best, least = trained, loss
    return best if least < before else None, {"loss_before": before, "loss_after": least}
