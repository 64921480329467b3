"""linear(x, w) -> linear(x / s, w * s), s searched: protect the weight channels that matter most.

For every scale group, the pass searches the factors with the least quantization error (`factor_search.py`): AWQ (Lin et
al., arXiv 2306.00978) for weight-only formats, else AQAS (Lee et al., arXiv 2311.05161), with both quantizers in the
loop. AWQ's clip search corresponds to a smaller block scale in MX: the pass stores the importance of each weight's
input channels in the Program, and `round-weights` and `lower-mx` choose scales by it. 1 / s is folded into the op that
produces x. Where that is impossible, an explicit multiply is inserted if it saves a tenth of the error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import ScaleGroup, find_groups
from mxcompile.analysis.folds.multiplier import multiplier_groups
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.searches.factor_search import Objective, power_candidates
from mxcompile.calibration.searches.fold_search import FoldSearch, MatmulStatistic
from mxcompile.calibration.statistics.observers import ChannelMeanAbs
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Miss, PassResult
from mxcompile.numerics.row_slices import column_wise
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.options import Range


@dataclass(frozen=True)
class AwqFold(Pass):
    """weight, activation: the formats that `round-weights` and `lower-mx` will use (activation none: weight-only).

    objective: measure the error on the outputs of the group's matmuls ("output") or of their segment ("block").
    through_linears: also search factors of a linear's output (v -> o, up -> down), not only of a norm's.
    multiply: insert explicit multiplies. grid: number of exponents tried for each kind of factor.
    power_of_two: round the factors to powers of two, which fold bit-exactly; half-precision parameters always get such
    factors.
    """

    weight: MXFormat
    activation: MXFormat | None = None
    objective: Objective = Objective.OUTPUT
    through_linears: bool = False
    multiply: bool = True
    grid: Annotated[int, Range(1)] = 5
    power_of_two: bool = False

    name = "awq-fold"
    preserves_function = True

    def run(self, program: Program) -> PassResult:
        """Search and fold the factors of every group, segment by segment."""
        matmuls = choose(program).matmuls
        groups, unfoldable = find_groups(program, matmuls, self.through_linears)
        quantizers = Quantizers(self.weight, self.activation)
        search = FoldSearch(quantizers, ChannelMeanAbs, self._candidates, self.objective, self.power_of_two)
        to_multiply = multiplier_groups(program, unfoldable) if self.multiply else []
        result = search.run(program, matmuls, groups, to_multiply)
        multiplied = {node.name for group, _ in result.multiplied for node in group.nodes}
        skipped = [miss for miss in unfoldable if miss.matmul.node.name not in multiplied]
        misses = [*(Miss(where(miss.matmul.node), miss.reason) for miss in skipped), *result.misses]
        return PassResult(len(result.folds), tuple(misses), result.numbers, tuple(result.folds))

    def _candidates(self, group: ScaleGroup, activation: MatmulStatistic, weight: MatmulStatistic) -> Iterator[Tensor]:
        weights = group.mean(lambda matmul: column_wise(_mean_magnitude, weight(matmul)))
        return power_candidates(group.mean(activation), weights, self.grid, activation_alone=True)


def _mean_magnitude(rows: Tensor) -> Tensor:
    return rows.float().abs().mean(0)
