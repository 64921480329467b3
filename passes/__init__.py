"""The built-in passes by name; each pass is one file."""

from typing import Final

from mxcompile.passes.allocate import Allocate
from mxcompile.passes.awq_fold import AwqFold
from mxcompile.passes.diagnose import Diagnose
from mxcompile.passes.distill import Distill
from mxcompile.passes.fine_blocks import FineBlocks
from mxcompile.passes.fuse_mx_gemm import FuseMXGemm
from mxcompile.passes.gptq import Gptq
from mxcompile.passes.learn_rounding import LearnRounding
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.permute import Permute
from mxcompile.passes.quantize_cache import QuantizeCache
from mxcompile.passes.rotate import Rotate
from mxcompile.passes.round_weights import RoundWeights
from mxcompile.passes.smooth_quant import SmoothQuant
from mxcompile.passes.tune_vectors import TuneVectors
from mxcompile.pipeline.interfaces import Pass

PASSES: Final[dict[str, type[Pass]]] = {
    "diagnose": Diagnose,
    "permute": Permute,
    "smooth-quant": SmoothQuant,
    "awq-fold": AwqFold,
    "rotate": Rotate,
    "fine-blocks": FineBlocks,
    "allocate": Allocate,
    "quantize-cache": QuantizeCache,
    "gptq": Gptq,
    "learn-rounding": LearnRounding,
    "round-weights": RoundWeights,
    "tune-vectors": TuneVectors,
    "distill": Distill,
    "lower-mx": LowerMX,
    "fuse-mx-gemm": FuseMXGemm,
}
