"""Progress bars on a terminal, with the time left or the time elapsed, and the memory in use.

Elsewhere no bar is drawn; each pass prints one line when it is done.
"""

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import TextIOBase
from types import TracebackType
from typing import Self, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from mxcompile.cli.memory_in_use import memory_in_use
from mxcompile.diagnostics.allocation_table import allocation_lines
from mxcompile.graph.program import Program
from mxcompile.graph.records import ModelMeasurements, PassRecord, PassResult
from mxcompile.pipeline.interfaces import Instrument, PipelineStep

T = TypeVar("T")
_WIDTH = 24


class Progress(Instrument):
    """Shows the running pass and its progress, and prints a line for each finished pass.

    In a `with` statement it also shows the work before the first pass and after the last one.
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
        """Show the pass that starts."""
        self.report(_name(step))

    def segment(self, program: Program, step: PipelineStep, done: int, total: int) -> None:
        """Show the progress of the pass."""
        self.report(_name(step), done, total, program.loss)

    def measure(self, program: Program, step: PipelineStep, result: PassResult) -> ModelMeasurements | None:
        """Show that the finished pass is being measured."""
        self.report(f"{_name(step)}, measuring")
        return None

    def after(self, program: Program, step: PipelineStep, record: PassRecord) -> None:
        """Print the line of the finished pass."""
        self._stop()
        misses = f", {_counted(len(record.misses), 'miss', 'es')}" if record.misses else ""
        preserved = "" if record.preserved_db is None else f", outputs preserved to {record.preserved_db:.0f} dB"
        self.console.print(
            f"  {record.name}: {_counted(record.rewrites, 'rewrite')}{misses}, {record.seconds:.1f} s{preserved}"
        )
        for line in () if record.allocation is None else allocation_lines(record.allocation):
            self.console.print(f"    {line}", markup=False)

    def failed(self, program: Program, step: PipelineStep, error: Exception) -> None:
        """Remove the bar."""
        self._stop()

    def finish(self, program: Program) -> None:
        """Show the work after the last pass."""
        if self._inside:
            self.report(self._last)

    def report(self, title: str, done: int = 0, total: int | None = None, loss: float | None = None) -> None:
        """Show the current work and that `done` of `total` steps are finished, and the loss of training."""
        if self._bars is None or self._title != title:
            self._stop()
            self._title = title
            self._bars = bars(self.console)
            self._bars.start()
            self._bars.add_task(title, total=None)
        _update(self._bars, done, total, loss)

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None


def bars(console: Console) -> Bars:
    """The bars of all commands: removed when they are done, and never drawn outside a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(_WIDTH), _Count(), _Time())
    columns = (*columns, _Loss(), _Memory())
    return Bars(*columns, console=console, transient=True, disable=not console.is_terminal)


def track(console: Console, items: Sequence[T], title: str) -> Iterator[T]:
    """Yield the items, with a bar for the number taken."""
    with bars(console) as shown:
        shown.add_task(title, total=None)
        for done, item in enumerate(items):
            _update(shown, done, len(items))
            yield item


@contextmanager
def waiting(console: Console, title: str) -> Generator[Callable[[int, int], None]]:
    """Show the time elapsed of work, or the time left once it reports that `done` of `total` steps are finished.

    Yields the function to report with. Hides progress bars of other libraries (tqdm).
    """
    with bars(console) as shown:
        shown.add_task(title, total=None)
        with redirect_stderr(_ProgressBarFilter(sys.stderr)):
            yield partial(_update, shown)


class _ProgressBarFilter(TextIOBase):
    """A stream without lines that are overwritten (those that begin with a carriage return)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn = False
        self.rich_proxied_file = getattr(stream, "rich_proxied_file", stream)  # where rich's consoles write instead

    def write(self, text: str, /) -> int:
        """Pass on text that is neither a bar nor the end of one."""
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
    """The time left, extrapolated from the finished steps; before the first is finished, the time elapsed."""

    def render(self, task: Task) -> Text:
        """`1:05 left` or `0:12`."""
        taken = task.elapsed or 0.0
        if task.total is None or not task.completed:
            return Text(_clock(taken), style="dim")
        updated = task.fields["updated"]  # when the last step finished
        left = updated * (task.total - task.completed) / task.completed - (taken - updated)
        return Text(f"{_clock(max(left, 0.0))} left", style="dim")


class _Loss(ProgressColumn):
    """`loss 0.123`."""

    def render(self, task: Task) -> Text:
        """Nothing where nothing is trained."""
        loss = task.fields.get("loss")
        return Text("" if loss is None else f"loss {loss:.3g}")


class _Memory(ProgressColumn):
    """The memory in use, read once a second."""

    max_refresh = 1.0

    def render(self, task: Task) -> Text:
        """`1.2 GB`."""
        del task
        return Text(memory_in_use(), style="dim")


def _update(shown: Bars, done: int, total: int | None, loss: float | None = None) -> None:
    """Set the progress of the only task of the bars."""
    (task,) = shown.tasks
    shown.update(task.id, completed=done, total=total, updated=task.elapsed or 0.0, loss=loss)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _counted(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"


def _name(step: PipelineStep) -> str:
    return f"[{step.index}/{len(step.passes)}] {step.current.name}"
