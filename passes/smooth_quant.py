"""linear(x, w) -> linear(x / s, w * s): move outliers from activations into weights.

s_j = max|X_j|**alpha / max_l|W_l,j|**(1 - alpha), with the maximum over all quantized weights that read the value (Xiao
et al., SmoothQuant, arXiv 2211.10438, eq. 4). 1 / s is folded into the op that produces x: a norm's weight, or the rows
of the preceding linear. Producers and readers are found from data flow; what cannot be folded is skipped and reported.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import ScaleGroup, find_groups, fold, representable_factors
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.runs.run import NO_TOKENS, Request
from mxcompile.calibration.searches.factor_search import Objective, power_candidates
from mxcompile.calibration.searches.fold_search import FoldSearch, FoldSearchResult
from mxcompile.calibration.statistics.observers import ChannelAbsMax
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Fold, Miss, PassResult
from mxcompile.numerics.row_slices import column_wise
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.options import Range

_SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """alpha: share of an outlier that moves into the weights, 0 (none) to 1 (all); none: search it for every group.

    through_linears: also smooth a linear's output (v -> o, up -> down), not only a norm's.
    power_of_two: round the factors to powers of two, which fold bit-exactly; half-precision parameters always get such
    factors.
    For the search: weight, activation: the formats that later passes will use; objective: where the error of an alpha
    is measured ("output" or "block", as in `awq-fold`); grid: number of alphas tried.
    """

    alpha: Annotated[float | None, Range(0, 1)] = 0.5
    through_linears: bool = False
    power_of_two: bool = False
    weight: MXFormat | None = None
    activation: MXFormat | None = None
    objective: Objective = Objective.OUTPUT
    grid: Annotated[int, Range(1)] = 10

    name = "smooth-quant"
    preserves_function = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is None and self.weight is None:
            raise PipelineError(
                "smooth-quant{alpha=none} searches alpha and needs the formats: set weight=... and activation=..."
            )

    def requests(self, program: Program) -> Sequence[Request]:
        """The abs-max of every channel to smooth; none for a search, which observes it itself."""
        if self.alpha is None:
            return ()
        groups, _ = find_groups(program, choose(program).matmuls, self.through_linears)
        return [Request(m.activation.name, ChannelAbsMax) for group in groups for m, _ in group.matmuls]

    def run(self, program: Program) -> PassResult:
        """Fold the smoothing factors into the producer and the readers of every value."""
        matmuls = choose(program).matmuls
        groups, unfoldable = find_groups(program, matmuls, self.through_linears)
        if self.alpha is not None:
            result = self._fixed(program, groups, self.alpha)
        else:
            assert self.weight is not None
            quantizers = Quantizers(self.weight, self.activation)
            search = FoldSearch(quantizers, ChannelAbsMax, self._candidates, self.objective, self.power_of_two)
            result = search.run(program, matmuls, groups)
        misses = [*(Miss(where(miss.matmul.node), miss.reason) for miss in unfoldable), *result.misses]
        return PassResult(len(result.folds), tuple(misses), result.numbers, tuple(result.folds))

    def _fixed(self, program: Program, groups: list[ScaleGroup], alpha: float) -> FoldSearchResult:
        result = FoldSearchResult()
        for group in groups:
            requests = {m.node: Request(m.activation.name, ChannelAbsMax) for m, _ in group.matmuls}
            seen = group.restricted(lambda m, requests=requests: requests[m.node].seen(program))
            if not seen.matmuls:
                result.misses.append(Miss(str(group), NO_TOKENS))
                continue
            activation = seen.largest(lambda m, requests=requests: requests[m.node].result(program))
            weight = group.largest(lambda m: _column_absmax(finite_rows(program, m)))
            smoothing = activation.clamp(min=_SMALLEST) ** alpha / weight.clamp(min=_SMALLEST) ** (1 - alpha)
            smoothing = torch.where((activation > 0) & (weight > 0), smoothing, 1.0)  # nothing to balance
            smoothing = representable_factors(group, smoothing, self.power_of_two)
            result.folds.append(Fold(str(group), partial(fold, group=group, factors=smoothing)))
            result.folds[-1].apply(program)
        return result

    def _candidates(
        self, group: ScaleGroup, activation: Callable[[Matmul], Tensor], weight: Callable[[Matmul], Tensor]
    ) -> Iterator[Tensor]:
        largest = group.largest(activation), group.largest(lambda matmul: _column_absmax(weight(matmul)).float())
        return power_candidates(*largest, self.grid, activation_alone=False)


def _column_absmax(weight: Tensor) -> Tensor:
    """The largest magnitude `[in]` of the columns of a weight `[..., out, in]`."""
    return column_wise(lambda rows: rows.abs().amax(0), weight)
