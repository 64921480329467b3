"""w -> dequantize(quantize(w)): round every chosen weight to the nearest MX value (RTN), block by block.

The graph stays a float one, so that the loss from weights alone can be measured; `lower-mx` finds the same elements
again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mxcompile import reference
from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.calibration.observers import TokenSample
from mxcompile.calibration.run import Request
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.importance import channel_importance, quantize_weighted
from mxcompile.ledger import Miss, PassResult
from mxcompile.measure import sqnr_db
from mxcompile.pipeline import FLOATING, Pass
from mxcompile.program import Program, Rounding, Stage, where
from mxcompile.rows import row_wise


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round to `format`, with scales by `rule` (by default the least squared error of each block).

    weighted: choose scales by the squared error weighted with the mean square of each input channel, as calibration
        shows it (`importance.py`), in place of `rule`.
    """

    format: MXFormat
    rule: ScaleRule = ScaleRule.MSE
    weighted: bool = False

    name = "round-weights"
    accepts = FLOATING
    gives = Stage.ROUNDED

    def requests(self, program: Program) -> Sequence[Request]:
        """Samples of the weights' inputs, if scales are weighted by them."""
        matmuls = choose(program).matmuls if self.weighted else ()
        return [Request(matmul.activation.name, TokenSample) for matmul in matmuls]

    def run(self, program: Program) -> PassResult:
        """Replace the weights; one that something else reads too is left to `lower-mx`, which makes its own copy."""
        choice = choose(program)
        misses = list(choice.misses)
        numbers: dict[str, dict[str, float]] = {}
        for matmul in choice.matmuls:
            if matmul.parameter in program.rounded:
                continue
            if not choice.alone(matmul):
                misses.append(Miss(where(matmul.node), "its weight is read elsewhere too: lower-mx rounds a copy"))
                continue
            before, after = self._round(program, matmul)
            numbers[matmul.parameter] = {"weight_sqnr_db": sqnr_db(before, after)}
        return PassResult(len(numbers), tuple(misses), numbers)

    def _round(self, program: Program, matmul: Matmul) -> tuple[Tensor, Tensor]:
        rows = finite_rows(program, matmul)
        rounded, scales = row_wise(partial(self._round_rows, self._importance(program, matmul)), rows)
        program.set_tensor(matmul.parameter, matmul.rows(rounded).contiguous())
        program.rounded[matmul.parameter] = Rounding(self.format, scales)
        return rows, rounded

    def _importance(self, program: Program, matmul: Matmul) -> Tensor | None:
        if not self.weighted:
            return None
        return channel_importance(program.statistics[Request(matmul.activation.name, TokenSample).key])

    def _round_rows(self, importance: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        if importance is None:
            codes, scales = reference.quantize(rows, self.format, self.rule)
        else:
            codes, scales = quantize_weighted(rows, importance.to(rows.device), self.format)
        return reference.dequantize(codes, scales, self.format, rows.shape[-1], rows.dtype), scales
