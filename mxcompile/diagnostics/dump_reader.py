"""Read the files of a dump folder.

    pipeline.txt  00-trace.txt  NN-<pass>.txt  NN-<pass>.diff  NN-<pass>.FAILED.txt
    summary.txt   ledger.json   distributions.json  index.html  kernels.txt

The ledger says which passes finished. Files of later passes are left from an earlier run in the same folder.
"""

from dataclasses import dataclass
from pathlib import Path

from mxcompile.atomic_files import contents
from mxcompile.diagnostics.distributions import Distributions
from mxcompile.diagnostics.ledger import FILE as LEDGER
from mxcompile.diagnostics.ledger import Ledger
from mxcompile.errors import DumpError, UnknownNameError
from mxcompile.graph.printer import diff_text

PIPELINE, SUMMARY, PAGE, KERNELS = "pipeline.txt", "summary.txt", "index.html", "kernels.txt"
FIRST_LINE = "# mxcompile pipeline"
_REST = "# still to run: "
_GRAPH = "# the graph before it:"


@dataclass(frozen=True)
class FailedPass:
    """index: position of the pass, from 1. message: its error, which names it. rest: the passes that did not run."""

    index: int
    message: str
    rest: str

    def to_text(self, graph: str) -> str:
        """The text of a `.FAILED.txt` file. graph: the one before the pass."""
        return f"# {self.message}\n{_REST}{self.rest}\n{_GRAPH}\n{graph}"


@dataclass(frozen=True)
class DumpReader:
    """Reads a dump folder."""

    folder: Path

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            reason = "it is a file" if self.folder.exists() else "it does not exist"
        elif not _starts_dump(self.folder / PIPELINE):
            reason = f"it has no {PIPELINE} that a dump wrote"
        elif not (self.folder / LEDGER).is_file():
            reason = f"its run was stopped before it had written {LEDGER}; dump it again"
        else:
            return
        raise DumpError(f"{self.folder} is not an mxcompile dump folder: {reason}")

    def pipeline(self) -> list[str]:
        """The passes of the pipeline, as text."""
        lines = self._read(PIPELINE).splitlines()[1:]
        return [line.removeprefix("| ") for line in lines]

    def stages(self) -> list[str]:
        """Names of the graphs in order: 00-trace, 01-round-weights, ..., up to the last pass that finished."""
        return ["00-trace", *(stage_name(i, record.name) for i, record in enumerate(self.ledger().passes, start=1))]

    def stage(self, key: str) -> str:
        """A stage by its whole name, its number, or the name of its pass (the last pass of that name)."""
        stages = self.stages()
        matches = [s for s in stages if key == s or s.partition("-")[2] == key]
        matches = matches or [s for s in stages if key.isdigit() and int(key) == int(s.partition("-")[0])]
        if not matches:
            raise UnknownNameError("pass of the dump", key, stages)
        return matches[-1]

    def text(self, key: str) -> str:
        """The graph after a pass."""
        return self._read(f"{self.stage(key)}.txt")

    def diff(self, first: str, second: str) -> str:
        """Unified diff between the graphs after two passes."""
        return diff_text(self.text(first), self.text(second), self.stage(first), self.stage(second))

    def ledger(self) -> Ledger:
        """The ledger of the run."""
        return Ledger.load(self.folder)

    def distributions(self) -> Distributions:
        """The histograms of each layer."""
        finished = len(self.ledger().passes)  # which is written last
        return Distributions(Distributions.load(self.folder).passes[:finished])

    def failure(self) -> FailedPass | None:
        """The pass that failed, if one did."""
        index = len(self.stages())
        for path in self.folder.glob(f"{index:02}-*.FAILED.txt"):
            message, _, rest = self._read(path.name).partition(f"\n{_REST}")
            return FailedPass(index, message.removeprefix("# "), rest.partition(f"\n{_GRAPH}\n")[0])
        return None

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DumpError(f"{self.folder / name} cannot be read ({error}): dump it again") from error


def stage_name(index: int, name: str) -> str:
    """The file name, without its ending, of a pass at a position from 1."""
    return f"{index:02}-{name}"


def may_hold_dump(folder: Path) -> bool:
    """True for an empty folder and for one that a dump wrote."""
    if not folder.is_dir():
        return False
    return _starts_dump(folder / PIPELINE) or not contents(folder)


def _starts_dump(marker: Path) -> bool:
    return marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").startswith(FIRST_LINE)
