"""Round the weights of a model segment by segment, and train the rounding: what the pass `learn-rounding` does."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment
from mxcompile.calibration.finished_parts import load_all_rounded, save_all_rounded
from mxcompile.calibration.learning.first_rounding import FirstRounding, by_input
from mxcompile.calibration.learning.latent_weights import FAR, NEAR, LatentWeight, Trained
from mxcompile.calibration.learning.segment_training import Predictions, SegmentOutputs, SegmentTraining, TrainingPlan
from mxcompile.calibration.quantizers import trainable_roundings
from mxcompile.calibration.runs.altered_run import Prepare
from mxcompile.calibration.runs.run import BoundBatch
from mxcompile.calibration.runs.twin_run import TwinRun
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program, Rounding
from mxcompile.graph.records import LossCurve
from mxcompile.numerics.metrics import sqnr_db

_ONE_BATCH = "not trained: training needs a held-out batch: give two or more calibration batches"
_NO_GAIN = "training did not lower the loss on held-out batches ({:.4g}): as it was rounded at first"


@dataclass(frozen=True)
class SegmentNotes:
    """numbers: of each weight, by name. reason: why the weights are as they were rounded at first, None if trained.

    curve: of the loss, None where nothing was trained.
    """

    numbers: dict[str, dict[str, float]]
    reason: str | None
    curve: LossCurve | None = None


class RoundingLearner:
    """segments: of all matmuls; `learn` takes them in order.

    formats: of weights, by their matmul's node. prepare: rounds inputs as at run time. first: rounds before training.
    predictions: train the last segment towards the model's logits, if it has any.
    """

    def __init__(
        self,
        program: Program,
        matmuls: Sequence[Matmul],
        formats: Mapping[Node, MXFormat],
        prepare: Mapping[Matmul, Prepare],
        first: FirstRounding,
        plan: TrainingPlan,
        predictions: bool,
    ) -> None:
        self._program, self._formats, self._prepare = program, formats, prepare
        self._first, self._plan, self._predictions = first, plan, predictions
        self._twin_run = TwinRun(program, matmuls, prepare, with_exact=True)
        self.segments = self._twin_run.segments

    def learn(self, index: int, segment: Segment, weights: Sequence[Matmul]) -> SegmentNotes:
        """Round and train some weights of the next segment, then run all batches through it."""
        rows = {matmul: finite_rows(self._program, matmul) for matmul in weights}
        notes = self._restored(index, weights)
        if notes is None:
            notes = self._learned(segment, rows) if weights else SegmentNotes({}, None)
            saved = [asdict(notes)]
            save_all_rounded(self._program, f"{index:04}", {m.parameter: m.axis for m in weights}, saved)
        self._twin_run.advance(segment)
        return notes

    def _learned(self, segment: Segment, rows: Mapping[Matmul, Tensor]) -> SegmentNotes:
        batches = self._twin_run.batches
        latents, importance = self._rounded(segment, rows)
        loss = None
        if self._plan.steps:
            training = self._training(segment, rows, latents, importance, batches)
            loss = training.train()
            del training, latents
        numbers: dict[str, dict[str, float]] = {}
        for matmul, own in rows.items():
            weight = matmul.rows(self._program.tensor(matmul.parameter))
            numbers[matmul.parameter] = {"weight_sqnr_db": sqnr_db(own, weight)}
            if loss is not None and not math.isnan(loss.before):
                numbers[matmul.parameter] |= {"loss_before": loss.before, "loss_after": loss.after}
        if loss is None or loss.after < loss.before:
            return SegmentNotes(numbers, None, None if loss is None else loss.curve)
        if math.isnan(loss.before):
            return SegmentNotes(numbers, _ONE_BATCH)
        return SegmentNotes(numbers, _NO_GAIN.format(loss.before), loss.curve)

    def _rounded(
        self, segment: Segment, rows: Mapping[Matmul, Tensor]
    ) -> tuple[dict[Matmul, LatentWeight], dict[str, Tensor]]:
        """Round all weights first, one input value after the other; returns them, and their inputs' importance."""
        latents, importance = dict[Matmul, LatentWeight](), dict[str, Tensor]()
        formats = {matmul: self._formats[matmul.node] for matmul in rows}
        for readers in by_input(list(rows), formats, self._prepare):
            (moments,) = self._twin_run.moments(segment, readers, residual=False)
            of_readers = {matmul: rows[matmul] for matmul in readers}
            pairs, channels, _ = self._first.round(of_readers, moments, formats[readers[0]])
            for matmul, (values, scales) in pairs.items():
                latents[matmul] = self._latent(rows[matmul], values, scales, formats[matmul])
                importance[matmul.parameter] = channels
                self._store(matmul, values, scales)
        return latents, importance

    def _latent(self, rows: Tensor, values: Tensor, scales: Tensor, fmt: MXFormat) -> LatentWeight:
        """GPTQ has moved many elements away from the nearest, and their latents would be at the edge of their interval:
        they begin half as far, so that noise does not undo it, and can come to both neighbours."""
        bound, inside = (1.0, FAR) if self._first.gptq else (0.5, NEAR)
        bound = bound if self._plan.trained is Trained.ROUNDING else None
        return LatentWeight(rows, values, scales, fmt, self._plan.trained, bound, inside)

    def _training(
        self,
        segment: Segment,
        rows: Mapping[Matmul, Tensor],
        latents: Mapping[Matmul, LatentWeight],
        importance: Mapping[str, Tensor],
        batches: Sequence[BoundBatch],
    ) -> SegmentTraining:
        aim = SegmentOutputs(self._program, self._twin_run, segment)
        if segment is self.segments[-1] and self._predictions:
            predictions = Predictions(self._program, self._twin_run, segment)
            aim = predictions if predictions.outputs else aim
        aim.expect(batches, {m.parameter: m.rows(own) for m, own in rows.items()}, self._plan.target)
        prepare = trainable_roundings({m: self._prepare[m] for m in segment.matmuls})

        def keep() -> None:
            for matmul, latent in latents.items():
                self._store(matmul, latent.values(), latent.scales())

        return SegmentTraining(self._program, latents, importance, prepare, batches, aim, self._plan, keep)

    def _store(self, matmul: Matmul, values: Tensor, scales: Tensor) -> None:
        rounding = Rounding(self._formats[matmul.node], scales)
        self._program.set_rounded(matmul.parameter, values, rounding, matmul.axis)

    def _restored(self, index: int, weights: Sequence[Matmul]) -> SegmentNotes | None:
        """Round the weights of a segment as an interrupted run has; None if it had not finished it."""
        axes = {matmul.parameter: matmul.axis for matmul in weights}
        formats = {matmul.parameter: self._formats[matmul.node] for matmul in weights}
        saved = load_all_rounded(self._program, f"{index:04}", axes, formats)
        if saved is None:
            return None
        curve = saved[0].pop("curve")
        return SegmentNotes(**saved[0], curve=None if curve is None else LossCurve.of(curve))
