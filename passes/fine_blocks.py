"""formats[w] = element with block 128, 64, 32 or 16: small blocks where they pay for their scales.

A bit more in every element gains 6.02 dB. A matrix begins with the largest block, which is halved as long as that gains
more per bit of scales: 0.38 dB from 128 to 64, 0.75 dB from 64 to 32, 1.5 dB from 32 to 16. The decision goes to
`round-weights`, `gptq` and `lower-mx` by `Program.formats`. After adaptive granularity in FineQuant (Kim et al., arXiv
2308.09723), which halves while the range of the scales shrinks. Blocks other than 32 are not OCP's.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import finite_rows
from mxcompile.errors import PipelineError
from mxcompile.formats import BLOCK_SIZES, MXFormat
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Miss, PassResult
from mxcompile.numerics.metrics import rounding_db
from mxcompile.pipeline.interfaces import Pass

_DB_PER_BIT = 20 * math.log10(2)


@dataclass(frozen=True)
class FineBlocks(Pass):
    """element: the format of all weights, of which each gets a block size. least, most: the smallest and the largest.

    Errors are weighted by the mean square of each input channel where a pass has measured it (`awq-fold`).
    """

    element: MXFormat
    least: int = 16
    most: int = 128

    name = "fine-blocks"
    preserves_function = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not {self.least, self.most} <= set(BLOCK_SIZES) or self.least > self.most:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise PipelineError(
                f"fine-blocks{{least={self.least},most={self.most}}}: give two of the block sizes {sizes}, "
                "the smaller one first"
            )

    @property
    def reads_calibration(self) -> bool:
        """Weights alone decide, and what an earlier pass has measured."""
        return False

    def run(self, program: Program) -> PassResult:
        """Choose a block size for every weight."""
        choice = choose(program)
        misses = list(choice.misses)
        numbers: dict[str, dict[str, float]] = {}
        rewrites = 0
        for matmul in program.track(list({matmul.parameter: matmul for matmul in choice.matmuls}.values())):
            name = matmul.parameter
            before = program.formats.get(name, self.element)
            if before is None or before.name != self.element.name:
                misses.append(Miss(where(matmul.node), f"a pass has chosen {before or 'float'} for it"))
                continue
            fmt, sqnr = self._chosen(finite_rows(program, matmul), program.importance.get(name))
            numbers[name] = {"block": fmt.block_size, "weight_sqnr_db": sqnr}
            rewrites += program.formats.get(name) != fmt
            program.formats[name] = fmt
        return PassResult(rewrites, tuple(misses), numbers)

    def _chosen(self, weight: Tensor, importance: Tensor | None) -> tuple[MXFormat, float]:
        """(format, SQNR in dB) of a weight `[..., out, in]`."""
        fmt = self.element.with_block(self.most)
        sqnr = rounding_db(weight, fmt, importance)
        while fmt.block_size > self.least:
            finer = fmt.with_block(fmt.block_size // 2)
            gained = rounding_db(weight, finer, importance)
            bits = _bits(finer, weight.shape[-1]) - _bits(fmt, weight.shape[-1])
            if not gained - sqnr > _DB_PER_BIT * bits:
                break
            fmt, sqnr = finer, gained
        return fmt, sqnr


def _bits(fmt: MXFormat, size: int) -> float:
    """Bits a value of rows of `size` values, with scales and padding."""
    return 8 * fmt.storage_bytes(1, size) / size
