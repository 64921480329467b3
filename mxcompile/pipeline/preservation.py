"""Check that a pass preserves the function: compare outputs on the example inputs before and after it."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from mxcompile.analysis.attentions import with_exact_cache
from mxcompile.analysis.visibility import output_masks, without_hidden
from mxcompile.errors import PreservationError
from mxcompile.graph.agreement import agreement_db, check_repeatable, compared_outputs
from mxcompile.graph.program import Program
from mxcompile.graph.records import Fold

REQUIRED_DB = 100.0
"""Required SQNR in dB of a fold in float32; float rounding alone leaves 115 to 140 dB."""
REQUIRED_DB_HALF = 30.0
"""Required SQNR in dB where weights are rounded to half precision again; 40 to 50 dB are usual."""


def record_outputs(program: Program) -> None:
    """Store the outputs on the example inputs, unless they are stored and no pass has changed the function since."""
    if program.outputs is None:
        program.outputs = _run(program)


def check_preserved(
    program: Program, before: Program, folds: tuple[Fold, ...], pass_name: str, required_db: float
) -> float:
    """SQNR in dB of the outputs against the recorded ones.

    Raises PreservationError, which names the first fold at fault, if it is less than `required_db`. before: a copy of
    the program before the pass; the caller restores it. Raises InputError if two runs of the model itself differ.
    """
    assert program.outputs is not None
    outputs = _run(program)
    agreement, output = agreement_db(program.outputs, outputs)
    if agreement >= required_db:
        program.outputs = program.outputs if agreement >= REQUIRED_DB else outputs
        return agreement
    origin = before.origin or before
    check_repeatable(origin, lambda: origin(*before.example.args, **before.example.kwargs), required_db)
    culprit = _first_at_fault(before, program.outputs, folds, required_db)
    raise PreservationError(
        f"{pass_name} must preserve the function, but output {output} agrees only to {agreement:.1f} dB (required: "
        f"{required_db:.0f} dB){culprit}. The pass was undone; please report the model"
    )


def _first_at_fault(before: Program, expected: dict[str, Tensor], folds: tuple[Fold, ...], required_db: float) -> str:
    attempt = before.copy()
    for fold in folds:
        fold.apply(attempt)
        agreement, _ = agreement_db(expected, _run(attempt))
        if agreement < required_db:
            return f"; {agreement:.1f} dB after the fold of {fold.where}"
    return ""


@contextmanager
def _exact_products() -> Generator[None]:
    """Float32 matrices are multiplied as such in the block, also where the user allows TF32 (58 dB on an H200)."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _run(program: Program) -> dict[str, Tensor]:
    """The outputs by path, as rows without those that a mask hides: a pass may change these.

    Keys and values of a cache stay float: rounded the other way, one of them would be a larger change than any fold.
    """
    with _exact_products():
        outputs = compared_outputs(with_exact_cache(program)(*program.example.args, **program.example.kwargs))
    return without_hidden(outputs, output_masks(program, program.example))
