"""Write a dump folder: the graph after every pass, its diff, the ledger, and a report page.

    pipeline.txt  00-trace.txt  NN-<pass>.txt  NN-<pass>.diff
    summary.txt   ledger.json   distributions.json  index.html
    kernels.txt   which kernel runs each layer of the deployed module, and why not a better one

A pass that fails leaves `NN-<pass>.FAILED.txt`: the error, the rest of the pipeline and the graph before it. Files are
written under a temporary name and then renamed. A folder that holds anything else is refused, and so is one that
another run is writing to. Only the ledger, the page and the `.FAILED.txt` files of an earlier run are deleted.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

from rich.console import Console

from mxcompile.atomic_files import atomic_file, check_writable, folder_lock, real_path
from mxcompile.diagnostics.distributions import FILE as _DISTRIBUTIONS
from mxcompile.diagnostics.distributions import Distributions
from mxcompile.diagnostics.dump_reader import (
    FIRST_LINE,
    KERNELS,
    PAGE,
    PIPELINE,
    SUMMARY,
    DumpReader,
    FailedPass,
    may_hold_dump,
    stage_name,
)
from mxcompile.diagnostics.explanation import Explanation
from mxcompile.diagnostics.ledger import FILE as _LEDGER
from mxcompile.diagnostics.ledger import Ledger
from mxcompile.diagnostics.report.page import print_page
from mxcompile.errors import DumpError
from mxcompile.graph.printer import diff_text, print_program
from mxcompile.graph.program import Program
from mxcompile.graph.records import PassRecord
from mxcompile.pipeline.interfaces import Instrument, Pass, PipelineStep

_WIDTH = 140


class Dump(Instrument):
    """Writes a dump folder while a pipeline runs.

    Raises DumpError if the folder holds anything else, cannot be written, or another run is writing to it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._running = ExitStack()
        self._text = ""
        self._ledger = Ledger("", 0, ())
        self._distributions = Distributions()
        with _explained(self.folder):
            if self.folder.exists() and not may_hold_dump(self.folder):
                raise DumpError(
                    f"{self.folder} exists and is not an mxcompile dump: choose a new folder, or one that a dump wrote"
                )
            check_writable(self.folder, is_folder=True)

    def start(self, program: Program, passes: tuple[Pass, ...]) -> None:
        """Write the pipeline, the traced graph, and a ledger without passes."""
        with _explained(self.folder):
            self._running.enter_context(folder_lock(real_path(self.folder), wait=False))
            for old in (self.folder / _LEDGER, self.folder / PAGE, *self.folder.glob("*.FAILED.txt")):
                old.unlink(missing_ok=True)
        self._write(PIPELINE, f"{FIRST_LINE}\n" + "\n| ".join(map(str, passes)) + "\n")
        self._ledger = Ledger(" | ".join(map(str, passes)), program.stored_bytes(), ())
        self._distributions = Distributions()
        self._text = print_program(program)
        self._write("00-trace.txt", self._text)
        self._write_ledger()

    def after(self, program: Program, step: PipelineStep, record: PassRecord) -> None:
        """Write the graph after a pass, its diff, and the ledger so far."""
        before, self._text = self._text, print_program(program)
        name = stage_name(step.index, step.current.name)
        self._write(f"{name}.txt", self._text)
        self._write(f"{name}.diff", diff_text(before, self._text, "before", name))
        histograms = {} if record.measured is None else record.measured.distributions
        self._ledger = replace(self._ledger, passes=(*self._ledger.passes, record))
        self._distributions = Distributions((*self._distributions.passes, histograms))
        self._write_ledger()

    def failed(self, program: Program, step: PipelineStep, error: Exception) -> None:
        """Write the error and the graph before the failed pass."""
        rest = " | ".join(str(p) for p in step.passes[step.index :]) or "nothing"
        failure = FailedPass(step.index, str(error), rest)
        self._write(f"{stage_name(step.index, step.current.name)}.FAILED.txt", failure.to_text(self._text))
        write_page(self.folder)

    def finish(self, program: Program) -> None:
        """Write the report page."""
        write_page(self.folder)

    def close(self) -> None:
        """Let other runs write to the folder."""
        self._running.close()

    def _write_ledger(self) -> None:
        self._write(_DISTRIBUTIONS, self._distributions.to_json())
        self._write(SUMMARY, _summary(self._ledger))
        self._write(_LEDGER, self._ledger.to_json())

    def _write(self, name: str, text: str) -> None:
        _write(self.folder / name, text)


def write_page(folder: Path) -> Path:
    """Write `index.html` of a dump folder from its other files."""
    page = folder / PAGE
    _write(page, print_page(DumpReader(folder)))
    return page


def write_kernels(folder: str | Path, explanation: Explanation) -> None:
    """Write which kernel runs each layer."""
    _write(Path(folder) / KERNELS, _printed(explanation))


def _write(path: Path, text: str) -> None:
    with _explained(path), atomic_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


@contextmanager
def _explained(path: Path) -> Generator[None]:
    """OSErrors as DumpErrors."""
    try:
        yield
    except BlockingIOError as error:
        raise DumpError(f"another run is writing its dump to {path}: give each run a folder of its own") from error
    except OSError as error:
        raise DumpError(f"the dump {path} cannot be written ({error}): make room, or name another folder") from error


def _summary(ledger: Ledger) -> str:
    return _printed(ledger)


def _printed(report: Ledger | Explanation) -> str:
    rendered = StringIO()
    report.print_to(Console(width=_WIDTH, file=rendered, force_terminal=False, soft_wrap=True))
    return "".join(f"{line.rstrip()}\n" for line in rendered.getvalue().splitlines())
