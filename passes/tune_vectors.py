"""norm(x) * g + b -> norm(x) * g' + b': vectors trained so that the quantized model predicts what the float model does.

All norm weights and biases (the one-dimensional parameters, some ten thousand numbers) are trained on calibration data,
with rounded weights and inputs rounded as at run time, to minimize the KL divergence between the predictions of the
float model and the quantized model. A trained norm weight costs nothing at run time and affects everything that reads
the norm. Norm Tweaking (Li et al., arXiv 2309.02784) trains layer by layer; this pass trains the whole model at once.
"""

from dataclasses import dataclass
from typing import Annotated

from mxcompile.analysis.choice import choose
from mxcompile.calibration.learning.distilled import distill
from mxcompile.calibration.learning.schedule import Schedule
from mxcompile.calibration.learning.trained_tensors import TrainedVectors
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program
from mxcompile.graph.records import Miss, PassResult
from mxcompile.pipeline.interfaces import FLOATING, Pass
from mxcompile.pipeline.options import Range


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
        names = [n for n in program.parameter_names() if program.is_parameter(n) and program.stored(n).dim() == 1]
        vectors = {name: program.tensor(name).detach() for name in names}
        if program.origin is not None and not (vectors and choose(program).matmuls):
            return PassResult(0)
        schedule = Schedule(self.steps, self.rate)
        result = distill(program, self.name, lambda: TrainedVectors(vectors), vectors, self.activation, schedule)
        numbers = {f"{name} vectors": losses for name, losses in result.losses.items()}
        curves = {f"{name} vectors": curve for name, curve in result.curves.items()}
        if result.tensors is None:
            unchanged = Miss(f"{len(names)} vectors", f"{result.reason}: they stay unchanged")
            return PassResult(0, (unchanged, *result.left_out), numbers, curves=curves)
        for name, vector in result.tensors.items():
            program.set_tensor(name, vector)
        return PassResult(len(names), result.left_out, numbers, curves=curves)
