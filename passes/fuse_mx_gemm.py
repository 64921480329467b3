"""dequantize(quantize(x)) -> mx::quantize_dequantize; matmul(x, dequantize(w)) -> mx::linear, which has fast kernels.

The same rules (`mxcompile.inductor.rewrites.fuse`) run inside `torch.compile` on Inductor's graphs. This pass applies
them to a lowered Program.
"""

from dataclasses import dataclass

from mxcompile.graph.program import Program, Stage
from mxcompile.graph.records import PassResult
from mxcompile.inductor.rewrites.fuse import fuse
from mxcompile.pipeline.interfaces import Pass


@dataclass(frozen=True)
class FuseMXGemm(Pass):
    """Fuse every MX matmul that a fused op can express; the others become misses with a reason."""

    name = "fuse-mx-gemm"
    accepts = frozenset({Stage.LOWERED, Stage.FUSED})
    gives = Stage.FUSED
    preserves_function = True

    @property
    def reads_calibration(self) -> bool:
        """False: only the graph is rewritten."""
        return False

    def run(self, program: Program) -> PassResult:
        """Apply the fusion rules to the graph."""
        result = fuse(program.graph)
        program.drop_unread()
        return result
