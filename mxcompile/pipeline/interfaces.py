"""What users subclass: `Pass` rewrites a Program, `Instrument` watches a pipeline run and never changes a Program."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mxcompile.calibration.run import Request
from mxcompile.graph.program import Program, Stage
from mxcompile.graph.records import Measured, PassRecord, PassResult
from mxcompile.pipeline import text_form
from mxcompile.pipeline.preservation import REQUIRED_DB

FLOATING = frozenset({Stage.FLOAT, Stage.ROUNDED})


class Pass(ABC):
    """One rewrite of a Program. Subclasses are frozen dataclasses: the fields are the pass's options.

    name: kebab-case, as it appears in a pipeline.
    accepts: the stages in which the pass makes sense; checked when a pipeline is built.
    gives: the stage a Program is in afterwards, or None if the pass does not change it.
    preserves_function: True if the Program computes the same as before, up to float rounding.
    """

    name: ClassVar[str]
    accepts: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT})
    gives: ClassVar[Stage | None] = None
    preserves_function: ClassVar[bool] = False

    @property
    def reads_calibration(self) -> bool:
        """Whether calibration data can make a difference to the pass; True unless it is known that it cannot."""
        return True

    def required_db(self, program: Program) -> float:
        """How well outputs before and after must agree if the pass keeps the function."""
        del program
        return REQUIRED_DB

    def requests(self, program: Program) -> Sequence[Request]:
        """Statistics of values that `run` will read from `program.statistics`; gathered before it is called."""
        del program
        return ()

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Rewrite the Program in place; its graph must be valid afterwards, and a second run must change nothing."""

    def __str__(self) -> str:
        return text_form.print_call(self.name, self)


@dataclass(frozen=True)
class PipelineStep:
    """A pass at its place (counted from 1) in a pipeline."""

    index: int
    current: Pass
    passes: tuple[Pass, ...]


class Instrument:
    """Called around each pass; every method may be left as it is."""

    def start(self, program: Program, passes: tuple[Pass, ...]) -> None:
        """Before the first pass; passes: all that will run, in order."""

    def before(self, program: Program, step: PipelineStep) -> None:
        """Before a pass, and before its statistics are gathered."""

    def segment(self, program: Program, step: PipelineStep, done: int, total: int) -> None:
        """Before each of the parts that a pass goes through (segments, batches, matmuls); `done` are finished."""

    def measure(self, program: Program, step: PipelineStep, result: PassResult) -> Measured | None:
        """After a pass has succeeded and before it is recorded: numbers for its record, if it makes any."""

    def after(self, program: Program, step: PipelineStep, record: PassRecord) -> None:
        """After a pass, with what it did."""

    def failed(self, program: Program, step: PipelineStep, error: Exception) -> None:
        """A pass raised, or left what cannot be run; the program may be half rewritten. The error names the pass."""

    def finish(self, program: Program) -> None:
        """After the last pass."""
