"""Errors and warnings that say what is wrong, where, and what to do about it.

Every error that mxcompile raises on purpose is an `MXCompileError`, so that a caller can tell "this model or this
request cannot be handled" from a bug.
"""

import inspect
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

_LISTED = 24
_NOT_THE_CALLER = ("mxcompile", "passes", "torch", "transformers", "contextlib")  # packages that a call may go through


class MXCompileError(Exception):
    """A request that cannot be carried out; the message says why and what to do.

    unfinished: what had been done when a run failed (`pipeline.unfinished.Unfinished`), None if that was nothing. A
    KeyboardInterrupt or any other exception that ends a run has it too.
    """

    unfinished: Any = None

    @property
    def program(self) -> Any:
        """The Program after the last finished pass of a failed run; None if no pass had finished."""
        return None if self.unfinished is None else self.unfinished.program


class UnknownNameError(MXCompileError, ValueError):
    """A name (recipe, format, pass, option) that does not exist; the message lists the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = get_close_matches(name, known, n=3, cutoff=0.4)
        listed = ", ".join(known[:_LISTED]) + (f" and {len(known) - _LISTED} more" if len(known) > _LISTED else "")
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {listed or 'none'}"
        super().__init__(f"unknown {kind} {name!r}: {hint}")


class ArgumentError(MXCompileError, TypeError):
    """An argument of a public call has the wrong type; the message names it and says what it may be."""


class InputError(MXCompileError, ValueError):
    """The example inputs or calibration data do not fit the model."""


class TraceError(MXCompileError):
    """The model cannot be traced to a graph."""


class PipelineError(MXCompileError, ValueError):
    """An invalid pipeline: a malformed text form, a bad option, or passes in an impossible order."""


class NoDataError(MXCompileError):
    """No calibration token has reached a value, such as the input of an expert that a router never selects."""


class PassError(MXCompileError):
    """A pass failed; the message names the pass and, where known, the node and its module."""


class CoverageError(MXCompileError):
    """Too few of the model's matmuls would be quantized."""


class VerifyError(MXCompileError):
    """A Program violates an invariant of its stage."""


class WeightError(MXCompileError, ValueError):
    """A parameter holds values that cannot be quantized (NaN or Inf)."""


class DumpError(MXCompileError):
    """A dump folder cannot be written or read."""


class PreservationError(MXCompileError):
    """A pass that must preserve the model's function changed it; the pass was undone."""


class CompileError(MXCompileError):
    """Compilation is not possible on this machine; the message says what is missing."""


class DeployError(MXCompileError):
    """A lowered Program cannot be applied to the module."""


class TrainingError(MXCompileError):
    """A model cannot be prepared for training, or a trained one cannot be deployed or merged."""


class CheckpointError(MXCompileError):
    """A model cannot be saved, or a folder does not hold an intact saved model."""


class RankError(MXCompileError):
    """One of several processes that share a run has ended, or does something else than the others."""


class RecoveryError(MXCompileError):
    """A quantized model is further from its float baseline than allowed."""


def warn(message: str) -> None:
    """Give a UserWarning at the line that called mxcompile, through however many of its functions that was."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _NOT_THE_CALLER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
