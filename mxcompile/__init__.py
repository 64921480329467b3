"""mxcompile: post-training quantization of PyTorch models to Microscaling formats, as passes over exported graphs."""

from mxcompile import formats
from mxcompile.api import quantize_and_compile
from mxcompile.deploy import deploy
from mxcompile.ledger import Miss, PassResult
from mxcompile.passes.recipes import recipes
from mxcompile.pipeline import Pass, Pipeline
from mxcompile.program import Program
from mxcompile.rules import Rule
from mxcompile.trace import trace
from mxcompile.weight import MXWeight

__all__ = [
    "MXWeight",
    "Miss",
    "Pass",
    "PassResult",
    "Pipeline",
    "Program",
    "Rule",
    "deploy",
    "formats",
    "quantize_and_compile",
    "recipes",
    "trace",
]
