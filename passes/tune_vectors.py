"""norm(x) * g + b -> norm(x) * g' + b': vectors trained so that the rounded model says what the exact one says.

Every norm weight and bias (the parameters of one dimension: a few ten thousand numbers) is moved by gradient descent
on calibration data, weights staying rounded and inputs rounded as at run time, towards the least KL divergence of the
exact model's predictions from the quantized model's. A norm's weight costs nothing at run time and reaches everything
that reads it. Norm Tweaking (Li et al., arXiv 2309.02784) goes layer by layer; here it is the whole model at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.calibration.altered_run import AlteredRun
from mxcompile.calibration.distillation import Distillation, straight_through
from mxcompile.calibration.quantizers import round_input
from mxcompile.errors import PassError
from mxcompile.formats import MXFormat
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.graph.records import Miss, PassResult
from mxcompile.pipeline.interfaces import FLOATING, Pass

_LOOKS, _ROUNDS = 4, 5


@dataclass(frozen=True)
class TuneVectors(Pass):
    """activation: format of matmul inputs at run time (none: float).

    steps: batches seen, one a step; at most five rounds of all, as more fits the data rather than the model.
    rate: of Adam, in units of each vector's mean magnitude, falling to zero along a cosine.
    An eighth of the batches, one at least, is kept back: of four states on the way the one that does best there is
    taken, or none if that gains nothing.
    """

    activation: MXFormat | None = None
    steps: int = 128
    rate: float = 4e-3

    name = "tune-vectors"
    accepts = FLOATING

    def run(self, program: Program) -> PassResult:
        """Train all vectors that the graph reads, towards the model as traced."""
        if program.origin is None:
            raise PassError("tune-vectors needs the model as traced: run it in a pipeline")
        names = [n for n in program.parameter_names() if program.is_parameter(n) and program.tensor(n).dim() == 1]
        vectors = {name: program.tensor(name).detach() for name in names}
        matmuls = choose(program).matmuls
        if not vectors or not matmuls or self.steps < 1:
            return PassResult(0)
        if len(program.batches) < 2:
            return _left(names, "one batch of calibration data leaves none to check training on: give two or more")
        prepare = partial(straight_through, partial(round_input, self.activation))
        student = AlteredRun(program, dict.fromkeys(matmuls, prepare))
        best, losses = self._trained(Distillation(program, student, program.origin), vectors, program.batches)
        numbers = {"all vectors": losses}
        if best is None:
            change = f"({losses['loss_before']:.4g} to {losses['loss_after']:.4g})"
            return _left(names, f"training did not lower the loss {change}", numbers)
        for name, vector in best.items():
            program.set_tensor(name, vector)
        return PassResult(len(names), numbers=numbers)

    def _trained(
        self, distillation: Distillation, vectors: dict[str, Tensor], batches: Sequence[Inputs]
    ) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
        """The best state on batches kept back, None if the vectors as they are do better; losses there."""
        count = len(batches) - max(1, len(batches) // 8)
        before = distillation.mean_loss(vectors, batches[count:])
        best, least = None, math.inf
        steps = min(self.steps, _ROUNDS * count)
        for trained in distillation.train(vectors, batches[:count], steps, self.rate, min(_LOOKS, steps)):
            loss = distillation.mean_loss(trained, batches[count:])
            if loss < least:
                best, least = trained, loss
        return best if least < before else None, {"loss_before": before, "loss_after": least}


def _left(names: list[str], reason: str, numbers: dict[str, dict[str, float]] | None = None) -> PassResult:
    return PassResult(0, (Miss(f"{len(names)} vectors", f"{reason}: they stay as they were"),), numbers or {})
