"""quantized model -> the same model, trained so that it predicts what the float model does.

Trained on calibration data, with weights and inputs rounded as at run time, to minimize the KL divergence between the
predictions of the traced float model and of the quantized one: quantization-aware distillation (QAD, arXiv 2601.20088),
without labels, so that any text serves. Rounded weights stay MX values at every step: a latent behind each element is
trained straight through the rounding (`latent_weights.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Final

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import Matmul
from mxcompile.calibration.distilled import Schedule, distill
from mxcompile.calibration.latent_weights import Trained
from mxcompile.calibration.trained_tensors import SCALES, RoundedWeight, TrainedTensors, TrainedVectors, TrainedWeights
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program, Rounding
from mxcompile.graph.records import Miss, PassResult
from mxcompile.pipeline.interfaces import FLOATING, Pass
from mxcompile.pipeline.options import Range


class Parts(Enum):
    """What is trained.

    vectors: norm weights and biases, as `tune-vectors` does. weights: the elements of rounded weights. exponents: the
    scales of rounded weights, by at most one power of two.
    """

    VECTORS = "vectors"
    WEIGHTS = "weights"
    EXPONENTS = "exponents"


_RATES: Final = {Parts.VECTORS: 4e-3, Parts.WEIGHTS: 0.02, Parts.EXPONENTS: 0.02}


@dataclass(frozen=True)
class Distill(Pass):
    """activation: format of matmul inputs at run time (none: float).

    train: see `Parts`; weights must have been rounded by an earlier pass. steps: of one batch each. rate: Adam's at
    first; it decays to zero along a cosine. In units of each vector's mean magnitude, of the distance of neighbouring
    elements, or of a power of two; none: 4e-3 for vectors, else 0.02.
    bound: the largest move in these units, if any. snapshots: how often held-out batches, an eighth of all, are looked
    at; of these states, the pass takes the one with the least loss on them, or none if that is no gain.
    """

    activation: MXFormat | None = None
    train: Parts = Parts.VECTORS
    steps: Annotated[int, Range(0)] = 500
    rate: Annotated[float | None, Range(0, above=True)] = None
    bound: Annotated[float | None, Range(0, above=True)] = None
    snapshots: Annotated[int, Range(1)] = 8

    name = "distill"
    accepts = FLOATING

    def run(self, program: Program) -> PassResult:
        """Train towards the traced float model."""
        chosen, misses = self._chosen(program)
        what = f"{len(chosen)} {'vectors' if self.train is Parts.VECTORS else 'weights'}"
        if not chosen:
            return PassResult(0, tuple(misses))
        schedule = Schedule(self.steps, self.rate or _RATES[self.train], self.snapshots, repeats=True)
        originals = {name: program.tensor(name).detach() for name in chosen}
        result = distill(
            program, self.name, lambda: self._trained(program, chosen, originals), originals, self.activation, schedule
        )
        misses += result.left_out
        numbers = {f"all {what.split()[1]}": result.losses} if result.losses else {}
        if result.tensors is None:
            return PassResult(0, (Miss(what, f"{result.reason}: they stay unchanged"), *misses), numbers)
        for name, matmul in chosen.items():
            self._store(program, name, matmul, result.tensors)
        return PassResult(len(chosen), tuple(misses), numbers)

    def _chosen(self, program: Program) -> tuple[dict[str, Matmul | None], list[Miss]]:
        """The tensors to train by name, weights with their matmul."""
        if self.train is Parts.VECTORS:
            names = program.parameter_names()
            return {n: None for n in names if program.is_parameter(n) and program.stored(n).dim() == 1}, []
        matmuls = {matmul.parameter: matmul for matmul in reversed(choose(program).matmuls)}
        rounded = {name: m for name, m in matmuls.items() if name in program.rounded}
        misses = [Miss(n, "not rounded: a pass such as gptq must come first") for n in matmuls if n not in rounded]
        misses += [Miss(n, "stacked weights are not trained") for n in rounded if program.stored(n).dim() != 2]
        return {name: matmul for name, matmul in rounded.items() if program.stored(name).dim() == 2}, misses

    def _trained(
        self, program: Program, chosen: Mapping[str, Matmul | None], originals: Mapping[str, Tensor]
    ) -> TrainedTensors:
        if self.train is Parts.VECTORS:
            return TrainedVectors(originals, self.bound)
        kind = Trained.WEIGHTS if self.train is Parts.WEIGHTS else Trained.CLIP
        weights = {
            name: RoundedWeight(matmul.rows(originals[name]), program.rounded[name], matmul.axis)
            for name, matmul in chosen.items()
            if matmul is not None
        }
        return TrainedWeights(weights, kind, self.bound)

    def _store(self, program: Program, name: str, matmul: Matmul | None, tensors: Mapping[str, Tensor]) -> None:
        if matmul is None:
            program.set_tensor(name, tensors[name])
        else:
            rounding = Rounding(program.rounded[name].format, tensors[f"{name}{SCALES}"])
            program.set_rounded(name, matmul.rows(tensors[name]), rounding, matmul.axis)
