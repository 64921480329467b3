"""Checks that a pass which promises to keep the function did: outputs on the example inputs before and after it."""

from torch import Tensor

from mxcompile.errors import PreservationError
from mxcompile.graph.agreement import agreement_db, output_tensors
from mxcompile.graph.program import Program
from mxcompile.graph.records import Fold

REQUIRED_DB = 100.0
"""What a fold in float32 keeps; rounding alone leaves 115 to 140 dB."""
REQUIRED_DB_HALF = 30.0
"""What is left at least where weights in half precision have to be rounded to it again; 40 to 50 dB are usual."""


def record_outputs(program: Program) -> None:
    """Keep the outputs on the example inputs, once, until a pass changes the function."""
    if program.outputs is None:
        program.outputs = _run(program)


def check_preserved(program: Program, before: Program, folds: tuple[Fold, ...], pass_name: str, least: float) -> float:
    """SQNR in dB of the outputs against the remembered ones.

    Raises PreservationError that names the first fold at fault if they agree less than `least`. `before` is a copy of
    the program as it was; the caller puts it back.
    """
    assert program.outputs is not None
    outputs = _run(program)
    found, output = agreement_db(program.outputs, outputs)
    if found >= least:
        program.outputs = program.outputs if found >= REQUIRED_DB else outputs
        return found
    culprit = _first_at_fault(before, program.outputs, folds, least)
    raise PreservationError(
        f"{pass_name} says it keeps the function, but output {output} agrees only to {found:.1f} dB (at least "
        f"{least:.0f} wanted){culprit}. The pass was undone; please report the model"
    )


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
