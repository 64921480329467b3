"""w -> q, MX values with the least || w x - q x ||^2 over calibration data: what one column loses, others make good.

GPTQ (Frantar et al., arXiv 2210.17323) for MX blocks (Sharify et al., arXiv 2405.07135), column by column with each
block's scale searched (`columns.py`), segment by segment on inputs as the quantized model gives them: activations
rounded as at run time, earlier weights already rounded. One second-moment matrix a value, shared by all its readers.

With `correction`, x on the left is the exact model's: the weight aimed at is the least squares one that makes up for
what earlier layers have lost (GPTAQ, Li et al., arXiv 2504.02692; Qronos, Zhang et al., arXiv 2505.11695).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment
from mxcompile.calibration.moments import Moments
from mxcompile.calibration.streams import Streams
from mxcompile.columns import ColumnRounding, IllConditionedError, Order
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.importance import round_rows
from mxcompile.ledger import Miss, PassResult
from mxcompile.measure import sqnr_db
from mxcompile.pipeline import FLOATING, Pass
from mxcompile.program import Program, Rounding, Stage, where
from mxcompile.search import round_input

_SCALES = " scales"
_UNCORRECTED = "rounded without correction: an expert's tokens may differ in the exact model"
_FEW = "tokens of calibration data are few for {} input channels: what they do not show is guessed"


@dataclass(frozen=True)
class Gptq(Pass):
    """format, activation: of the weights, and of their inputs at run time (none: float).

    damping, order, rule, sweeps, microblock: as in `ColumnRounding`.
    correction: how much of what earlier layers have lost is aimed at, 0 to 1. residual: with a correction, also aim at
        what the residual stream has lost by the place where the output is added to it. Experts get no correction: their
        tokens may differ between the two models.
    """

    format: MXFormat
    activation: MXFormat | None = None
    damping: float = 0.01
    order: Order = Order.BLOCKS
    rule: ScaleRule | None = None
    sweeps: int = 0
    correction: float = 0.0
    residual: bool = False
    microblock: int = 0

    name = "gptq"
    accepts = FLOATING
    gives = Stage.ROUNDED

    def __post_init__(self) -> None:
        if self.order is Order.COLUMNS and self.rule is None:
            raise PipelineError("gptq{order=columns} needs scales fixed beforehand: give a rule, for example rule=mse")
        if self.microblock % self.format.block_size or (self.microblock and self.rule is None):
            raise PipelineError(
                f"gptq{{microblock={self.microblock}}} needs a multiple of the block of {self.format} and a rule"
            )

    def run(self, program: Program) -> PassResult:
        """Round every chosen weight that nothing else reads, segment by segment."""
        choice = choose(program)
        misses = [*choice.misses, *(choice.left_to_lowering(m) for m in choice.matmuls if not choice.alone(m))]
        numbers: dict[str, dict[str, float]] = {}
        todo = [m for m in choice.matmuls if choice.alone(m) and m.parameter not in program.rounded]
        if not todo:
            return PassResult(0, tuple(misses))
        prepare = partial(round_input, self.activation)
        streams = Streams(program, choice.matmuls, prepare, self.correction > 0)
        for index, segment in enumerate(program.through(streams.segments)):
            readings = _by_input(program, segment, todo)
            before = {m.parameter: program.tensor(m.parameter) for readers in readings for m in readers}
            reasons = self._restored(program, index, before)
            if reasons is None:
                reasons = self._round_segment(program, streams, segment, readings)
                _keep(program, index, before, reasons)
            misses += [Miss(*reason.split(": ", 1)) for reason in reasons]
            numbers |= {n: {"weight_sqnr_db": sqnr_db(old, program.tensor(n))} for n, old in before.items()}
            streams.advance(segment)
        return PassResult(len(numbers), tuple(misses), numbers)

    def _round_segment(
        self, program: Program, streams: Streams, segment: Segment, readings: list[list[Matmul]]
    ) -> list[str]:
        """Round the weights of a segment, one input value after the other; returns why some were rounded to nearest."""
        reasons: list[str] = []
        for readers in readings:
            moments = streams.moments(segment, readers, self.residual)
            for matmul in readers:
                reasons += self._round(program, matmul, moments)
        return reasons

    def _round(self, program: Program, matmul: Matmul, moments: list[Moments]) -> list[str]:
        rows = finite_rows(program, matmul)
        uncorrected = self.correction > 0 and rows.dim() == 3
        reasons = [f"{where(matmul.node)}: {_UNCORRECTED}"] if uncorrected else []
        pairs: list[tuple[Tensor, Tensor]] = []
        for weight, known in zip(rows.reshape(-1, *rows.shape[-2:]), moments, strict=True):
            try:
                pairs.append(self._round_one(weight, known, matmul))
                if known.tokens < weight.shape[1]:
                    reasons.append(f"{where(matmul.node)}: {known.tokens} {_FEW.format(weight.shape[1])}")
            except IllConditionedError as error:
                reasons.append(f"{where(matmul.node)}: rounded to nearest: {error}")
                pairs.append(round_rows(weight, self.format, self.rule or ScaleRule.MSE))
        values, scales = (torch.stack(parts).reshape(*rows.shape[:-1], -1) for parts in zip(*pairs, strict=True))
        program.set_tensor(matmul.parameter, matmul.rows(values.to(rows.dtype)).contiguous())
        program.rounded[matmul.parameter] = Rounding(self.format, scales)
        return reasons

    def _round_one(self, weight: Tensor, moments: Moments, matmul: Matmul) -> tuple[Tensor, Tensor]:
        rounding = ColumnRounding(self.format, self.damping, self.order, self.rule, self.sweeps, self.microblock)
        target = moments.target(weight, matmul.node.name, self.damping, self.correction)
        return rounding.round(target, moments.inputs)

    def _restored(self, program: Program, index: int, names: Iterable[str]) -> list[str] | None:
        """Take a segment's weights from an earlier, interrupted run; None if it did not get there."""
        found = None if program.resume is None else program.resume.load(f"{index:04}")
        if found is None:
            return None
        tensors, reasons = found
        for name in names:
            device = program.tensor(name).device
            program.set_tensor(name, tensors[name].to(device))
            program.rounded[name] = Rounding(self.format, tensors[f"{name}{_SCALES}"].to(device))
        return reasons


def _keep(program: Program, index: int, names: Iterable[str], reasons: list[str]) -> None:
    if program.resume is not None:
        tensors = {name: program.tensor(name) for name in names}
        tensors |= {f"{name}{_SCALES}": program.rounded[name].scales for name in names}
        program.resume.save(f"{index:04}", tensors, reasons)


def _by_input(program: Program, segment: Segment, todo: list[Matmul]) -> list[list[Matmul]]:
    """The matmuls of a segment to be rounded, those that read one value together; each weight once."""
    groups: dict[tuple[Node, int], list[Matmul]] = {}
    seen = set(program.rounded)
    for matmul in segment.matmuls:
        if matmul in todo and matmul.parameter not in seen:
            seen.add(matmul.parameter)
            key = matmul.activation, matmul.root.meta["val"].dim()
            groups.setdefault(key, []).append(matmul)
    return list(groups.values())
