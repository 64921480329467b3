"""w -> q, MX values that training has rounded up or down so that each segment of the model computes what it did.

Each element begins where GPTQ has rounded it (or at the nearest value) and may come to a neighbour, by the sign of the
gradient of the segment's error: SignRound (Cheng et al., arXiv 2309.05516), here from GPTQ's start. Segment by segment,
on the inputs that the quantized model has, towards the outputs of the float model; the last segment towards the model's
predictions. `train=weights` moves latent weights (LKD of ZeroQuant, Yao et al., arXiv 2206.01861), `train=clip` the
exponents of scales.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from mxcompile.analysis.choice import choose, override_formats
from mxcompile.analysis.matmuls import Matmul
from mxcompile.calibration.learning.first_rounding import FirstRounding
from mxcompile.calibration.learning.latent_weights import Trained
from mxcompile.calibration.learning.rounding_learner import RoundingLearner
from mxcompile.calibration.learning.segment_training import TrainingPlan
from mxcompile.calibration.quantizers import input_roundings
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.formats import MXFormat
from mxcompile.graph.name_patterns import Overrides
from mxcompile.graph.program import Program, Stage, where
from mxcompile.graph.records import LossCurve, Miss, PassResult
from mxcompile.pipeline.interfaces import FLOATING, Pass
from mxcompile.pipeline.options import Range


class Start(Enum):
    """How weights are rounded before training."""

    GPTQ = "gptq"
    NEAREST = "nearest"


class Last(Enum):
    """What the last segment is trained towards: its outputs, as the others, or the model's predictions."""

    MSE = "mse"
    KL = "kl"


@dataclass(frozen=True)
class LearnRounding(Pass):
    """format: of the weights. activation: of their inputs at run time (none: float).

    train: what is trained; see `Trained`. steps: for each segment, of `batch` calibration batches each. rate: 1 / steps
        if none; of signed steps in steps between elements, else Adam's. start: how weights are rounded at first.
    last: what the last segment is trained towards. target: for the others 1: the float model's outputs; 0: those of the
        float weights on the quantized model's inputs. dropped: share of tokens, those with the largest errors, that a
        step ignores. choices: how often scales are chosen anew in between.
    damping, correction: of GPTQ's start. overrides: other formats by name pattern, None for a weight that stays float.

    An eighth of the batches is held out: of the start and four states on the way, the one with the least loss there is
    taken. Experts (3-D weights) and tied weights are left to the next pass that rounds.
    """

    format: MXFormat
    activation: MXFormat | None = None
    train: Trained = Trained.ROUNDING
    steps: Annotated[int, Range(0)] = 200
    rate: Annotated[float | None, Range(0, above=True)] = None
    batch: Annotated[int, Range(1)] = 1
    start: Start = Start.GPTQ
    last: Last = Last.KL
    target: Annotated[float, Range(0, 1)] = 1.0
    dropped: Annotated[float, Range(0, 0.5)] = 0.001
    choices: Annotated[int, Range(0)] = 0
    damping: Annotated[float, Range(0, 1)] = 0.01
    correction: Annotated[float, Range(0, 1)] = 0.25
    overrides: Mapping[str, MXFormat | None] = Overrides()

    name = "learn-rounding"
    accepts = FLOATING
    gives = Stage.ROUNDED

    def run(self, program: Program) -> PassResult:
        """Round every chosen 2-D weight that only matmuls read, segment by segment."""
        choice, formats = override_formats(program, choose(program), self.format, self.overrides)
        misses = list(choice.misses)
        misses += [choice.shared_weight_miss(m) for m in choice.matmuls if not choice.owns_weight(m)]
        owned = [m for m in choice.matmuls if choice.owns_weight(m) and m.parameter not in program.rounded]
        todo = {m.parameter: m for m in reversed(owned) if m.root.meta["val"].dim() == 2}
        misses += [
            Miss(where(m.node), "stacked weights are not trained: left to a pass behind") for m in owned if _stacked(m)
        ]
        if not todo:
            return PassResult(0, tuple(misses))
        numbers, curves = dict[str, dict[str, float]](), dict[str, LossCurve]()
        prepare = input_roundings(program, choice.matmuls, self.activation)
        learner = RoundingLearner(
            program, choice.matmuls, formats, prepare, self._first(program), self._plan(), self.last is Last.KL
        )
        for index, segment in enumerate(program.track(learner.segments)):
            weights = [m for m in segment.matmuls if todo.get(m.parameter) is m]
            notes = learner.learn(index, segment, weights)
            numbers |= {matmul.parameter: notes.numbers[matmul.parameter] for matmul in weights}
            if notes.curve is not None:
                curves[f"segment {index + 1}"] = notes.curve
            misses += [Miss(where(matmul.node), notes.reason) for matmul in weights if notes.reason]
        return PassResult(len(numbers), tuple(misses), numbers, curves=curves)

    def _first(self, program: Program) -> FirstRounding:
        return FirstRounding(self.start is Start.GPTQ, self.damping, self.correction, ranks_of(program))

    def _plan(self) -> TrainingPlan:
        rate = self.rate or 1 / max(1, self.steps)
        return TrainingPlan(self.train, self.steps, rate, self.batch, self.target, self.dropped, self.choices)


def _stacked(matmul: Matmul) -> bool:
    return matmul.root.meta["val"].dim() != 2
