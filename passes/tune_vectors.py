"""norm(x) * g + b -> norm(x) * g' + b': vectors trained so that the rounded model says what the exact one says.

Every norm weight and bias (the parameters of one dimension: a few ten thousand numbers) is moved by gradient descent
on calibration data, weights staying rounded and inputs rounded as at run time, towards the least KL divergence of the
exact model's predictions from the quantized model's. A norm's weight costs nothing at run time and reaches everything
that reads it. Norm Tweaking (Li et al., arXiv 2309.02784) goes layer by layer; here it is the whole model at once.
"""

from dataclasses import dataclass
from functools import partial

from mxcompile.analysis.choice import choose
from mxcompile.calibration.altered import Altered
from mxcompile.calibration.training import Distillation, straight_through
from mxcompile.errors import PassError
from mxcompile.formats import MXFormat
from mxcompile.ledger import Miss, PassResult
from mxcompile.pipeline import FLOATING, Pass
from mxcompile.program import Program
from mxcompile.search import round_input


@dataclass(frozen=True)
class TuneVectors(Pass):
    """activation: format of matmul inputs at run time (none: float). steps: batches seen, one a step.

    rate: of Adam, in units of each vector's mean magnitude, falling to zero along a cosine. An eighth of the batches,
    one at least, is kept back (if there are two): without a gain there the vectors stay as they were.
    """

    activation: MXFormat | None = None
    steps: int = 64
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
        prepare = partial(straight_through, partial(round_input, self.activation))
        student = Altered(program, dict.fromkeys(matmuls, prepare))
        distillation = Distillation(program, student, program.origin)
        count = len(program.batches)
        kept_back = program.batches[count - max(1, count // 8) :]
        seen = program.batches[: count - len(kept_back)] or kept_back
        before = distillation.mean_loss(vectors, kept_back)
        trained = distillation.train(vectors, seen, self.steps, self.rate)
        after = distillation.mean_loss(trained, kept_back)
        numbers = {"all vectors": {"loss_before": before, "loss_after": after}}
        if not after < before:
            reason = f"training did not lower the loss ({before:.4g} to {after:.4g}): they stay as they were"
            return PassResult(0, (Miss(f"{len(names)} vectors", reason),), numbers)
        for name, vector in trained.items():
            program.set_tensor(name, vector)
        return PassResult(len(names), numbers=numbers)
