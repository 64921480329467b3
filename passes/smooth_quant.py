"""linear(x, w) -> linear(x / s, w * s): move outliers from activations into weights.

s_j = max|X_j|**alpha / max_l|W_l,j|**(1 - alpha), the maximum over all quantized weights that read the value (Xiao et
al., SmoothQuant, arXiv 2211.10438, eq. 4). x / s is computed by whatever makes x: a norm's weight, the rows of the
linear before. Values, makers and readers are found from data flow; what cannot be folded is left alone and reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.groups import ScaleGroup, find_groups, fold, half_precision_factors
from mxcompile.analysis.matmuls import finite_rows
from mxcompile.calibration.observers import ChannelAbsMax
from mxcompile.calibration.run import Request
from mxcompile.ledger import Fold, Miss, PassResult
from mxcompile.pipeline import Pass
from mxcompile.program import Program, where

_SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """alpha: how much of an outlier moves into the weights, 0 (none) to 1 (all).

    through_linears: also smooth values made by a linear (v -> o, up -> down), not only those made by a norm.
    power_of_two: round the factors to powers of two, which folds bit-exactly; parameters in half precision always get
    such factors.
    """

    alpha: float = 0.5
    through_linears: bool = False
    power_of_two: bool = False

    name = "smooth-quant"
    preserves_function = True

    def requests(self, program: Program) -> Sequence[Request]:
        """The largest magnitude of every channel that will be smoothed."""
        groups, _ = find_groups(program, choose(program).matmuls, self.through_linears)
        return [Request(m.activation.name, ChannelAbsMax) for group in groups for m, _ in group.matmuls]

    def run(self, program: Program) -> PassResult:
        """Fold the smoothing factors into the makers and the readers of every value."""
        groups, unfoldable = find_groups(program, choose(program).matmuls, self.through_linears)
        folds: list[Fold] = []
        for group in groups:
            smoothing = half_precision_factors(group, self._smoothing(program, group), self.power_of_two)
            folds.append(Fold(str(group), partial(fold, group=group, factors=smoothing)))
            folds[-1].apply(program)
        misses = tuple(Miss(where(miss.matmul.node), miss.reason) for miss in unfoldable)
        return PassResult(len(groups), misses, folds=tuple(folds))

    def _smoothing(self, program: Program, group: ScaleGroup) -> Tensor:
        """Factors `[count]` (float32) by which the activation's channels are divided."""
        key = {m.node: Request(m.activation.name, ChannelAbsMax).key for m, _ in group.matmuls}
        activation = group.largest(lambda m: program.statistics[key[m.node]]).clamp(min=_SMALLEST)
        weight = group.largest(lambda m: finite_rows(program, m).abs().flatten(0, -2).amax(0)).clamp(min=_SMALLEST)
        return activation**self.alpha / weight ** (1 - self.alpha)
