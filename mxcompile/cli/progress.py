"""Progress on a terminal: a bar with the time left for all that takes a while, or the time it has taken so far.

Where output is no terminal nothing moves: only what a pass did is printed, a line each.
"""

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import TextIOBase
from types import TracebackType
from typing import Self, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from mxcompile.graph.program import Program
from mxcompile.graph.records import Measured, PassRecord, PassResult
from mxcompile.pipeline.interfaces import Instrument, PipelineStep

T = TypeVar("T")
_WIDTH = 24


class Progress(Instrument):
    """Says which pass runs and how far it is, and afterwards what it did.

    Used in a `with`, it also shows what comes before the first pass and behind the last one.
    """

    def __init__(self, console: Console, first: str = "tracing", last: str = "deploying") -> None:
        self.console = console
        self._first, self._last = first, last
        self._inside = False
        self._bars: Bars | None = None
        self._title = ""

    def __enter__(self) -> Self:
        self._inside = True
        self.report(self._first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False
        self._stop()

    def before(self, program: Program, step: PipelineStep) -> None:
        """Show the pass at work."""
        self.report(_name(step))

    def segment(self, program: Program, step: PipelineStep, done: int, total: int) -> None:
        """Show how far it is."""
        self.report(_name(step), done, total)

    def measure(self, program: Program, step: PipelineStep, result: PassResult) -> Measured | None:
        """Say that its work is done and is being measured."""
        self.report(f"{_name(step)}, measuring")
        return None

    def after(self, program: Program, step: PipelineStep, record: PassRecord) -> None:
        """Say what it did."""
        self._stop()
        misses = f", {len(record.misses)} misses" if record.misses else ""
        kept = "" if record.preserved_db is None else f", outputs kept to {record.preserved_db:.0f} dB"
        self.console.print(f"  {record.name}: {record.rewrites} rewrites{misses}, {record.seconds:.1f} s{kept}")

    def failed(self, program: Program, step: PipelineStep, error: Exception) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def finish(self, program: Program) -> None:
        """Show what comes behind the passes."""
        if self._inside:
            self.report(self._last)

    def report(self, title: str, done: int = 0, total: int | None = None) -> None:
        """Show what is at work, and that it is `done` of `total` parts far."""
        if self._bars is None or self._title != title:
            self._stop()
            self._title = title
            self._bars = bars(self.console)
            self._bars.start()
            self._bars.add_task(title, total=None)
        _tell(self._bars, done, total)

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None


def bars(console: Console) -> Bars:
    """Bars as they all look; gone when they are done, and none at all where there is no terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(_WIDTH), _Count(), _Time())
    return Bars(*columns, console=console, transient=True, disable=not console.is_terminal)


def track(console: Console, items: Sequence[T], title: str) -> Iterator[T]:
    """The items, with a bar for how many have been taken."""
    with bars(console) as shown:
        shown.add_task(title, total=None)
        for done, item in enumerate(items):
            _tell(shown, done, len(items))
            yield item


@contextmanager
def waiting(console: Console, title: str) -> Generator[None]:
    """Show how long something takes that does not say how far it is; bars of other libraries (tqdm) are left out."""
    with bars(console) as shown:
        shown.add_task(title, total=None)
        with redirect_stderr(_WithoutBars(sys.stderr)):
            yield


class _WithoutBars(TextIOBase):
    """A stream that leaves out lines that are written over (they begin with a carriage return)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn = False
        self.rich_proxied_file = getattr(stream, "rich_proxied_file", stream)  # what rich's consoles write to instead

    def write(self, text: str, /) -> int:
        """Pass on what is no bar, nor the end of one."""
        bar, end = text.startswith("\r"), self._drawn and text == "\n"
        self._drawn = bar
        if not (bar or end):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


class _Count(ProgressColumn):
    """`3 of 30`."""

    def render(self, task: Task) -> Text:
        """Nothing where the total is unknown."""
        return Text("" if task.total is None else f"{int(task.completed)} of {int(task.total)}", style="cyan")


class _Time(ProgressColumn):
    """The time left, if the parts to come take as long as those done; until that can be told, the time taken."""

    def render(self, task: Task) -> Text:
        """`1:05 left` or `0:12`."""
        taken = task.elapsed or 0.0
        if task.total is None or not task.completed:
            return Text(_clock(taken), style="dim")
        told = task.fields["told"]  # when the last part was done
        left = told * (task.total - task.completed) / task.completed - (taken - told)
        return Text(f"{_clock(max(left, 0.0))} left", style="dim")


def _tell(shown: Bars, done: int, total: int | None) -> None:
    """Set how far the one task of the bars is."""
    (task,) = shown.tasks
    shown.update(task.id, completed=done, total=total, told=task.elapsed or 0.0)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _name(step: PipelineStep) -> str:
    return f"[{step.index}/{len(step.passes)}] {step.current.name}"
