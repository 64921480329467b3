"""Instruments watch a pipeline run; they never change a Program."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mxcompile.graph.program import Program
from mxcompile.graph.records import Measured, PassRecord, PassResult

if TYPE_CHECKING:
    from mxcompile.pipeline import Pass, Pipeline


@dataclass(frozen=True)
class Step:
    """A pass at its place (counted from 1) in a pipeline."""

    index: int
    current: "Pass"
    pipeline: "Pipeline"


class Instrument:
    """Called around each pass; every method may be left as it is."""

    def start(self, program: Program, pipeline: "Pipeline") -> None:
        """Before the first pass."""

    def before(self, program: Program, step: Step) -> None:
        """Before a pass, and before its statistics are gathered."""

    def segment(self, program: Program, step: Step, done: int, total: int) -> None:
        """Before each of the parts that a pass goes through (segments, batches, matmuls); `done` are finished."""

    def measure(self, program: Program, step: Step, result: PassResult) -> Measured | None:
        """After a pass has succeeded and before it is recorded: numbers for its record, if it makes any."""

    def after(self, program: Program, step: Step, record: PassRecord) -> None:
        """After a pass, with what it did."""

    def failed(self, program: Program, step: Step, error: Exception) -> None:
        """A pass raised, or left what cannot be run; the program may be half rewritten. The error names the pass."""

    def finish(self, program: Program) -> None:
        """After the last pass."""
