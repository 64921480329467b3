"""w -> dequantize(quantize(w)): round every chosen weight to the nearest MX value (RTN), block by block.

The graph stays in float, so that the error of weight quantization alone can be measured. `lower-mx` packs the same
elements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mxcompile.analysis.choice import choose, override_formats
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.calibration.finished_parts import load_rounded, save_rounded
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.run import NO_TOKENS, Request
from mxcompile.calibration.statistics.observers import ChannelImportance
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.graph.name_patterns import Overrides
from mxcompile.graph.program import Program, Rounding, Stage, where
from mxcompile.graph.records import Miss, PassResult
from mxcompile.numerics.importance import round_rows
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.pipeline.interfaces import FLOATING, Pass


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round to `format`, with scales by `rule` (by default the least squared error of each block).

    weighted: weight the squared error of the `mse` rule by the mean square of each input channel in calibration data
        (`importance.py`). Weights for which an earlier pass has measured it are always rounded this way.
    overrides: other formats by name pattern, None for a weight that stays float; `lower-mx` needs the same.
    """

    format: MXFormat
    rule: ScaleRule = ScaleRule.MSE
    weighted: bool = False
    overrides: Mapping[str, MXFormat | None] = Overrides()

    name = "round-weights"
    accepts = FLOATING
    gives = Stage.ROUNDED

    @property
    def reads_calibration(self) -> bool:
        """True if scales are chosen by calibrated channel importance."""
        return self.weighted

    def requests(self, program: Program) -> Sequence[Request]:
        """The channel importance of the weights' inputs, if `weighted` and no pass has measured it."""
        matmuls = choose(program).matmuls if self.weighted else ()
        missing = [matmul for matmul in matmuls if matmul.parameter not in program.importance]
        return [Request(matmul.activation.name, ChannelImportance) for matmul in missing]

    def run(self, program: Program) -> PassResult:
        """Round the weights. A weight with other readers is left to `lower-mx`, which packs a copy."""
        choice, formats = override_formats(program, choose(program), self.format, self.overrides)
        misses = list(choice.misses)
        numbers: dict[str, dict[str, float]] = {}
        for index, matmul in enumerate(program.track(choice.matmuls)):
            if matmul.parameter in program.rounded:
                continue
            if not choice.owns_weight(matmul):
                misses.append(choice.shared_weight_miss(matmul))
                continue
            if self.weighted and self._importance(program, matmul) is None:
                misses.append(Miss(where(matmul.node), f"rounded without weighting: {NO_TOKENS}"))
            part, fmt = f"{index:05}", formats[matmul.node]
            notes = load_rounded(program, part, matmul.parameter, matmul.axis, fmt)
            if notes is None:
                notes = [{"weight_sqnr_db": self._round(program, matmul, fmt)}]
                save_rounded(program, part, matmul.parameter, matmul.axis, notes)
            numbers[matmul.parameter] = notes[0]
        return PassResult(len(numbers), tuple(misses), numbers)

    def _round(self, program: Program, matmul: Matmul, fmt: MXFormat) -> float:
        """Round a weight; returns its SQNR in dB."""
        rows = finite_rows(program, matmul)
        importance = self._importance(program, matmul)
        rounded, scales = ranks_of(program).by_rows(lambda part: round_rows(part, fmt, self.rule, importance), rows)
        program.set_rounded(matmul.parameter, rounded, Rounding(fmt, scales), matmul.axis)
        return sqnr_db(rows, rounded)

    def _importance(self, program: Program, matmul: Matmul) -> Tensor | None:
        request = Request(matmul.activation.name, ChannelImportance)
        measured = request.result(program) if self.weighted and request.seen(program) else None
        return program.importance.get(matmul.parameter, measured)
