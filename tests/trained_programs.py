"""A small model to train, the same for all passes that do, and how far a program is from it."""

from collections.abc import Callable

import torch
from models import inputs, llama, output
from torch import Tensor, nn

import mxcompile
from mxcompile.graph.program import Program
from mxcompile.numerics.metrics import kl_divergence
from mxcompile.pipeline.pipeline import Pipeline


def small_run() -> tuple[nn.Module, Program, list[dict[str, Tensor]], Callable[[str], Program]]:
    """(model, its trace, calibration batches, pipeline text -> Program)."""
    model = llama(2)
    batches = [inputs("llama", 8, 32, seed=seed) for seed in range(16)]
    program = mxcompile.trace(model, batches[0])
    return model, program, batches, lambda text: Pipeline.parse(text).run(program, batches)


def divergence(model: nn.Module, program: Program) -> float:
    """KL of the predictions on inputs that calibration has not seen."""
    x = inputs("llama", 8, 32, seed=99)
    with torch.no_grad():
        return kl_divergence(output(model(**x)), output(program(**x)))
