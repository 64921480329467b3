"""linear(x, w) -> linear(x / s, w * s), s searched: protect the weight channels that matter most.

For every scale group the factors that lose least under the formats to come are searched (`factor_search.py`): AWQ (Lin
et al., arXiv 2306.00978) for weight-only formats, its activation-aware form AQAS (Lee et al., arXiv 2311.05161) with
both quantizers in the loop otherwise. AWQ's clip search is the choice of a smaller block scale in MX: how much each
input channel of each weight matters is left with the Program, and `round-weights` and `lower-mx` choose scales by it.
x / s is computed by whatever makes x; where nothing can, by an explicit multiply, if it saves a tenth of the error.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import ScaleGroup, find_groups
from mxcompile.analysis.folds.multiplier import unfoldable_groups
from mxcompile.calibration.factor_search import Objective, power_candidates
from mxcompile.calibration.fold_search import FoldSearch, MatmulStatistic
from mxcompile.calibration.observers import ChannelMeanAbs
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Miss, PassResult
from mxcompile.pipeline.interfaces import Pass


@dataclass(frozen=True)
class AwqFold(Pass):
    """weight, activation: the formats that `round-weights` and `lower-mx` will use (activation none: weight-only).

    objective: score factors on the outputs of the group's matmuls ("output") or of the segment around them ("block").
    through_linears: also search for values made by a linear (v -> o, up -> down), not only for those made by a norm.
    multiply: insert explicit multiplies. grid: exponents tried for each kind of factor.
    power_of_two: round the factors to powers of two, which folds bit-exactly; parameters in half precision always get
    such factors.
    """

    weight: MXFormat
    activation: MXFormat | None = None
    objective: Objective = Objective.OUTPUT
    through_linears: bool = False
    multiply: bool = True
    grid: int = 5
    power_of_two: bool = False

    name = "awq-fold"
    preserves_function = True

    def run(self, program: Program) -> PassResult:
        """Search and fold group by group, segment by segment."""
        matmuls = choose(program).matmuls
        groups, unfoldable = find_groups(program, matmuls, self.through_linears)
        quantizers = Quantizers(self.weight, self.activation)
        search = FoldSearch(quantizers, ChannelMeanAbs, self._candidates, self.objective, self.power_of_two)
        alone = unfoldable_groups(program, unfoldable) if self.multiply else []
        found = search.run(program, matmuls, groups, alone)
        multiplied = {node.name for group, _ in found.multiplied for node in group.nodes}
        left = [miss for miss in unfoldable if miss.matmul.node.name not in multiplied]
        misses = [*(Miss(where(miss.matmul.node), miss.reason) for miss in left), *found.misses]
        return PassResult(len(found.folds), tuple(misses), found.numbers, tuple(found.folds))

    def _candidates(self, group: ScaleGroup, activation: MatmulStatistic, weight: MatmulStatistic) -> Iterator[Tensor]:
        weights = group.mean(lambda matmul: weight(matmul).abs().flatten(0, -2).mean(0))
        return power_candidates(group.mean(activation), weights, self.grid, activation_alone=True)
