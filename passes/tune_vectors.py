"""norm(x) * g + b -> norm(x) * g' + b': vectors trained so that the quantized model predicts what the float model does.

All norm weights and biases (the one-dimensional parameters, some ten thousand numbers) are trained on calibration data,
with rounded weights and inputs rounded as at run time, to minimize the KL divergence between the predictions of the
float model and the quantized model. A trained norm weight costs nothing at run time and affects everything that reads
the norm. Norm Tweaking (Li et al., arXiv 2309.02784) trains layer by layer; this pass trains the whole model at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.calibration.altered_run import AlteredRun
from mxcompile.calibration.distillation import Distillation, straight_through
from mxcompile.calibration.quantizers import input_roundings
from mxcompile.calibration.run import visible_batches
from mxcompile.errors import PassError
from mxcompile.formats import MXFormat
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.graph.records import Miss, PassResult
from mxcompile.pipeline.interfaces import FLOATING, Pass
from mxcompile.pipeline.options import Range

_SNAPSHOTS, _LARGEST_EPOCHS = 4, 5


@dataclass(frozen=True)
class TuneVectors(Pass):
    """activation: format of matmul inputs at run time (none: float).

    steps: training steps of one batch each; at most five epochs, because more overfits the calibration data.
    rate: Adam's learning rate in units of each vector's mean magnitude, decaying to zero along a cosine.
    An eighth of the batches, at least one, is held out: of four snapshots during training, the pass takes the one with
    the least loss on them, or none if that is no gain.
    Outputs that say nothing about predictions are left out, and reported: losses, integers, tokens that the model
    selects. Without any other output, the vectors stay unchanged.
    """

    activation: MXFormat | None = None
    steps: Annotated[int, Range(0)] = 128
    rate: Annotated[float, Range(0, above=True)] = 4e-3

    name = "tune-vectors"
    accepts = FLOATING

    def run(self, program: Program) -> PassResult:
        """Train all vectors that the graph reads towards the traced float model."""
        if program.origin is None:
            raise PassError("tune-vectors needs the traced float model: run it in a pipeline")
        names = [n for n in program.parameter_names() if program.is_parameter(n) and program.stored(n).dim() == 1]
        vectors = {name: program.tensor(name).detach() for name in names}
        matmuls = choose(program).matmuls
        if not vectors or not matmuls:
            return PassResult(0)
        if not self.steps:
            return _unchanged(names, "steps=0", [])
        batches = visible_batches(program, program.batches)
        if len(batches) < 2:
            return _unchanged(names, "training needs a held-out batch: give two or more calibration batches", [])
        roundings = input_roundings(program, matmuls, self.activation)
        prepare = {function: partial(straight_through, function) for function in {*roundings.values()}}
        student = AlteredRun(program, {matmul: prepare[function] for matmul, function in roundings.items()})
        distillation = Distillation(program, student, program.origin)
        best, losses = self._trained(distillation, vectors, batches)
        left_out = [Miss(f"output {name}", f"not compared: {why}") for name, why in distillation.left_out.items()]
        if math.isnan(losses["loss_before"]):
            return _unchanged(names, "no output can be compared with the float model's", left_out)
        numbers = {"all vectors": losses}
        if best is None:
            change = f"({losses['loss_before']:.4g} to {losses['loss_after']:.4g})"
            return _unchanged(names, f"training did not lower the loss {change}", left_out, numbers)
        for name, vector in best.items():
            program.set_tensor(name, vector)
        return PassResult(len(names), tuple(left_out), numbers)

    def _trained(
        self, distillation: Distillation, vectors: dict[str, Tensor], batches: Sequence[Inputs]
    ) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
        """The best snapshot on the held-out batches, None if the untrained vectors are better; and the losses there."""
        count = len(batches) - max(1, len(batches) // 8)
        before = distillation.mean_loss(vectors, batches[count:])
        if math.isnan(before):
            return None, {"loss_before": before, "loss_after": before}
        best, least = None, math.inf
        steps = min(self.steps, _LARGEST_EPOCHS * count)
        for trained in distillation.train(vectors, batches[:count], steps, self.rate, min(_SNAPSHOTS, steps)):
            loss = distillation.mean_loss(trained, batches[count:])
            if loss < least:
                best, least = trained, loss
        return best if least < before else None, {"loss_before": before, "loss_after": least}


def _unchanged(
    names: list[str], reason: str, left_out: list[Miss], numbers: dict[str, dict[str, float]] | None = None
) -> PassResult:
    return PassResult(0, (Miss(f"{len(names)} vectors", f"{reason}: they stay unchanged"), *left_out), numbers or {})
