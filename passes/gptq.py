"""w -> q, MX values with the least || w x - q x ||^2 over calibration data: later columns compensate earlier ones.

GPTQ (Frantar et al., arXiv 2210.17323) for MX blocks (Sharify et al., arXiv 2405.07135): rounds column by column and
searches each block's scale (`column_rounding.py`). Runs segment by segment, on the inputs that the quantized model has:
activations rounded as at run time, earlier weights already rounded. All readers of a value share its second moments.

With `correction`, the first x is that of the float model: the target is the least-squares weight that compensates the
error of earlier layers (GPTAQ, Li et al., arXiv 2504.02692; Qronos, Zhang et al., arXiv 2505.11695).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose, override_formats
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment
from mxcompile.calibration.learning.first_rounding import round_columns
from mxcompile.calibration.quantizers import input_roundings
from mxcompile.calibration.ranks.exchange import Ranks, ranks_of
from mxcompile.calibration.runs.altered_run import Prepare
from mxcompile.calibration.runs.twin_run import TwinRun
from mxcompile.calibration.statistics.expert_moments import ExpertStatistics, ExpertTokens, TokenTally
from mxcompile.calibration.statistics.second_moments import SecondMoments
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.graph.name_patterns import Overrides
from mxcompile.graph.program import Program, Rounding, Stage, where
from mxcompile.graph.records import Miss, PassResult
from mxcompile.numerics.column_rounding import MOST_DAMPING, ColumnOrder, ColumnRounding, IllConditionedError
from mxcompile.numerics.exact_packing import pack_exactly
from mxcompile.numerics.importance import round_rows
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.numerics.reference import largest_exponent
from mxcompile.numerics.rounding_offsets import offsets_of
from mxcompile.pipeline.interfaces import FLOATING, Pass
from mxcompile.pipeline.options import Range
from mxcompile.tensor.weight import MXWeight

_SCALES, _OFFSETS, _TOKENS = " scales", " offsets", " tokens"
_UNCORRECTED = "rounded without correction: the model selects its tokens, which may differ in the float model"


@dataclass(frozen=True)
class Gptq(Pass):
    """format: of the weights. activation: of their inputs at run time (none: float).

    damping: added to the diagonal of the inputs' second moments, as a share of its mean. order: columns as they are
        (none), or the most important first: columns, or whole blocks. rule: fixes scales before rounding; none searches
        them block by block. sweeps: how often each block is rounded again. microblock: columns rounded together, with
        scales by `rule` from the compensated weights; 0: column by column. See `ColumnRounding`.
    correction: share of the error of earlier layers that is compensated, 0 to 1. residual: with a correction, also
        compensate the error of the residual stream that the output is added to. There is no correction where the model
        selects the tokens (experts): they may differ between the float and the quantized model.
    experts, shrinkage: the second moments of each expert of a 3-D weight are those of the tokens that it is `chosen`
        for and of `shrinkage` x in further ones with the mean of `all` experts' tokens (`expert_moments.py`); 0: its
        own alone. experts=all: those of all experts' tokens for each. min_tokens: experts that fewer tokens reach are
        rounded to nearest.
    latents: keep where the elements of 2-D weights were before they were rounded, a byte each: `distill` trains from
        there, and not from the values that they were rounded to.
    overrides: other formats by name pattern, None for a weight that stays float; `lower-mx` needs the same.
    """

    format: MXFormat
    activation: MXFormat | None = None
    damping: Annotated[float, Range(0, MOST_DAMPING)] = 0.01
    order: ColumnOrder = ColumnOrder.BLOCKS
    rule: ScaleRule | None = None
    sweeps: Annotated[int, Range(0)] = 0
    correction: Annotated[float, Range(0, 1)] = 0.0
    residual: bool = False
    microblock: Annotated[int, Range(0)] = 0
    experts: ExpertTokens = ExpertTokens.CHOSEN
    shrinkage: Annotated[float, Range(0)] = 2.0
    min_tokens: Annotated[int, Range(0)] = 0
    latents: bool = False
    overrides: Mapping[str, MXFormat | None] = Overrides()

    name = "gptq"
    accepts = FLOATING
    gives = Stage.ROUNDED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order is ColumnOrder.COLUMNS and self.rule is None:
            raise PipelineError("gptq{order=columns} needs scales fixed before rounding: set a rule, for example mse")
        if self.latents and (self.sweeps or self.microblock):
            raise PipelineError("gptq{latents=true} needs columns that are rounded once, alone: sweeps=0, microblock=0")
        if self.microblock % self.format.block_size or (self.microblock and self.rule is None):
            raise PipelineError(
                f"gptq{{microblock={self.microblock}}} needs a rule, and a multiple of the block size of {self.format}"
            )

    def run(self, program: Program) -> PassResult:
        """Round every chosen weight that only matmuls read, segment by segment."""
        choice, formats = override_formats(program, choose(program), self.format, self.overrides)
        misses = [*choice.misses, *(choice.shared_weight_miss(m) for m in choice.matmuls if not choice.owns_weight(m))]
        numbers, tokens = dict[str, dict[str, float]](), dict[str, tuple[int, ...]]()
        todo = [m for m in choice.matmuls if choice.owns_weight(m) and m.parameter not in program.rounded]
        if not todo:
            return PassResult(0, tuple(misses))
        prepare = input_roundings(program, choice.matmuls, self.activation)
        twin_run = TwinRun(program, choice.matmuls, prepare, self.correction > 0)
        for index, segment in enumerate(program.track(twin_run.segments)):
            readings = _by_input(program, segment, todo, formats, prepare)
            weights = [matmul for readers in readings for matmul in readers]
            before = {m.parameter: program.tensor(m.parameter) for m in weights}
            remarks = _restored(program, index, weights, formats)
            if remarks is None:
                remarks = self._round_segment(program, twin_run, segment, readings, formats)
                _keep(program, index, before, remarks)
            misses += [Miss(place, why) for place, _, why in (reason.partition(": ") for reason in remarks.reasons)]
            tokens |= remarks.tokens
            numbers |= {n: {"weight_sqnr_db": sqnr_db(old, program.tensor(n))} for n, old in before.items()}
            twin_run.advance(segment)
        return PassResult(len(numbers), tuple(misses), numbers, expert_tokens=tokens)

    def _round_segment(
        self,
        program: Program,
        twin_run: TwinRun,
        segment: Segment,
        readings: list[list[Matmul]],
        formats: Mapping[Node, MXFormat],
    ) -> "_Remarks":
        """Round the weights of a segment, one input value after the other."""
        remarks = _Remarks()
        statistics = ExpertStatistics(self.experts, self.shrinkage)
        for readers in readings:
            moments = twin_run.moments(segment, readers, self.residual, statistics)
            remarks.add(self._round(program, readers, moments, formats[readers[0].node]))
        return remarks

    def _round(
        self, program: Program, readers: list[Matmul], moments: Iterable[SecondMoments], fmt: MXFormat
    ) -> "_Remarks":
        """Round all weights that read one value together: their rows are independent.

        Experts are rounded and packed one after the other.
        """
        weights = [_RoundedWeight(matmul, finite_rows(program, matmul)) for matmul in readers]
        tally, ranks = TokenTally(readers[0], self.min_tokens), ranks_of(program)
        owners, refused = list[int | None](), dict[int, str]()
        for index, of_expert in enumerate(moments):
            program.return_freed()
            owners.append(of_expert.owner)
            usable = tally.add(of_expert)
            if of_expert.owner not in (None, ranks.number):
                continue
            rows = {weight.matmul.node.name: weight.expert(index) for weight in weights}
            rounded = None
            if usable:
                try:
                    rounded = self._round_together(ranks, rows, of_expert, fmt)
                except IllConditionedError as error:
                    refused[index] = str(error)
            rounded = rounded or self._to_nearest(torch.cat([*rows.values()]), fmt)
            parts = (part.split([len(each) for each in rows.values()]) for part in rounded)
            for weight, values, scales, *offsets in zip(weights, *parts, strict=True):
                weight.add(index, values, scales, fmt, *offsets)
        refused = {index: why for of_process in ranks.gather(refused) for index, why in of_process.items()}
        whose = "expert {} rounded" if tally.of_experts else "rounded"
        reasons = [f"{whose.format(index)} to nearest: {refused[index]}" for index in sorted(refused)]
        for weight in weights:
            weight.receive(ranks, owners)
            weight.store(program, fmt)
        program.return_freed()
        if self.correction and any(tally.counts) and not tally.compared:
            reasons.insert(0, _UNCORRECTED)
        reasons += tally.remarks()
        counts = {matmul.parameter: tuple(tally.counts) for matmul in readers} if tally.of_experts else {}
        return _Remarks([f"{where(matmul.node)}: {reason}" for matmul in readers for reason in reasons], counts)

    def _round_together(
        self, ranks: Ranks, weights: Mapping[str, Tensor], moments: SecondMoments, fmt: MXFormat
    ) -> tuple[Tensor, ...]:
        """Round weights `[out, in]`, by the names of their matmuls' nodes; returns what `round_columns` does."""
        largest = min(largest_exponent(weight.dtype) for weight in weights.values())
        rounding = ColumnRounding(fmt, self.damping, self.order, self.rule, self.sweeps, self.microblock, largest)
        return round_columns(ranks, rounding, weights, moments, self.correction, self.latents)

    def _to_nearest(self, rows: Tensor, fmt: MXFormat) -> tuple[Tensor, ...]:
        values, scales = round_rows(rows, fmt, self.rule or ScaleRule.MSE)
        return (values, scales, offsets_of(rows, values, scales, fmt)) if self.latents else (values, scales)


@dataclass(frozen=True)
class _Remarks:
    """reasons: what was not done as for other weights. tokens: of each expert in calibration, by a weight's name."""

    reasons: list[str] = field(default_factory=list[str])
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def add(self, other: "_Remarks") -> None:
        """Add those of further weights."""
        self.reasons.extend(other.reasons)
        self.tokens.update(other.tokens)


class _RoundedWeight:
    """A weight `[..., out, in]` whose experts are rounded one after the other, and packed at once.

    A 2-D weight is a single expert, which stays float.
    """

    def __init__(self, matmul: Matmul, rows: Tensor) -> None:
        self.matmul, self._rows = matmul, rows
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}
        self._offsets: Tensor | None = None

    def expert(self, index: int) -> Tensor:
        """The weight `[out, in]` of an expert, before it is rounded."""
        return self._rows if self._rows.dim() == 2 else self._rows[index]

    def add(self, index: int, values: Tensor, scales: Tensor, fmt: MXFormat, offsets: Tensor | None = None) -> None:
        """An expert's rounded values `[out, in]` and their scales. offsets: kept for a 2-D weight alone."""
        values, self._offsets = values.to(self._rows.dtype), offsets if self._rows.dim() == 2 else None
        self._parts[index] = (values if self._rows.dim() == 2 else pack_exactly(values, scales, fmt), scales)

    def receive(self, ranks: Ranks, owners: Sequence[int | None]) -> None:
        """Exchange experts that one process each has rounded. owners: of all experts, None: all have rounded it."""
        if all(owner is None for owner in owners):
            return
        shapes = [tuple(part.shape for part in parts) for parts in self._parts.values()][:1]
        shapes = next(of_process[0] for of_process in ranks.gather(shapes) if of_process)
        for index, owner in enumerate(owners):
            if owner is not None:
                empty = (torch.empty(shape, dtype=torch.uint8, device=self._rows.device) for shape in shapes)
                elements, scales = (part.contiguous() for part in self._parts.get(index) or empty)
                ranks.broadcast(elements, owner)
                ranks.broadcast(scales, owner)
                self._parts[index] = elements, scales

    def store(self, program: Program, fmt: MXFormat) -> None:
        """Put all experts into the program."""
        values, scales = (
            torch.stack(parts) for parts in zip(*(self._parts[index] for index in sorted(self._parts)), strict=True)
        )
        if self._rows.dim() == 2:
            values, scales = values[0], scales[0]
        _store(program, self.matmul, values, Rounding(fmt, scales, self._offsets))


def _store(program: Program, matmul: Matmul, values: Tensor, rounding: Rounding) -> None:
    """Put a rounded weight into the program; values: those of a 2-D weight `[out, in]`, the elements of a 3-D one."""
    dtype = program.stored(matmul.parameter).dtype
    if values.dim() == 2:
        program.set_rounded(matmul.parameter, values, rounding, matmul.axis)
    else:
        program.set_packed(matmul.parameter, values, rounding, matmul.axis, dtype)


def _restored(
    program: Program, index: int, weights: Iterable[Matmul], formats: Mapping[Node, MXFormat]
) -> _Remarks | None:
    """Load a segment's weights from an interrupted run and return its remarks; None if it had not finished it."""
    saved = None if program.resume is None else program.resume.load(f"{index:04}")
    if saved is None:
        return None
    tensors, reasons = saved
    remarks = _Remarks(reasons)
    for matmul in weights:
        name = matmul.parameter
        device = program.device(name)
        values, scales = (tensors[part].to(device) for part in (name, f"{name}{_SCALES}"))
        rows = matmul.rows(values) if values.dim() == 2 else values
        offsets = tensors.get(f"{name}{_OFFSETS}")
        offsets = None if offsets is None else offsets.to(device)
        _store(program, matmul, rows, Rounding(formats[matmul.node], scales, offsets))
        if f"{name}{_TOKENS}" in tensors:
            remarks.tokens[name] = tuple(tensors[f"{name}{_TOKENS}"].tolist())
    return remarks


def _keep(program: Program, index: int, names: Iterable[str], remarks: _Remarks) -> None:
    if program.resume is not None:
        stored = {name: program.stored(name) for name in names}
        tensors = {name: each.elements if isinstance(each, MXWeight) else each for name, each in stored.items()}
        tensors |= {f"{name}{_SCALES}": program.rounded[name].scales for name in names}
        kept = {name: program.rounded[name].offsets for name in names}
        tensors |= {f"{name}{_OFFSETS}": offsets for name, offsets in kept.items() if offsets is not None}
        tensors |= {f"{name}{_TOKENS}": torch.tensor(counts) for name, counts in remarks.tokens.items()}
        program.resume.save(f"{index:04}", tensors, remarks.reasons)


def _by_input(
    program: Program,
    segment: Segment,
    todo: list[Matmul],
    formats: Mapping[Node, MXFormat],
    prepare: Mapping[Matmul, Prepare],
) -> list[list[Matmul]]:
    """The matmuls of a segment to round, grouped by input value and the formats of both; each weight once."""
    groups: dict[tuple[Node, int, MXFormat, Prepare], list[Matmul]] = {}
    seen = set(program.rounded)
    for matmul in segment.matmuls:
        if matmul in todo and matmul.parameter not in seen:
            seen.add(matmul.parameter)
            key = matmul.activation, matmul.root.meta["val"].dim(), formats[matmul.node], prepare[matmul]
            groups.setdefault(key, []).append(matmul)
    return list(groups.values())
