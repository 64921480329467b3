"""Did the function stay the same? Outputs on the example inputs before and after a pass that says it preserves it."""

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from mxcompile.errors import PreservationError
from mxcompile.graph.inputs import named_leaves
from mxcompile.graph.program import Program
from mxcompile.graph.records import Fold
from mxcompile.numerics.metrics import sqnr_db

LEAST_DB = 100.0
"""What a fold in float32 keeps; rounding alone leaves 115 to 140 dB."""
LEAST_DB_ROUNDED = 30.0
"""What is left at least where weights in half precision have to be rounded to it again; 40 to 50 dB are usual."""
OnChange = Literal["error", "warn"]


def output_tensors(output: Any) -> dict[str, Tensor]:
    """Float tensors of a model's output by their path in it."""
    return {path: leaf for path, leaf in named_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def agreement_db(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> tuple[float, str]:
    """(least SQNR over the outputs, the name of that output); -inf if one is missing or differs in shape or NaNs."""
    worst = min(((_agreement(value, given.get(name)), name) for name, value in wanted.items()), default=(math.inf, ""))
    return worst[0], worst[1] or "0"


def _agreement(value: Tensor, other: Tensor | None) -> float:
    if other is None or value.shape != other.shape:
        return -math.inf
    if torch.isfinite(value).all() and torch.isfinite(other).all():
        return sqnr_db(value, other)
    finite = torch.isfinite(value)
    kinds = (tensor.masked_fill(finite, 0).nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0) for tensor in (value, other))
    if not torch.equal(*kinds) or not torch.isfinite(other[finite]).all():
        return -math.inf
    return sqnr_db(value[finite], other[finite])


def remember(program: Program) -> None:
    """Keep the outputs on the example inputs, once, until a pass changes the function."""
    if program.outputs is None:
        program.outputs = _run(program)


def check_preserved(
    program: Program, before: Program, folds: tuple[Fold, ...], pass_name: str, least: float, on_change: OnChange
) -> float:
    """SQNR in dB of the outputs against the remembered ones.

    Below `least`: PreservationError that names the first fold at fault, or a warning if `on_change` is "warn". `before`
    is a copy of the program as it was; the caller puts it back.
    """
    assert program.outputs is not None
    outputs = _run(program)
    found, output = agreement_db(program.outputs, outputs)
    if found >= least:
        program.outputs = program.outputs if found >= LEAST_DB else outputs
        return found
    culprit = _first_at_fault(before, program.outputs, folds, least)
    message = (
        f"{pass_name} says it keeps the function, but output {output} agrees only to {found:.1f} dB (at least "
        f"{least:.0f} wanted){culprit}"
    )
    if on_change == "error":
        raise PreservationError(f"{message}. The pass was undone; please report the model")
    warnings.warn(message, stacklevel=2)
    program.outputs = outputs
    return found


def _first_at_fault(before: Program, wanted: dict[str, Tensor], folds: tuple[Fold, ...], least: float) -> str:
    attempt = before.copy()
    for fold in folds:
        fold.apply(attempt)
        found, _ = agreement_db(wanted, _run(attempt))
        if found < least:
            return f"; {found:.1f} dB after the fold of {fold.where}"
    return ""


def _run(program: Program) -> dict[str, Tensor]:
    return output_tensors(program(*program.example.args, **program.example.kwargs))
