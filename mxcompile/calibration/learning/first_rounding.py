"""How weights are rounded before they are trained: by GPTQ, or to nearest with scales weighted by importance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxcompile.analysis.matmuls import Matmul
from mxcompile.calibration.ranks.exchange import Ranks
from mxcompile.calibration.statistics.second_moments import SecondMoments
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.numerics.column_rounding import ColumnOrder, ColumnRounding, IllConditionedError
from mxcompile.numerics.importance import floored, round_rows
from mxcompile.numerics.reference import largest_exponent
from mxcompile.numerics.rounding_offsets import offsets_of


@dataclass(frozen=True)
class FirstRounding:
    """gptq: round column by column, later columns compensate earlier ones; otherwise to nearest. damping, correction:
    as of the pass `gptq`. ranks: the processes that share the run and all have the moments.
    """

    gptq: bool
    damping: float
    correction: float
    ranks: Ranks = Ranks()  # noqa: RUF009 - this process alone

    def round(
        self, weights: Mapping[Matmul, Tensor], moments: SecondMoments, fmt: MXFormat
    ) -> tuple[dict[Matmul, tuple[Tensor, Tensor]], Tensor, str | None]:
        """Round all weights `[out, in]` that read one value.

        Returns values and scales of each, the importance of their input channels `[in]`, and why they have been rounded
        to nearest although GPTQ was asked for, or None.
        """
        importance = floored(moments.inputs.diagonal() / max(1, moments.tokens))
        reason, pair = None, None
        if self.gptq and moments.tokens:
            try:
                pair = self._columns(weights, moments, fmt)
            except IllConditionedError as error:
                reason = str(error)
        pair = pair or round_rows(torch.cat([*weights.values()]), fmt, ScaleRule.MSE, importance)
        sizes = [len(rows) for rows in weights.values()]
        parts = zip(weights, *(part.split(sizes) for part in pair), strict=True)
        return {m: (v.to(weights[m].dtype), scales) for m, v, scales in parts}, importance, reason

    def _columns(self, weights: Mapping[Matmul, Tensor], moments: SecondMoments, fmt: MXFormat) -> tuple[Tensor, ...]:
        named = {matmul.node.name: rows for matmul, rows in weights.items()}
        largest = min(largest_exponent(rows.dtype) for rows in named.values())
        rounding = ColumnRounding(fmt, self.damping, ColumnOrder.BLOCKS, None, 0, 0, largest)
        return round_columns(self.ranks, rounding, named, moments, self.correction)


def round_columns(
    ranks: Ranks,
    rounding: ColumnRounding,
    weights: Mapping[str, Tensor],
    moments: SecondMoments,
    correction: float,
    offsets: bool = False,
) -> tuple[Tensor, ...]:
    """Round weights `[out, in]`, by the names of their matmuls' nodes; returns values and scales of all rows.

    And the offsets of all elements, if they are wanted (`rounding_offsets.py`). Several processes that all have the
    moments round some of the rows each.
    """
    count, factored = sum(map(len, weights.values())), rounding.factor(moments.inputs)

    def rounded(weights: Mapping[str, Tensor], moments: SecondMoments) -> tuple[Tensor, ...]:
        target = moments.target(weights, factored, correction)
        values, scales = rounding.round(target, moments.inputs, factored)
        if not offsets:
            return values, scales
        return values, scales, offsets_of(factored.unrounded(target, values), values, scales, rounding.format)

    if ranks.count == 1 or moments.owner is not None or count < ranks.count:
        return rounded(weights, moments)
    own = _own_rows(ranks.rows(count), weights)
    part = {name: weight[own[name]] for name, weight in weights.items()}
    values, *parts = rounded(part, moments.of_rows(own))
    dtype, *others = {weight.dtype for weight in weights.values()}
    return tuple(ranks.collect(rows, count) for rows in (values if others else values.to(dtype), *parts))


def _own_rows(rows: slice, weights: Mapping[str, Tensor]) -> dict[str, slice]:
    """The rows of each weight among the given rows of all weights in order."""
    own: dict[str, slice] = {}
    start = 0
    for name, weight in weights.items():
        own[name] = slice(*(min(max(end - start, 0), len(weight)) for end in (rows.start, rows.stop)))
        start += len(weight)
    return own


def by_input(
    weights: Sequence[Matmul], formats: Mapping[Matmul, MXFormat], prepare: Mapping[Matmul, object]
) -> list[list[Matmul]]:
    """Matmuls grouped by input value and the formats of both."""
    groups: dict[tuple[object, ...], list[Matmul]] = {}
    for matmul in weights:
        groups.setdefault((matmul.activation, formats[matmul], prepare[matmul]), []).append(matmul)
    return list(groups.values())
