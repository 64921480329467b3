"""Find the pass and the layers that push a quantized model over an error threshold, and suggest a fix.

The program after every pass is scored; the first that crosses the threshold is the culprit. Its changes are then
applied to the program before it (`hybrid_run.py`): each alone, for its contribution; then all but the k largest, with k
found by binary search; then each of those k is applied again if the threshold still holds with it. L changes take at
most 2 L + log2 L + 2 forwards of the probe. The changes that stay out are the guilty layers. The whole pipeline is run
again with 8 bits for them, or with them in float, to check that this fixes the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from mxcompile.analysis.layers import Layer, find_layers
from mxcompile.arguments import checked
from mxcompile.calibration.runs.hybrid_run import HybridRun, ProgramChange, find_changes
from mxcompile.calibration.runs.run import Runner
from mxcompile.diagnostics.program_scores import KLDivergence, Perplexity, Score
from mxcompile.diagnostics.tables import table
from mxcompile.errors import InputError
from mxcompile.formats import MXFP8_E4M3, MXINT8, parse_format
from mxcompile.graph.inputs import as_batches
from mxcompile.graph.program import Program
from mxcompile.graph.records import PassRecord
from mxcompile.graph.trace import trace
from mxcompile.passes.recipes import as_pipeline
from mxcompile.pipeline.interfaces import Instrument, Pass, PipelineStep
from mxcompile.pipeline.pipeline import Pipeline

T = TypeVar("T")
_LISTED = 12
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SuggestedFix:
    """A setting for the guilty layers, tried on the whole pipeline.

    names: name patterns of the layers. format: for their weights; None keeps them in float, by `exclude`.
    score: of the whole pipeline with that setting. mends: whether the score is within the threshold.
    """

    names: tuple[str, ...]
    format: str | None
    score: float
    mends: bool

    def __str__(self) -> str:
        if self.format is None:
            return f"exclude={list(self.names)}"
        return f"overrides={{{', '.join(f'{name!r}: {self.format.upper()}' for name in self.names)}}}"


@dataclass(frozen=True)
class Bisection:
    """The result of `bisect`.

    metric: KL or perplexity; smaller is better. scores: of the float model, then after each pass.
    culprit: the first pass that crosses the threshold, as its position in the pipeline from 1; None if none does.
    contributions: how much each of its changes alone raises the score.
    guilty: the smallest set of changes found without which the score is within the threshold; empty if the pass is a
        fold or does more than change layers and tensors.
    restored: the score without the guilty changes. forwards: how often the probe was run.
    """

    metric: str
    threshold: float
    pipeline: Pipeline
    scores: tuple[float, ...]
    culprit: int | None = None
    contributions: dict[str, float] | None = None
    guilty: tuple[str, ...] = ()
    restored: float | None = None
    fix: SuggestedFix | None = None
    forwards: int = 0

    @property
    def culprit_pass(self) -> Pass | None:
        """The pass that first crosses the threshold."""
        return None if self.culprit is None else self.pipeline.passes[self.culprit - 1]

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        passes = ["float", *map(str, self.pipeline.passes)]
        fix = None if self.fix is None else asdict(self.fix)
        return {
            "metric": self.metric,
            "threshold": self.threshold,
            "scores": [{"pass": name, "score": score} for name, score in zip(passes, self.scores, strict=True)],
            "culprit": None if self.culprit is None else passes[self.culprit],
            "contributions": self.contributions,
            "guilty": list(self.guilty),
            "restored": self.restored,
            "fix": fix,
            "forwards": self.forwards,
        }

    def to_table(self) -> Table:
        """The score after each pass."""
        names = ["float", *map(str, self.pipeline.passes)]
        rows: list[tuple[Text, Text, Text]] = []
        for index, (name, score) in enumerate(zip(names, self.scores, strict=True)):
            blame = f"first above {self.threshold:g}" if index == self.culprit else ""
            rows.append(_row(name, blame, f"{score:.4f}"))
        return table(("pass", ""), (self.metric,), rows, "passes")

    def to_layer_table(self, count: int = _LISTED) -> Table:
        """The changes that contribute most, and all guilty ones."""
        contributions = self.contributions or {}
        order = sorted(contributions, key=lambda name: -contributions[name])
        rows = [
            _row(name, "to blame" if name in self.guilty else "", f"{contributions[name]:+.4f}")
            for index, name in enumerate(order)
            if name in self.guilty or index < count
        ]
        return table(("layer", ""), (f"{self.metric} added alone",), rows, f"changes of {self.culprit_pass}")

    def print_to(self, console: Console) -> None:
        """Print the tables and the conclusions."""
        console.print(self.to_table())
        if self.contributions:
            console.print(self.to_layer_table())
        for line in self._conclusions():
            console.print(line, markup=False)

    def _conclusions(self) -> Iterable[str]:
        if self.culprit is None:
            yield f"{self.metric} stays within {self.threshold:g} after every pass"
            return
        if not self.guilty:
            yield f"{self.culprit_pass} cannot be bisected: it is a fold, or does more than change layers and tensors"
        elif self.restored is not None:
            changes = f"{len(self.guilty)} of {len(self.contributions or {})} changes"
            yield f"{self.metric} without these {changes}: {self.restored:.4f}"
        if self.fix is not None:
            verdict = "fixes it" if self.fix.mends else "is not enough: later passes add the rest"
            yield f"{self.fix} {verdict}: {self.metric} {self.fix.score:.4f}"
        yield f"{self.forwards} forwards of the probe"


def _row(name: str, blame: str, number: str) -> tuple[Text, Text, Text]:
    style = "bold red" if blame else ""
    return Text(name, style), Text(blame, style), Text(number, style)


@checked
def bisect(
    model: nn.Module,
    example_inputs: object,
    *,
    recipe: str | Pipeline,
    kl: float | None = None,
    perplexity: float | None = None,
    probe: object = None,
    calibration: object = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    allow_partial: bool = False,
    instruments: Sequence[Instrument] = (),
    report: Report | None = None,
) -> Bisection:
    """Find the pass, then the smallest set of layers, that push a model over an error threshold.

    kl, perplexity: the threshold, exactly one of them: mean KL(float || quantized) in nats per position, or perplexity.
    probe: a batch or batches to score on, in the form of the example inputs, which are used if it is None.
    report: called with a title, the steps done and their number. Others: as in `quantize_and_compile`.
    """
    if (kl is None) == (perplexity is None):
        raise InputError("pass one threshold: kl=... or perplexity=...")
    pipeline = as_pipeline(recipe)
    program = trace(model, example_inputs, include=include, exclude=exclude, allow_partial=allow_partial)
    batches = list(as_batches(example_inputs if probe is None else probe))
    calibration = None if calibration is None else list(as_batches(calibration))
    threshold = kl if kl is not None else perplexity
    assert threshold is not None
    score = KLDivergence.of(program, batches) if kl is not None else Perplexity(batches)
    return _BisectRun(score, threshold, pipeline, calibration, instruments, report).run(program)


class _Snapshots(Instrument):
    """Keeps a copy of the program before the first pass and after every pass; the copies share tensors."""

    def __init__(self) -> None:
        self.programs: list[Program] = []

    def start(self, program: Program, passes: tuple[Pass, ...]) -> None:
        """Keep the float program."""
        self.programs = [program.copy()]

    def after(self, program: Program, step: PipelineStep, record: PassRecord) -> None:
        """Keep the program after a pass."""
        self.programs.append(program.copy())


@dataclass
class _BisectRun:
    score: Score
    threshold: float
    pipeline: Pipeline
    calibration: object
    instruments: Sequence[Instrument]
    report: Report | None = None
    forwards: int = 0

    def run(self, program: Program) -> Bisection:
        snapshots = _Snapshots()
        self.pipeline.run(program, self.calibration, [*self.instruments, snapshots])
        programs = snapshots.programs
        scores = tuple(self._score(Runner(each), each) for each in self._progress("scoring each pass", programs))
        result = Bisection(self.score.name, self.threshold, self.pipeline, scores)
        if scores[0] > self.threshold:
            raise InputError(f"the float model itself has a {result.metric} of {scores[0]:.4f}: use a higher threshold")
        culprit = next((index for index, value in enumerate(scores) if value > self.threshold), None)
        result = replace(result, culprit=culprit)
        if culprit is not None and not self.pipeline.passes[culprit - 1].preserves_function:
            result = self._bisect_pass(result, programs[culprit - 1], programs[culprit])
        if result.guilty and (names := self._layer_patterns(programs[0], result.guilty)):
            result = replace(result, fix=self._fix(program, names, find_layers(programs[-1])))
        return replace(result, forwards=self.forwards)

    def _bisect_pass(self, result: Bisection, before: Program, after: Program) -> Bisection:
        """Add the contributions of a pass's changes, and the smallest set without which the threshold holds."""
        changes = find_changes(before, after)
        hybrid = HybridRun(before, after)

        def score(applied: Iterable[ProgramChange]) -> float:
            hybrid.apply(applied)
            return self._score(hybrid, before)

        previous = result.scores[(result.culprit or 1) - 1]
        alone = {c.name: score([c]) - previous for c in self._progress("trying each change alone", changes)}
        result = replace(result, contributions=alone)
        if score(changes) <= self.threshold:
            return result
        ordered = sorted(changes, key=lambda change: -alone[change.name])
        guilty = self._pruned(ordered, self._count_left_out(ordered, score), score)
        applied = [change for change in changes if change not in guilty]
        return replace(result, guilty=tuple(change.name for change in guilty), restored=score(applied))

    def _count_left_out(self, ordered: list[ProgramChange], score: Callable[[Iterable[ProgramChange]], float]) -> int:
        """How many of the first changes must be left out for the threshold to hold, by binary search."""
        low, high = 1, len(ordered)
        while low < high:
            middle = (low + high) // 2
            if score(ordered[middle:]) <= self.threshold:
                high = middle
            else:
                low = middle + 1
        return high

    def _pruned(
        self, ordered: list[ProgramChange], count: int, score: Callable[[Iterable[ProgramChange]], float]
    ) -> list[ProgramChange]:
        """The first `count` changes without those that can be applied after all, the smallest contribution first."""
        guilty = ordered[:count]
        for change in self._progress("reducing the guilty set", ordered[:count][::-1]):
            fewer = [other for other in guilty if other is not change]
            if fewer and score([other for other in ordered if other not in fewer]) <= self.threshold:
                guilty = fewer
        return guilty

    def _fix(self, program: Program, names: tuple[str, ...], layers: Mapping[str, Layer]) -> SuggestedFix:
        """8 bits for the layers if they have fewer and that is enough, else float."""
        formats = [parse_format(layer.format) for layer in layers.values() if layer.format is not None]
        small = next((fmt for fmt in formats if fmt.bits < 8), None)
        if small is not None and any(hasattr(current, "overrides") for current in self.pipeline.passes):
            wide = (MXINT8 if small.is_integer else MXFP8_E4M3).with_block(small.block_size)
            fix = self._try_fix(program, self.pipeline.with_overrides(dict.fromkeys(names, wide)), names, str(wide))
            if fix.mends:
                return fix
        excluding = program.copy()
        selection = program.selection
        excluding.selection = replace(selection, exclude=(*selection.exclude, *names), allow_partial=True)
        return self._try_fix(excluding, self.pipeline, names, None)

    def _try_fix(self, program: Program, pipeline: Pipeline, names: tuple[str, ...], fmt: str | None) -> SuggestedFix:
        result = pipeline.run(program, self.calibration, self.instruments)
        score = self._score(Runner(result), result)
        return SuggestedFix(names, fmt, score, score <= self.threshold)

    def _layer_patterns(self, program: Program, guilty: Iterable[str]) -> tuple[str, ...]:
        """Module paths of the guilty layers, or the names of their weights where a module has several."""
        layers = find_layers(program)
        paths = [layer.module_path for layer in layers.values()]
        chosen = [layers[name] for name in guilty if name in layers]
        weights = [layer.name.partition(" (")[0] for layer in chosen]
        pairs = zip(chosen, weights, strict=True)
        return tuple(dict.fromkeys(la.module_path if paths.count(la.module_path) == 1 else w for la, w in pairs))

    def _progress(self, title: str, parts: Sequence[T]) -> Iterator[T]:
        for done, part in enumerate(parts):
            if self.report is not None:
                self.report(title, done, len(parts))
            yield part

    def _score(self, runner: Runner, program: Program) -> float:
        self.forwards += 1
        return self.score(runner, program)
