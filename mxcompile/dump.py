"""Dump folder: the graph after every pass, what changed, and what each pass did.

    pipeline.txt  00-trace.txt  NN-<pass>.txt  NN-<pass>.diff  summary.txt  ledger.json

A pass that fails leaves `NN-<pass>.FAILED.txt`: the error, the rest of the pipeline and the graph it was given. Files
are written under a temporary name and then renamed. A folder that holds anything else is refused; nothing is deleted.
"""

import difflib
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

from rich.console import Console

from mxcompile.errors import DumpError, UnknownNameError
from mxcompile.instruments import Instrument, Step
from mxcompile.ledger import FILE, Ledger, PassRecord
from mxcompile.pipeline import Pipeline
from mxcompile.printer import print_program
from mxcompile.program import Program

_PIPELINE = "pipeline.txt"
_SUMMARY = "summary.txt"
_FIRST_LINE = "# mxcompile pipeline"
_WIDTH = 140
_WORST = 12


class Dump(Instrument):
    """Writes a dump folder while a pipeline runs."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._text = ""
        self._ledger = Ledger("", 0, ())
        if self.folder.exists() and not _is_ours(self.folder):
            raise DumpError(
                f"{self.folder} exists and is not an mxcompile dump: give a new folder, or one that a dump wrote before"
            )

    def start(self, program: Program, pipeline: Pipeline) -> None:
        """Write the pipeline and the traced graph."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(_PIPELINE, f"{_FIRST_LINE}\n" + "\n| ".join(map(str, pipeline.passes)) + "\n")
        self._ledger = Ledger(str(pipeline), program.stored_bytes(), ())
        self._text = print_program(program)
        self._write("00-trace.txt", self._text)

    def after(self, program: Program, step: Step, record: PassRecord) -> None:
        """Write the graph after a pass, its diff, and the ledger so far."""
        before, self._text = self._text, print_program(program)
        name = _stem(step)
        self._write(f"{name}.txt", self._text)
        self._write(f"{name}.diff", diff_text(before, self._text, "before", name))
        self._ledger = replace(self._ledger, passes=(*self._ledger.passes, record))
        self._write(FILE, self._ledger.to_json())
        self._write(_SUMMARY, _summary(self._ledger))

    def failed(self, program: Program, step: Step, error: Exception) -> None:
        """Write what the failing pass was given."""
        rest = " | ".join(str(p) for p in step.pipeline.passes[step.index :]) or "nothing"
        what = f"# {step.current} failed: {type(error).__name__}: {error}\n"
        self._write(f"{_stem(step)}.FAILED.txt", f"{what}# still to run: {rest}\n# the graph before it:\n{self._text}")

    def _write(self, name: str, text: str) -> None:
        temporary = self.folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.folder / name)


@dataclass(frozen=True)
class DumpReader:
    """A dump folder, for reading."""

    folder: Path

    def __post_init__(self) -> None:
        if not self.folder.is_dir() or not _is_ours(self.folder):
            raise DumpError(f"{self.folder} is not an mxcompile dump folder: it has no {_PIPELINE} of ours")

    def stages(self) -> list[str]:
        """Names of the graphs in order: 00-trace, 01-round-weights, ..., as the pipeline says."""
        lines = (self.folder / _PIPELINE).read_text(encoding="utf-8").splitlines()[1:]
        names = [line.removeprefix("| ").partition("{")[0].strip() for line in lines]
        stems = ["00-trace", *(f"{i:02}-{name}" for i, name in enumerate(names, start=1))]
        return [stem for stem in stems if (self.folder / f"{stem}.txt").exists()]

    def stage(self, wanted: str) -> str:
        """A stage by its whole name, its number, or its pass's name (the last of that name)."""
        stages = self.stages()
        fits = [s for s in stages if wanted == s or s.partition("-")[2] == wanted]
        fits = fits or [s for s in stages if wanted.isdigit() and int(wanted) == int(s.partition("-")[0])]
        if not fits:
            raise UnknownNameError("pass of the dump", wanted, stages)
        return fits[-1]

    def text(self, wanted: str) -> str:
        """The graph after a pass."""
        return (self.folder / f"{self.stage(wanted)}.txt").read_text(encoding="utf-8")

    def diff(self, first: str, second: str) -> str:
        """Unified diff between the graphs after two passes."""
        return diff_text(self.text(first), self.text(second), self.stage(first), self.stage(second))

    def ledger(self) -> Ledger:
        """What each pass did, in numbers."""
        return Ledger.load(self.folder)

    def summary(self) -> str:
        """The summary; empty if no pass has finished."""
        path = self.folder / _SUMMARY
        return path.read_text(encoding="utf-8") if path.exists() else ""


def diff_text(before: str, after: str, before_name: str, after_name: str) -> str:
    """Unified diff of two graph texts, without file names or times."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), before_name, after_name, lineterm="", n=1)
    return "".join(f"{line}\n" for line in lines)


def _summary(ledger: Ledger) -> str:
    rendered = StringIO()
    console = Console(width=_WIDTH, file=rendered)
    console.print(ledger.to_table())
    if ledger.layers():
        console.print(ledger.to_layer_table(worst=_WORST))
    reasons: dict[str, list[str]] = {}
    for record in ledger.passes:
        for miss in record.misses:
            reasons.setdefault(str(miss), []).append(record.name)
    text = rendered.getvalue()
    if reasons:
        text += "\nmisses\n" + "".join(f"  {miss} ({', '.join(names)})\n" for miss, names in reasons.items())
    return text


def _stem(step: Step) -> str:
    return f"{step.index:02}-{step.current.name}"


def _is_ours(folder: Path) -> bool:
    """True for an empty folder and for one that a dump has written."""
    if not folder.is_dir():
        return False
    marker = folder / _PIPELINE
    if marker.is_file():
        return marker.read_text(encoding="utf-8", errors="replace").startswith(_FIRST_LINE)
    return not any(folder.iterdir())
