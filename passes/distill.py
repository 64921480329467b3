"""quantized model -> the same model, trained so that it predicts what the float model does.

Trained on calibration data, with weights and inputs rounded as at run time, to minimize the KL divergence between the
predictions of the traced float model and of the quantized one: quantization-aware distillation (QAD, arXiv 2601.20088),
without labels, so that any text serves, also one that the model has written (`generate_calibration`: LLM-QAT, arXiv
2305.17888). Rounded weights stay MX values at every step: a latent behind each element is trained straight through the
rounding (`latent_weights.py`). `inner_terms.py` has the other losses, `trained_parts.py` the parts of weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Final

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.multiplier import insert_multipliers, multiplier_of, remove_multipliers
from mxcompile.analysis.matmuls import Matmul
from mxcompile.calibration.learning.aims import Compared, aims_of
from mxcompile.calibration.learning.distilled import Distilled, distill
from mxcompile.calibration.learning.latent_weights import Trained
from mxcompile.calibration.learning.schedule import Schedule
from mxcompile.calibration.learning.segment_distillation import distill_segments
from mxcompile.calibration.learning.trained_parts import TrainedLowRank, TrainedOutliers, costly_blocks
from mxcompile.calibration.learning.trained_tensors import (
    SCALES,
    RoundedWeight,
    TrainedTensors,
    TrainedTogether,
    TrainedVectors,
    TrainedWeights,
)
from mxcompile.calibration.runs.run import Request
from mxcompile.calibration.statistics.observers import ChannelImportance
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program, Rounding
from mxcompile.graph.records import Miss, PassResult
from mxcompile.pipeline.interfaces import FLOATING, Pass
from mxcompile.pipeline.options import Range


class Parts(Enum):
    """What is trained.

    vectors: norm weights and biases, as `tune-vectors` does. multipliers: what layers multiply their inputs by, a
    number for each channel (PEQA, arXiv 2305.14152, whose float scales MX has not); those that there are not yet are
    inserted, at the cost of a multiplication at run time. weights: the elements of rounded weights. all: weights, and
    vectors with them. exponents: the
    scales of rounded weights, by at most one power of two. outliers: the elements of the blocks that rounding costs
    most (PreQuant, arXiv 2306.00014). lora: the elements, by a low-rank change, which is in the weight at every step.
    """

    VECTORS = "vectors"
    MULTIPLIERS = "multipliers"
    WEIGHTS = "weights"
    ALL = "all"
    EXPONENTS = "exponents"
    OUTLIERS = "outliers"
    LORA = "lora"


class Scope(Enum):
    """Train the whole model at once, or segment after segment, in the memory of one."""

    MODEL = "model"
    SEGMENT = "segment"


_FLOATS: Final = {Parts.VECTORS: "vectors", Parts.MULTIPLIERS: "multipliers"}
_FLOAT_RATE, _RATE, _LATENT_RATE = 4e-3, 0.02, 1e-3


@dataclass(frozen=True)
class Distill(Pass):
    """activation: format of matmul inputs at run time (none: float).

    train: see `Parts`; weights must have been rounded by an earlier pass. loss: see `Compared`. scope: see `Scope`;
    a segment has loss=block or distribution (with train=vectors Norm Tweaking, arXiv 2309.02784).
    steps: of `batch` calibration batches each, for each segment; not more than go `epochs` times through the batches.
    rate: Adam's at first; it decays to zero along a cosine. In units of each vector's mean magnitude, of the mean
    distance of neighbouring elements in a block, or of a power of two; none: 4e-3 for vectors and multipliers, 1e-3
    where `gptq{latents=true}` came before, else 0.02. bound: the largest move in these units, if any.
    attention: weight of the error of what attention's output projections return (SDQ). kurtosis: weight of the excess
    kurtosis of what layers return (arXiv 2404.03605).
    snapshots: how often held-out batches, an eighth of all, are looked at; of these states, the pass takes the one with
    the least loss on them, or none if that is no gain. guard: how many of the last calibration batches are of another
    domain: they are not trained on, and no state is taken that has more loss on them than at first.
    share: of all blocks, for outliers. rank: for lora.
    """

    activation: MXFormat | None = None
    train: Parts = Parts.VECTORS
    loss: Compared = Compared.KL
    scope: Scope = Scope.MODEL
    steps: Annotated[int, Range(0)] = 500
    rate: Annotated[float | None, Range(0, above=True)] = None
    bound: Annotated[float | None, Range(0, above=True)] = None
    attention: Annotated[float, Range(0)] = 0.0
    kurtosis: Annotated[float, Range(0)] = 0.0
    snapshots: Annotated[int, Range(1)] = 8
    guard: Annotated[int, Range(0)] = 0
    share: Annotated[float, Range(0, 1, above=True)] = 0.005
    rank: Annotated[int, Range(1)] = 8
    batch: Annotated[int, Range(1)] = 1
    epochs: Annotated[int | None, Range(1)] = None

    name = "distill"
    accepts = FLOATING

    def __post_init__(self) -> None:
        super().__post_init__()
        of_model = self.attention or self.kurtosis or self.guard or self.batch > 1 or self.epochs is not None
        if self.scope is Scope.SEGMENT and (self.loss.inner is None or of_model):
            raise PipelineError(
                "distill{scope=segment} compares what a segment returns: it needs loss=block or loss=distribution, and "
                "has no attention, kurtosis, guard, batch or epochs"
            )

    def requests(self, program: Program) -> Sequence[Request]:
        """For outliers, how much each input channel counts."""
        if self.train is not Parts.OUTLIERS:
            return ()
        chosen = (matmul for matmul in self._weights(program)[0].values() if matmul is not None)
        return tuple(dict.fromkeys(Request(matmul.activation.name, ChannelImportance) for matmul in chosen))

    def run(self, program: Program) -> PassResult:
        """Train towards the traced float model."""
        inserted, misses = list[Node](), list[Miss]()
        if self.train is Parts.MULTIPLIERS:
            inserted, misses = insert_multipliers(program, choose(program).matmuls)
        chosen, unchosen = self._chosen(program)
        misses += unchosen
        kind = "tensors" if self.train is Parts.ALL else _FLOATS.get(self.train, "weights")
        if not chosen:
            return PassResult(0, tuple(misses))
        result = self._distilled(program, chosen)
        misses += result.left_out
        numbers = {f"{name} {kind}": losses for name, losses in result.losses.items()}
        curves = {f"{name} {kind}": curve for name, curve in result.curves.items()}
        if result.tensors is None:
            remove_multipliers(program, inserted)
            reason = f"{result.reason}{self._too_short(program)}: they stay unchanged"
            misses.insert(0, Miss(f"{len(chosen)} {kind}", reason))
            return PassResult(0, tuple(misses), numbers, curves=curves)
        for name, matmul in chosen.items():
            self._store(program, name, matmul, result.tensors)
        return PassResult(len(chosen.keys() & result.tensors.keys()), tuple(misses), numbers, curves=curves)

    def _too_short(self, program: Program) -> str:
        """Why no element can have changed, if steps and rate are too small for that: latents begin on elements."""
        reach = self._rate(program) * self.steps / 2  # the sum of a cosine schedule; a step of Adam is about the rate
        elements = self.train in (Parts.WEIGHTS, Parts.ALL, Parts.OUTLIERS)
        moves = (elements and not self._between_elements(program)) or self.train is Parts.EXPONENTS
        if not self.steps or reach >= 0.5 or not moves:
            return ""
        reason = f", as rate x steps / 2 is {reach:.2g} and an element changes half a step away: give more of them"
        return f"{reason}, or keep where elements were (gptq{{latents=true}})" if elements else reason

    def _rate(self, program: Program) -> float:
        """Latents that do not begin on elements change them at the first steps, and noise at a high rate loses more."""
        default = _LATENT_RATE if self._between_elements(program) else _RATE
        return self.rate or (_FLOAT_RATE if self.train in _FLOATS else default)

    def _between_elements(self, program: Program) -> bool:
        elements = self.train in (Parts.WEIGHTS, Parts.ALL, Parts.OUTLIERS, Parts.LORA)
        return elements and any(rounding.offsets is not None for rounding in program.rounded.values())

    def _distilled(self, program: Program, chosen: Mapping[str, Matmul | None]) -> Distilled:
        schedule = Schedule(self.steps, self._rate(program), self.snapshots, self.epochs, self.guard, self.batch)
        originals = {name: program.tensor(name).detach() for name in chosen}

        def trained(names: Sequence[str]) -> TrainedTensors:
            return self._trained(program, {n: chosen[n] for n in names}, {n: originals[n] for n in names})

        if self.scope is Scope.SEGMENT:
            return distill_segments(program, self.name, trained, originals, self.activation, schedule, self.loss)
        aims = aims_of(program, self.loss, self.attention, self.kurtosis)
        return distill(program, self.name, lambda: trained([*chosen]), originals, self.activation, schedule, aims)

    def _chosen(self, program: Program) -> tuple[dict[str, Matmul | None], list[Miss]]:
        """The tensors to train by name, weights with their matmul."""
        if self.train is Parts.VECTORS:
            return self._vectors(program), []
        if self.train is Parts.MULTIPLIERS:
            names = [multiplier_of(program, matmul.activation) for matmul in choose(program).matmuls]
            return {name: None for name in names if name is not None and program.stored(name).dim() == 1}, []
        chosen, misses = self._weights(program)
        return ({**chosen, **self._vectors(program)} if chosen and self.train is Parts.ALL else chosen), misses

    @staticmethod
    def _vectors(program: Program) -> dict[str, Matmul | None]:
        names = program.parameter_names()
        return {n: None for n in names if program.is_parameter(n) and program.stored(n).dim() == 1}

    @staticmethod
    def _weights(program: Program) -> tuple[dict[str, Matmul | None], list[Miss]]:
        matmuls = {matmul.parameter: matmul for matmul in reversed(choose(program).matmuls)}
        rounded = {name: m for name, m in matmuls.items() if name in program.rounded}
        misses = [Miss(n, "not rounded: a pass such as gptq must come first") for n in matmuls if n not in rounded]
        misses += [Miss(n, "stacked weights are not trained") for n in rounded if program.stored(n).dim() != 2]
        return {name: matmul for name, matmul in rounded.items() if program.stored(name).dim() == 2}, misses

    def _trained(
        self, program: Program, chosen: Mapping[str, Matmul | None], originals: Mapping[str, Tensor]
    ) -> TrainedTensors:
        if self.train in _FLOATS:
            return TrainedVectors(originals, self.bound)
        matmuls = {name: matmul for name, matmul in chosen.items() if matmul is not None}
        weights = {
            name: RoundedWeight(matmul.rows(originals[name]), program.rounded[name], matmul.axis)
            for name, matmul in matmuls.items()
        }
        if self.train is Parts.LORA:
            return TrainedLowRank(weights, self.rank, self.bound)
        if self.train is Parts.OUTLIERS:
            requests = {name: Request(matmul.activation.name, ChannelImportance) for name, matmul in matmuls.items()}
            importance = {name: request.result(program) for name, request in requests.items()}
            return TrainedOutliers(weights, costly_blocks(weights, importance, self.share), self.bound)
        if self.train is Parts.EXPONENTS:
            return TrainedWeights(weights, Trained.CLIP, self.bound)
        elements = TrainedWeights(weights, Trained.WEIGHTS, self.bound)
        vectors = {name: originals[name] for name, matmul in chosen.items() if matmul is None}
        if not vectors:
            return elements
        return TrainedTogether([elements, TrainedVectors(vectors, self.bound, _FLOAT_RATE / self._rate(program))])

    def _store(self, program: Program, name: str, matmul: Matmul | None, tensors: Mapping[str, Tensor]) -> None:
        if name not in tensors:
            return
        if matmul is None:
            program.set_tensor(name, tensors[name])
        else:
            rounding = Rounding(program.rounded[name].format, tensors[f"{name}{SCALES}"])
            program.set_rounded(name, matmul.rows(tensors[name]), rounding, matmul.axis)
