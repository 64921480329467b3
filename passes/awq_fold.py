"""linear(x, w) -> linear(x / s, w * s), s searched: protect the weight channels that matter most.

For every scale group the factors that lose least under the formats to come are searched (`search.py`): AWQ (Lin et al.,
arXiv 2306.00978) for weight-only formats, its activation-aware form AQAS (Lee et al., arXiv 2311.05161) with both
quantizers in the loop otherwise. Weights are tried with scales chosen by input importance: follow with
`round-weights{weighted=true}`. x / s is computed by whatever makes x, so nothing is added to the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.groups import ScaleGroup, find_groups, fold, half_precision_factors
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.calibration.observers import ChannelMeanAbs, Observer, TokenSample
from mxcompile.calibration.run import Request
from mxcompile.formats import MXFormat
from mxcompile.ledger import Fold, Miss, PassResult
from mxcompile.pipeline import Pass
from mxcompile.program import Program, where
from mxcompile.search import Found, Operand, Quantizers, candidates, search

_LARGEST_SAMPLE = 1 << 22


@dataclass(frozen=True)
class AwqFold(Pass):
    """weight, activation: the formats that `round-weights` and `lower-mx` will use (activation none: weight-only).

    through_linears: also search for values made by a linear (v -> o, up -> down), not only for those made by a norm.
    grid: exponents tried for each kind of factor. power_of_two: round the factors to powers of two, which folds
    bit-exactly; parameters in half precision always get such factors.
    """

    weight: MXFormat
    activation: MXFormat | None = None
    through_linears: bool = False
    grid: int = 5
    power_of_two: bool = False

    name = "awq-fold"
    preserves_function = True

    def requests(self, program: Program) -> Sequence[Request]:
        """Mean magnitudes of every channel, and a sample of tokens to measure errors on."""
        groups, _ = find_groups(program, choose(program).matmuls, self.through_linears)
        observers = (ChannelMeanAbs, TokenSample)
        return [Request(m.activation.name, kind) for group in groups for m, _ in group.matmuls for kind in observers]

    def run(self, program: Program) -> PassResult:
        """Search and fold group by group."""
        groups, unfoldable = find_groups(program, choose(program).matmuls, self.through_linears)
        misses = [Miss(where(miss.matmul.node), miss.reason) for miss in unfoldable]
        folds: list[Fold] = []
        numbers: dict[str, dict[str, float]] = {}
        for group in groups:
            found = self._search(program, group)
            numbers[str(group)] = {"error_over_rtn": found.error / max(found.error_before, 1e-30)}
            if found.error >= found.error_before:
                misses.append(Miss(str(group), "no factors lose less than none"))
                continue
            folds.append(Fold(str(group), partial(fold, group=group, factors=found.factors)))
            folds[-1].apply(program)
        return PassResult(len(folds), tuple(misses), numbers, tuple(folds))

    def _search(self, program: Program, group: ScaleGroup) -> Found:
        def statistic(matmul: Matmul, kind: type[Observer]) -> Tensor:
            return program.statistics[Request(matmul.activation.name, kind).key]

        weights = {m.node: finite_rows(program, m).float().flatten(0, -2) for m, _ in group.matmuls}
        operands: list[Operand] = []
        for matmul, channels in group.matmuls:
            weight = weights[matmul.node]
            operands.append(Operand(self._sample(statistic(matmul, TokenSample), weight), weight, channels))
        tried = candidates(
            group.mean(lambda m: statistic(m, ChannelMeanAbs)),
            group.mean(lambda m: weights[m.node].abs().mean(0)),
            self.grid,
        )
        rounded = (half_precision_factors(group, factors, self.power_of_two) for factors in tried)
        return search(group, operands, rounded, Quantizers(self.weight, self.activation))

    def _sample(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Fewer tokens for the stacked weights of many experts: outputs `[tokens, out]` are held at once.

        Every n-th one: a sample begins with its largest tokens.
        """
        return rows[:: -(-len(rows) // max(16, _LARGEST_SAMPLE // len(weight)))]
