"""Which pass, and which layers, are to blame for what quantizing has cost, and what would mend it.

Every pass's program is scored; the first that crosses the threshold is the pass to blame. Then the program before it is
run with its changes (`calibration/hybrid.py`): each alone, which gives its contribution; then all but the k largest, k
found by halving; then each of those k is given back if the threshold holds without it. That is at most 2 L + log2 L + 2
forwards of the probe for L changes. What is left gets 8 bits, or is left in float, in a run of the whole pipeline, to
see whether that mends it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from mxcompile.analysis.layers import Layer, find_layers
from mxcompile.calibration.hybrid_run import HybridRun, ProgramChange, find_changes
from mxcompile.calibration.run import Runner
from mxcompile.diagnostics.program_scores import Divergence, Perplexity, Score
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
class Fix:
    """The layers' names, a format to give them (None: float, by `exclude`), and the score of the whole pipeline with
    that; mends: it is within the threshold.
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
    """metric: KL or perplexity, the smaller the better. scores: of the float model, and after each pass.

    culprit: the first pass that crosses the threshold, by its place in the pipeline from 1; None if none does.
    contributions: by how much each of its changes alone raises the score. guilty: the smallest set found without which
    the score stays within the threshold; none if the pass does more than change layers and tensors, or is a fold.
    restored: the score without them. forwards: of the probe that all this took.
    """

    metric: str
    threshold: float
    pipeline: Pipeline
    scores: tuple[float, ...]
    culprit: int | None = None
    contributions: dict[str, float] | None = None
    guilty: tuple[str, ...] = ()
    restored: float | None = None
    fix: Fix | None = None
    forwards: int = 0

    @property
    def culprit_pass(self) -> Pass | None:
        """The pass to blame."""
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
        for place, (name, score) in enumerate(zip(names, self.scores, strict=True)):
            blame = f"the first above {self.threshold:g}" if place == self.culprit else ""
            rows.append(_row(name, blame, f"{score:.4f}"))
        return table(("pass", ""), (self.metric,), rows, "passes")

    def to_layer_table(self, count: int = _LISTED) -> Table:
        """What contributes most, and every guilty one."""
        found = self.contributions or {}
        order = sorted(found, key=lambda name: -found[name])
        rows = [
            _row(name, "to blame" if name in self.guilty else "", f"{found[name]:+.4f}")
            for place, name in enumerate(order)
            if name in self.guilty or place < count
        ]
        return table(("layer", ""), (f"{self.metric} alone adds",), rows, f"changes of {self.culprit_pass}")

    def print_to(self, console: Console) -> None:
        """The tables, and what follows from them."""
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
            yield f"{self.culprit_pass} cannot be split: it folds, or does more than change layers and tensors"
        elif self.restored is not None:
            yield f"without these {len(self.guilty)} of {len(self.contributions or {})}: {self.restored:.4f}"
        if self.fix is not None:
            verdict = "mends it" if self.fix.mends else "is not enough, passes behind it cost the rest"
            yield f"{self.fix} {verdict}: {self.metric} {self.fix.score:.4f}"
        yield f"{self.forwards} forwards of the probe"


def _row(name: str, blame: str, number: str) -> tuple[Text, Text, Text]:
    style = "bold red" if blame else ""
    return Text(name, style), Text(blame, style), Text(number, style)


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
    """Find the pass, then the smallest set of layers, that bring a model over a threshold.

    kl, perplexity: the threshold, one of the two: mean KL(float || quantized) in nats a position, or perplexity.
    probe: a batch or batches to measure on, as the example inputs (which it is if None). report: told what is done,
    how many of its steps, and of how many. Others: as in `quantize_and_compile`.
    """
    if (kl is None) == (perplexity is None):
        raise InputError("give one threshold: kl=... or perplexity=...")
    pipeline = as_pipeline(recipe)
    program = trace(model, example_inputs, include=include, exclude=exclude, allow_partial=allow_partial)
    batches = list(as_batches(example_inputs if probe is None else probe))
    calibration = None if calibration is None else list(as_batches(calibration))
    threshold = kl if kl is not None else perplexity
    assert threshold is not None
    score = Divergence.of(program, batches) if kl is not None else Perplexity(batches)
    return _Search(score, threshold, pipeline, calibration, instruments, report).run(program)


class _Snapshots(Instrument):
    """Keeps the program as it is before the first and after every pass; tensors are shared."""

    def __init__(self) -> None:
        self.programs: list[Program] = []

    def start(self, program: Program, pipeline: Pipeline) -> None:
        """Keep what the pipeline is given."""
        self.programs = [program.copy()]

    def after(self, program: Program, step: PipelineStep, record: PassRecord) -> None:
        """Keep what a pass has left."""
        self.programs.append(program.copy())


@dataclass
class _Search:
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
        scores = tuple(self._score(Runner(each), each) for each in self._through("scoring each pass", programs))
        found = Bisection(self.score.name, self.threshold, self.pipeline, scores)
        if scores[0] > self.threshold:
            raise InputError(f"the float model itself has a {found.metric} of {scores[0]:.4f}: give a higher threshold")
        culprit = next((place for place, value in enumerate(scores) if value > self.threshold), None)
        found = replace(found, culprit=culprit)
        if culprit is not None and not self.pipeline.passes[culprit - 1].preserves_function:
            found = self._layers(found, programs[culprit - 1], programs[culprit])
        if found.guilty and (names := self._patterns(programs[0], found.guilty)):
            found = replace(found, fix=self._fix(program, names, find_layers(programs[-1])))
        return replace(found, forwards=self.forwards)

    def _layers(self, found: Bisection, before: Program, after: Program) -> Bisection:
        """Contributions of a pass's changes and the smallest set without which the threshold holds."""
        changes = find_changes(before, after)
        hybrid = HybridRun(before, after)

        def score(applied: Iterable[ProgramChange]) -> float:
            hybrid.apply(applied)
            return self._score(hybrid, before)

        plain = found.scores[(found.culprit or 1) - 1]
        alone = {c.name: score([c]) - plain for c in self._through("trying each change alone", changes)}
        found = replace(found, contributions=alone)
        if score(changes) <= self.threshold:
            return found
        ordered = sorted(changes, key=lambda change: -alone[change.name])
        guilty = self._pruned(ordered, self._largest(ordered, score), score)
        applied = [change for change in changes if change not in guilty]
        return replace(found, guilty=tuple(change.name for change in guilty), restored=score(applied))

    def _largest(self, ordered: list[ProgramChange], score: Callable[[Iterable[ProgramChange]], float]) -> int:
        """The least number of the first changes without which the threshold holds, by halving."""
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
        """The first changes but for those that need not be undone, tried from the smallest contribution on."""
        guilty = ordered[:count]
        for change in self._through("giving back what need not be undone", ordered[:count][::-1]):
            fewer = [other for other in guilty if other is not change]
            if fewer and score([other for other in ordered if other not in fewer]) <= self.threshold:
                guilty = fewer
        return guilty

    def _fix(self, program: Program, names: tuple[str, ...], layers: Mapping[str, Layer]) -> Fix:
        """Give the layers 8 bits if they have fewer and that is enough, else leave them in float."""
        formats = [parse_format(layer.format) for layer in layers.values() if layer.format is not None]
        small = next((fmt for fmt in formats if fmt.bits < 8), None)
        if small is not None and any(hasattr(current, "overrides") for current in self.pipeline.passes):
            wide = (MXINT8 if small.is_integer else MXFP8_E4M3).with_block(small.block_size)
            fix = self._tried(program, self.pipeline.with_overrides(dict.fromkeys(names, wide)), names, str(wide))
            if fix.mends:
                return fix
        spared = program.copy()
        selection = program.selection
        spared.selection = replace(selection, exclude=(*selection.exclude, *names), allow_partial=True)
        return self._tried(spared, self.pipeline, names, None)

    def _tried(self, program: Program, pipeline: Pipeline, names: tuple[str, ...], fmt: str | None) -> Fix:
        result = pipeline.run(program, self.calibration, self.instruments)
        score = self._score(Runner(result), result)
        return Fix(names, fmt, score, score <= self.threshold)

    def _patterns(self, program: Program, guilty: Iterable[str]) -> tuple[str, ...]:
        """Module paths of the layers, or names of their weights where a module has several."""
        layers = find_layers(program)
        paths = [layer.module_path for layer in layers.values()]
        chosen = [layers[name] for name in guilty if name in layers]
        weights = [layer.name.partition(" (")[0] for layer in chosen]
        pairs = zip(chosen, weights, strict=True)
        return tuple(dict.fromkeys(la.module_path if paths.count(la.module_path) == 1 else w for la, w in pairs))

    def _through(self, what: str, parts: Sequence[T]) -> Iterator[T]:
        for done, part in enumerate(parts):
            if self.report is not None:
                self.report(what, done, len(parts))
            yield part

    def _score(self, runner: Runner, program: Program) -> float:
        self.forwards += 1
        return self.score(runner, program)
