"""w -> q, MX values with the least || w x - q x ||^2 over calibration data: what one column loses, others make good.

GPTQ (Frantar et al., arXiv 2210.17323) for MX blocks (Sharify et al., arXiv 2405.07135), column by column with each
block's scale searched (`column_rounding.py`), segment by segment on inputs as the quantized model gives them:
activations rounded as at run time, earlier weights already rounded. One second-moment matrix a value, shared by all its
readers.

With `correction`, x on the left is the exact model's: the weight aimed at is the least squares one that makes up for
what earlier layers have lost (GPTAQ, Li et al., arXiv 2504.02692; Qronos, Zhang et al., arXiv 2505.11695).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose, override_formats
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment
from mxcompile.calibration.quantizers import round_input
from mxcompile.calibration.second_moments import SecondMoments
from mxcompile.calibration.twin_run import TwinRun
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.graph.name_patterns import Overrides
from mxcompile.graph.program import Program, Rounding, Stage, where
from mxcompile.graph.records import Miss, PassResult
from mxcompile.numerics.column_rounding import ColumnRounding, IllConditionedError, ColumnOrder
from mxcompile.numerics.importance import round_rows
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.pipeline.interfaces import FLOATING, Pass

_SCALES = " scales"
_UNCORRECTED = "rounded without correction: an expert's tokens may differ in the exact model"
_FEW = "tokens of calibration data are few for {} input channels: what they do not show is guessed"


@dataclass(frozen=True)
class Gptq(Pass):
    """format, activation: of the weights, and of their inputs at run time (none: float).

    damping: added to the diagonal of the inputs' moments, times its mean. order: of the columns, as they are (none), or
        those that matter most first: columns, or whole blocks. rule: fixes scales beforehand; none searches them block
        by block. sweeps: how often each block is rounded again. microblock: columns rounded at once, with scales by
        `rule` from the weights as they then are; 0: column by column (`ColumnRounding` says more).
    correction: how much of what earlier layers have lost is aimed at, 0 to 1. residual: with a correction, also aim at
        what the residual stream has lost by the place where the output is added to it. Experts get no correction: their
        tokens may differ between the two models.
    overrides: other formats by name pattern, None for a weight that stays float; those of `lower-mx` must be the same.
    """

    format: MXFormat
    activation: MXFormat | None = None
    damping: float = 0.01
    order: ColumnOrder = ColumnOrder.BLOCKS
    rule: ScaleRule | None = None
    sweeps: int = 0
    correction: float = 0.0
    residual: bool = False
    microblock: int = 0
    overrides: Mapping[str, MXFormat | None] = Overrides()

    name = "gptq"
    accepts = FLOATING
    gives = Stage.ROUNDED

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", Overrides(self.overrides))
        if self.order is ColumnOrder.COLUMNS and self.rule is None:
            raise PipelineError("gptq{order=columns} needs scales fixed beforehand: give a rule, for example rule=mse")
        if self.microblock % self.format.block_size or (self.microblock and self.rule is None):
            raise PipelineError(
                f"gptq{{microblock={self.microblock}}} needs a multiple of the block of {self.format} and a rule"
            )

    def run(self, program: Program) -> PassResult:
        """Round every chosen weight that nothing else reads, segment by segment."""
        choice, formats = override_formats(program, choose(program), self.format, self.overrides)
        misses = [*choice.misses, *(choice.left_to_lowering(m) for m in choice.matmuls if not choice.alone(m))]
        numbers: dict[str, dict[str, float]] = {}
        todo = [m for m in choice.matmuls if choice.alone(m) and m.parameter not in program.rounded]
        if not todo:
            return PassResult(0, tuple(misses))
        prepare = partial(round_input, self.activation)
        twin_run = TwinRun(program, choice.matmuls, prepare, self.correction > 0)
        for index, segment in enumerate(program.through(twin_run.segments)):
            readings = _by_input(program, segment, todo, formats)
            before = {m.parameter: program.tensor(m.parameter) for readers in readings for m in readers}
            reasons = _restored(program, index, {m.parameter: formats[m.node] for readers in readings for m in readers})
            if reasons is None:
                reasons = self._round_segment(program, twin_run, segment, readings, formats)
                _keep(program, index, before, reasons)
            misses += [Miss(*reason.split(": ", 1)) for reason in reasons]
            numbers |= {n: {"weight_sqnr_db": sqnr_db(old, program.tensor(n))} for n, old in before.items()}
            twin_run.advance(segment)
        return PassResult(len(numbers), tuple(misses), numbers)

    def _round_segment(
        self,
        program: Program,
        twin_run: TwinRun,
        segment: Segment,
        readings: list[list[Matmul]],
        formats: Mapping[Node, MXFormat],
    ) -> list[str]:
        """Round the weights of a segment, one input value after the other; returns why some were rounded to nearest."""
        reasons: list[str] = []
        for readers in readings:
            moments = twin_run.moments(segment, readers, self.residual)
            reasons += self._round(program, readers, moments, formats[readers[0].node])
        return reasons

    def _round(self, program: Program, readers: list[Matmul], moments: list[SecondMoments], fmt: MXFormat) -> list[str]:
        """Round the weights that read one value, all at once: their rows have nothing to do with each other."""
        rows = [finite_rows(program, matmul) for matmul in readers]
        stacked = [part.reshape(-1, *part.shape[-2:]) for part in rows]
        pairs: list[tuple[Tensor, Tensor]] = []
        reasons = [_UNCORRECTED] if self.correction > 0 and rows[0].dim() == 3 else []
        for index, known in enumerate(moments):
            weights = {m.node.name: part[index] for m, part in zip(readers, stacked, strict=True)}
            try:
                pairs.append(self._round_together(weights, known, fmt))
                if known.tokens < readers[0].in_features:
                    reasons.append(f"{known.tokens} {_FEW.format(readers[0].in_features)}")
            except IllConditionedError as error:
                reasons.append(f"rounded to nearest: {error}")
                pairs.append(round_rows(torch.cat([*weights.values()]), fmt, self.rule or ScaleRule.MSE))
        parts = [torch.stack(found).split([r.shape[-2] for r in rows], 1) for found in zip(*pairs, strict=True)]
        for matmul, old, *found in zip(readers, rows, *parts, strict=True):
            values, scales = (part.clone().reshape(*old.shape[:-1], -1) for part in found)  # each its own storage
            program.set_tensor(matmul.parameter, matmul.rows(values.to(old.dtype)).contiguous())
            program.rounded[matmul.parameter] = Rounding(fmt, scales)
        return [f"{where(matmul.node)}: {reason}" for matmul in readers for reason in reasons]

    def _round_together(
        self, weights: Mapping[str, Tensor], moments: SecondMoments, fmt: MXFormat
    ) -> tuple[Tensor, Tensor]:
        """Weights `[out, in]` by the names of their matmuls' nodes; returns values and scales of all their rows."""
        rounding = ColumnRounding(fmt, self.damping, self.order, self.rule, self.sweeps, self.microblock)
        return rounding.round(moments.target(weights, self.damping, self.correction), moments.inputs)


def _restored(program: Program, index: int, formats: Mapping[str, MXFormat]) -> list[str] | None:
    """Take a segment's weights from an earlier, interrupted run; None if it did not get there."""
    found = None if program.resume is None else program.resume.load(f"{index:04}")
    if found is None:
        return None
    tensors, reasons = found
    for name, fmt in formats.items():
        device = program.tensor(name).device
        program.set_tensor(name, tensors[name].to(device))
        program.rounded[name] = Rounding(fmt, tensors[f"{name}{_SCALES}"].to(device))
    return reasons


def _keep(program: Program, index: int, names: Iterable[str], reasons: list[str]) -> None:
    if program.resume is not None:
        tensors = {name: program.tensor(name) for name in names}
        tensors |= {f"{name}{_SCALES}": program.rounded[name].scales for name in names}
        program.resume.save(f"{index:04}", tensors, reasons)


def _by_input(
    program: Program, segment: Segment, todo: list[Matmul], formats: Mapping[Node, MXFormat]
) -> list[list[Matmul]]:
    """The matmuls of a segment to be rounded, those that read one value in one format together; each weight once."""
    groups: dict[tuple[Node, int, MXFormat], list[Matmul]] = {}
    seen = set(program.rounded)
    for matmul in segment.matmuls:
        if matmul in todo and matmul.parameter not in seen:
            seen.add(matmul.parameter)
            key = matmul.activation, matmul.root.meta["val"].dim(), formats[matmul.node]
            groups.setdefault(key, []).append(matmul)
    return list(groups.values())
