"""w -> dequantize(quantize(w)): round every chosen weight to the nearest MX value (RTN), block by block.

The graph stays a float one, so that the loss from weights alone can be measured; `lower-mx` finds the same elements
again.
"""

from dataclasses import dataclass

from torch import Tensor

from mxcompile import reference
from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.ledger import Miss, PassResult
from mxcompile.measure import sqnr_db
from mxcompile.pipeline import FLOATING, Pass
from mxcompile.program import Program, Rounding, Stage, where
from mxcompile.rows import row_wise


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round to `format`, with scales by `rule` (by default the least squared error of each block)."""

    format: MXFormat
    rule: ScaleRule = ScaleRule.MSE

    name = "round-weights"
    accepts = FLOATING
    gives = Stage.ROUNDED

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
        rounded, scales = row_wise(self._round_rows, rows)
        program.set_tensor(matmul.parameter, matmul.rows(rounded).contiguous())
        program.rounded[matmul.parameter] = Rounding(self.format, scales)
        return rows, rounded

    def _round_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = reference.quantize(rows, self.format, self.rule)
        return reference.dequantize(codes, scales, self.format, rows.shape[-1], rows.dtype), scales
