"""The files of a dump folder, for reading.

    pipeline.txt  00-trace.txt  NN-<pass>.txt  NN-<pass>.diff  NN-<pass>.FAILED.txt
    summary.txt   ledger.json   distributions.json  index.html  kernels.txt

The ledger says how far the run came: files of later passes are those of an earlier run in the same folder.
"""

from dataclasses import dataclass
from pathlib import Path

from mxcompile.diagnostics.distributions import Distributions
from mxcompile.diagnostics.ledger import Ledger
from mxcompile.errors import DumpError, UnknownNameError
from mxcompile.graph.printer import diff_text

PIPELINE, SUMMARY, PAGE, KERNELS = "pipeline.txt", "summary.txt", "index.html", "kernels.txt"
FIRST_LINE = "# mxcompile pipeline"
_REST = "# still to run: "
_GRAPH = "# the graph before it:"


@dataclass(frozen=True)
class Failure:
    """A pass that failed. index: its place from 1. message: its error, which names it. rest: what was still to run."""

    index: int
    message: str
    rest: str

    def to_text(self, graph: str) -> str:
        """The file of a failure: what happened, and the graph that the pass was given."""
        return f"# {self.message}\n{_REST}{self.rest}\n{_GRAPH}\n{graph}"


@dataclass(frozen=True)
class DumpReader:
    """A dump folder, for reading."""

    folder: Path

    def __post_init__(self) -> None:
        if not self.folder.is_dir() or not is_ours(self.folder):
            raise DumpError(f"{self.folder} is not an mxcompile dump folder: it has no {PIPELINE} of ours")

    def pipeline(self) -> list[str]:
        """The passes that were to run."""
        lines = (self.folder / PIPELINE).read_text(encoding="utf-8").splitlines()[1:]
        return [line.removeprefix("| ") for line in lines]

    def stages(self) -> list[str]:
        """Names of the graphs in order: 00-trace, 01-round-weights, ..., as far as the run came."""
        return ["00-trace", *(stem(i, record.name) for i, record in enumerate(self.ledger().passes, start=1))]

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

    def distributions(self) -> Distributions:
        """How the values of each layer are distributed."""
        return Distributions.load(self.folder)

    def failure(self) -> Failure | None:
        """The pass that failed, if one did."""
        index = len(self.stages())
        for path in self.folder.glob(f"{index:02}-*.FAILED.txt"):
            message, _, rest = path.read_text(encoding="utf-8").partition(f"\n{_REST}")
            return Failure(index, message.removeprefix("# "), rest.partition(f"\n{_GRAPH}\n")[0])
        return None


def stem(index: int, name: str) -> str:
    """How the files of a pass at its place (from 1) begin."""
    return f"{index:02}-{name}"


def is_ours(folder: Path) -> bool:
    """True for an empty folder and for one that a dump has written."""
    if not folder.is_dir():
        return False
    marker = folder / PIPELINE
    if marker.is_file():
        return marker.read_text(encoding="utf-8", errors="replace").startswith(FIRST_LINE)
    return not any(folder.iterdir())
