"""linear(x, w) -> linear(x / s, w * s): move outliers from activations into weights.

s_j = max|X_j|**alpha / max_l|W_l,j|**(1 - alpha), the maximum over all quantized weights that read the value (Xiao et
al., SmoothQuant, arXiv 2211.10438, eq. 4). x / s is computed by whatever makes x: a norm's weight, the rows of the
linear before. Values, makers and readers are found from data flow; what cannot be folded is left alone and reported.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import ScaleGroup, find_groups, fold, half_precision_factors
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.calibration.factor_search import Objective, power_candidates
from mxcompile.calibration.fold_search import FoldSearch, FoldSearchResult
from mxcompile.calibration.observers import ChannelAbsMax
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.run import Request
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Fold, Miss, PassResult
from mxcompile.pipeline.interfaces import Pass

_SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """alpha: how much of an outlier moves into the weights, 0 (none) to 1 (all); none to search it for every group.

    through_linears: also smooth values made by a linear (v -> o, up -> down), not only those made by a norm.
    power_of_two: round the factors to powers of two, which folds bit-exactly; parameters in half precision always get
    such factors.
    For the search: weight, activation: the formats to come; objective: what alpha is scored on; grid: alphas tried.
    """

    alpha: float | None = 0.5
    through_linears: bool = False
    power_of_two: bool = False
    weight: MXFormat | None = None
    activation: MXFormat | None = None
    objective: Objective = Objective.OUTPUT
    grid: int = 10

    name = "smooth-quant"
    preserves_function = True

    def __post_init__(self) -> None:
        if self.alpha is None and self.weight is None:
            raise PipelineError(
                "smooth-quant{alpha=none} searches alpha: name the formats, weight=... and activation=..."
            )

    def requests(self, program: Program) -> Sequence[Request]:
        """The largest magnitude of every channel that will be smoothed (a search gathers it on its way)."""
        if self.alpha is None:
            return ()
        groups, _ = find_groups(program, choose(program).matmuls, self.through_linears)
        return [Request(m.activation.name, ChannelAbsMax) for group in groups for m, _ in group.matmuls]

    def run(self, program: Program) -> PassResult:
        """Fold the smoothing factors into the makers and the readers of every value."""
        matmuls = choose(program).matmuls
        groups, unfoldable = find_groups(program, matmuls, self.through_linears)
        if self.alpha is not None:
            found = self._fixed(program, groups, self.alpha)
        else:
            assert self.weight is not None
            quantizers = Quantizers(self.weight, self.activation)
            search = FoldSearch(quantizers, ChannelAbsMax, self._candidates, self.objective, self.power_of_two)
            found = search.run(program, matmuls, groups)
        misses = [*(Miss(where(miss.matmul.node), miss.reason) for miss in unfoldable), *found.misses]
        return PassResult(len(found.folds), tuple(misses), found.numbers, tuple(found.folds))

    def _fixed(self, program: Program, groups: list[ScaleGroup], alpha: float) -> FoldSearchResult:
        found = FoldSearchResult()
        for group in groups:
            key = {m.node: Request(m.activation.name, ChannelAbsMax).key for m, _ in group.matmuls}
            activation, weight = _largest(
                group, lambda m, key=key: program.statistics[key[m.node]], lambda m: finite_rows(program, m)
            )
            smoothing = activation**alpha / weight ** (1 - alpha)
            smoothing = half_precision_factors(group, smoothing, self.power_of_two)
            found.folds.append(Fold(str(group), partial(fold, group=group, factors=smoothing)))
            found.folds[-1].apply(program)
        return found

    def _candidates(
        self, group: ScaleGroup, activation: Callable[[Matmul], Tensor], weight: Callable[[Matmul], Tensor]
    ) -> Iterator[Tensor]:
        return power_candidates(*_largest(group, activation, weight), self.grid, activation_alone=False)


def _largest(
    group: ScaleGroup, activation: Callable[[Matmul], Tensor], weight: Callable[[Matmul], Tensor]
) -> tuple[Tensor, Tensor]:
    """For every factor `[count]`, the largest magnitude in activations and in weights."""
    rows = group.largest(lambda matmul: weight(matmul).abs().flatten(0, -2).amax(0))
    return group.largest(activation).clamp(min=_SMALLEST), rows.clamp(min=_SMALLEST)
