"""Progress on a terminal: one line for the pass at work, with the time it takes."""

from rich.console import Console
from rich.status import Status

from mxcompile.instruments import Instrument, Step
from mxcompile.ledger import PassRecord
from mxcompile.program import Program


class Progress(Instrument):
    """Says which pass runs, and afterwards what it did. Animates only on a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._status: Status | None = None

    def before(self, program: Program, step: Step) -> None:
        """Show the pass at work."""
        self._status = self.console.status(_title(step))
        self._status.start()

    def segment(self, program: Program, step: Step, done: int, total: int) -> None:
        """Show how far it is."""
        if self._status is not None:
            self._status.update(f"{_title(step)}: {done + 1} of {total}")

    def after(self, program: Program, step: Step, record: PassRecord) -> None:
        """Say what it did."""
        self._stop()
        misses = f", {len(record.misses)} misses" if record.misses else ""
        kept = "" if record.preserved_db is None else f", outputs kept to {record.preserved_db:.0f} dB"
        self.console.print(f"  {record.name}: {record.rewrites} rewrites{misses}, {record.seconds:.1f} s{kept}")

    def failed(self, program: Program, step: Step, error: Exception) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def _title(step: Step) -> str:
    return f"[{step.index}/{len(step.pipeline.passes)}] {step.current.name}"
