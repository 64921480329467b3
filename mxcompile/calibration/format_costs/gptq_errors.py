"""The weights of a segment as `gptq` would round them in every format, for what formats cost behind it.

GPTQ makes errors smaller by other factors in other layers: on SmolLM2-135M in 4 bits to a seventh of rounding to
nearest in q and k, to a half in gate, up and down, to three quarters in v. Inputs are those of the float model, rounded
as at run time, and no earlier error is compensated.
"""

from collections.abc import Sequence
from enum import Enum

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment
from mxcompile.calibration.format_costs.pairs import FormatPair, rounded_weights
from mxcompile.calibration.learning.first_rounding import FirstRounding
from mxcompile.calibration.quantizers import round_input
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.backward_run import BackwardRun
from mxcompile.calibration.statistics.second_moments import SecondMoments, sum_moments
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program

_DAMPING = 0.01


class FormatRounding(Enum):
    """How later passes round: to nearest, or by GPTQ, which leaves smaller errors, by other factors in other layers."""

    NEAREST = "nearest"
    GPTQ = "gptq"


def weights_by_gptq(
    program: Program, run: BackwardRun, segment: Segment, pairs: Sequence[FormatPair]
) -> dict[Matmul, dict[FormatPair, Tensor]]:
    """For each matmul its weight in every pair's format, as the parameter is (not transposed).

    Experts, and weights whose inputs allow nothing else, are rounded to nearest. run: before its backward pass of the
    segment.
    """
    readers: dict[Node, list[Matmul]] = {}
    rounded: dict[Matmul, dict[FormatPair, Tensor]] = {}
    for matmul in segment.matmuls:
        if matmul.root.meta["val"].dim() == 2:
            readers.setdefault(matmul.activation, []).append(matmul)
        nearest = rounded_weights(program, matmul, {pair.weight for pair in pairs})
        rounded[matmul] = {pair: nearest[pair.weight] for pair in pairs}
    by_input = _moments(
        program, run, segment, [*readers], {pair.activation for pair in pairs if pair.weight is not None}
    )
    gptq = FirstRounding(gptq=True, damping=_DAMPING, correction=0.0, ranks=ranks_of(program))
    for value, matmuls in readers.items():
        weights = {matmul: finite_rows(program, matmul) for matmul in matmuls}
        for pair in pairs:
            if pair.weight is not None:
                values, _, reason = gptq.round(weights, by_input[value, pair.activation], pair.weight)
                for matmul, (rows, _) in values.items() if reason is None else ():
                    rounded[matmul][pair] = matmul.rows(rows)
    return rounded


def _moments(
    program: Program, run: BackwardRun, segment: Segment, values: Sequence[Node], formats: set[MXFormat | None]
) -> dict[tuple[Node, MXFormat | None], SecondMoments]:
    """The second moments of values, over all batches, rounded to each format."""
    moments = {
        (value, fmt): SecondMoments(int(value.meta["val"].shape[-1]), program.device(segment.matmuls[0].parameter))
        for value in values
        for fmt in formats
    }
    for batch, found in run.forward(segment, values):
        for (value, fmt), of_value in moments.items():
            rows = round_input(fmt, batch.visibility.rows(value, found[value]))
            of_value.update(rows.flatten(0, -2), weight=batch.visibility.weight)
    sum_moments([*moments.values()], ranks_of(program))
    return moments
