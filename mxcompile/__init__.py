"""mxcompile: post-training quantization of PyTorch models to Microscaling formats, as passes over exported graphs."""

from typing import TYPE_CHECKING, Any

from mxcompile import formats
from mxcompile.analysis.choice import choose
from mxcompile.api import load, quantize_and_compile, quantize_checkpoint
from mxcompile.calibration.data.batches import calibration_batches
from mxcompile.calibration.data.self_generated import generate_calibration
from mxcompile.calibration.data.windows import token_windows
from mxcompile.calibration.ranks.process_group import alone
from mxcompile.calibration.runs.run import Request
from mxcompile.calibration.statistics import observers
from mxcompile.checkpoint import read_gguf, register, save
from mxcompile.deploy import deploy
from mxcompile.diagnostics.bisect import Bisection, bisect
from mxcompile.diagnostics.evaluation import Evaluation, evaluate
from mxcompile.diagnostics.explain import explain
from mxcompile.diagnostics.explanation import Explanation
from mxcompile.diagnostics.ledger import Ledger
from mxcompile.diagnostics.measure import Measure
from mxcompile.export import export
from mxcompile.graph.inputs import WeightedBatch
from mxcompile.graph.printer import print_changes, print_program
from mxcompile.graph.program import Program
from mxcompile.graph.records import Miss, PassResult
from mxcompile.graph.rules import Rule, apply_rules
from mxcompile.graph.trace import trace
from mxcompile.inductor import compile_module
from mxcompile.model_free.quantize_files import quantize_files
from mxcompile.numerics import reference
from mxcompile.passes.recipes import recipes
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.weight import MXWeight
from mxcompile.training.adapters import merge_adapters
from mxcompile.training.prepare import finish_training, prepare_training
from mxcompile.training.rounded_adapters import round_adapters

if TYPE_CHECKING:
    from mxcompile.tensor.cache import MXCache

__all__ = [
    "Bisection",
    "Evaluation",
    "Explanation",
    "Ledger",
    "MXCache",
    "MXWeight",
    "Measure",
    "Miss",
    "Pass",
    "PassResult",
    "Pipeline",
    "Program",
    "Request",
    "Rule",
    "WeightedBatch",
    "alone",
    "apply_rules",
    "bisect",
    "calibration_batches",
    "choose",
    "compile_module",
    "deploy",
    "evaluate",
    "explain",
    "export",
    "finish_training",
    "formats",
    "generate_calibration",
    "load",
    "merge_adapters",
    "observers",
    "prepare_training",
    "print_changes",
    "print_program",
    "quantize_and_compile",
    "quantize_checkpoint",
    "quantize_files",
    "read_gguf",
    "recipes",
    "reference",
    "round_adapters",
    "save",
    "token_windows",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name == "MXCache":
        from mxcompile.tensor.cache import MXCache  # imports transformers

        return MXCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()  # so that transformers reads quantized checkpoints
