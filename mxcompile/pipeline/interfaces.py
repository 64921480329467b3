"""Base classes for users: `Pass` rewrites a Program; `Instrument` observes a pipeline run and changes nothing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mxcompile.calibration.runs.run import Request
from mxcompile.graph.program import Program, Stage
from mxcompile.graph.records import ModelMeasurements, PassRecord, PassResult
from mxcompile.pipeline import text_form
from mxcompile.pipeline.options import check_options
from mxcompile.pipeline.preservation import REQUIRED_DB

FLOATING = frozenset({Stage.FLOAT, Stage.ROUNDED})


class Pass(ABC):
    """One rewrite of a Program. Subclasses are frozen dataclasses: their fields are the pass's options.

    A field's type says what it takes: `alpha: Annotated[float, Range(0, 1)] = 0.5`. A format may be given by name.

    name: kebab-case, as written in a pipeline.
    accepts: the stages of a Program in which the pass may run; checked when a pipeline is built.
    gives: the stage of the Program after the pass, None if unchanged.
    preserves_function: True if the Program computes the same as before, up to float rounding; checked after the pass.
    """

    name: ClassVar[str]
    accepts: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT})
    gives: ClassVar[Stage | None] = None
    preserves_function: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options (`options.py`); a pass with a `__post_init__` of its own calls this one first.

        Raises PipelineError.
        """
        check_options(self.name, self)

    @property
    def reads_calibration(self) -> bool:
        """Whether the result can depend on calibration data; override it where it cannot."""
        return True

    def required_db(self, program: Program) -> float:
        """For a pass that preserves the function: the least SQNR in dB between outputs before and after it."""
        del program
        return REQUIRED_DB

    def requests(self, program: Program) -> Sequence[Request]:
        """Statistics that `run` reads from `program.statistics`; the pipeline gathers them before `run`."""
        del program
        return ()

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Rewrite the Program in place. Its graph must be valid afterwards, and a second run must change nothing."""

    def __str__(self) -> str:
        return text_form.print_call(self.name, self)


@dataclass(frozen=True)
class PipelineStep:
    """A pass of a running pipeline. index: its position, from 1. current: the pass. passes: all of the pipeline."""

    index: int
    current: Pass
    passes: tuple[Pass, ...]


class Instrument:
    """Called around each pass; override the methods that you need."""

    def start(self, program: Program, passes: tuple[Pass, ...]) -> None:
        """Called before the first pass. passes: all that will run, in order."""

    def before(self, program: Program, step: PipelineStep) -> None:
        """Called before a pass, and before its statistics are gathered."""

    def segment(self, program: Program, step: PipelineStep, done: int, total: int) -> None:
        """Called before each unit of a pass's work (a segment, batch or matmul). done: finished units, of `total`."""

    def measure(self, program: Program, step: PipelineStep, result: PassResult) -> ModelMeasurements | None:
        """Called after a pass has succeeded, before it is recorded; returns measurements for its record, or None."""

    def after(self, program: Program, step: PipelineStep, record: PassRecord) -> None:
        """Called after a pass, with its record."""

    def failed(self, program: Program, step: PipelineStep, error: Exception) -> None:
        """Called if a pass raised or left an invalid program, which may be half rewritten. The error names the pass."""

    def finish(self, program: Program) -> None:
        """Called after the last pass."""

    def close(self) -> None:
        """Called at the end of a run, also of one that failed or was interrupted."""
