"""Search factors and fold them, group by group, while calibration batches run through the model segment by segment.

A fold preserves the function, and the values that it divides are never carried from one segment to the next. So a fold
does not change the inputs of later segments, and one run over the data is enough. What is found in a segment is saved
in the resume folder, if there is one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.groups import ScaleGroup, fold, representable_factors
from mxcompile.analysis.folds.multiplier import fold_into_multiplier
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.finished_parts import load_part, save_part
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.run import NO_TOKENS
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.calibration.searches.factor_search import FactorSearchResult, Objective, output_error, search_factors
from mxcompile.calibration.searches.group_facts import GroupFacts, first_batches
from mxcompile.calibration.statistics.observers import ChannelImportance, Observer, TokenSample, values_of
from mxcompile.graph.program import Program
from mxcompile.graph.records import Fold, Miss

_MULTIPLY_RATIO = 0.9  # an explicit multiply costs run time: the error with it must be below this share of that without
_NO_GAIN = "no candidate factors reduce the error"
_MULTIPLY_NOT_WORTH = f"an explicit multiply would save less than {1 - _MULTIPLY_RATIO:.0%} of the error"
_NOT_IN_ONE_SEGMENT = "error measured on the group's own outputs: its matmuls are in more than one segment"
_NOT_COMPARABLE = "error measured on the group's own outputs: its segment has no float output with rows in order"
MatmulStatistic = Callable[[Matmul], Tensor]
Statistics = dict[Node, dict[type[Observer], Tensor]]


@dataclass(frozen=True)
class FoldSearch:
    """quantizers: the rounding of weights and activations that later passes will apply.

    magnitude: the observer of input channels that `candidates` needs. candidates(group, activation, weight): factors to
        try; `activation` returns the observed magnitudes `[in]` of a matmul's input, `weight` its weight
        `[..., out, in]`, in its own dtype.
    objective: OUTPUT measures the error of the outputs of the group's matmuls on a sample of tokens, BLOCK that of the
        outputs of the enclosing segment on the first batches.
    power_of_two: round factors to powers of two.
    """

    quantizers: Quantizers
    magnitude: type[Observer]
    candidates: Callable[[ScaleGroup, MatmulStatistic, MatmulStatistic], Iterator[Tensor]]
    objective: Objective = Objective.OUTPUT
    power_of_two: bool = False

    def run(
        self,
        program: Program,
        matmuls: Sequence[Matmul],
        groups: Sequence[ScaleGroup],
        unfoldable: Sequence[ScaleGroup] = (),
    ) -> "FoldSearchResult":
        """Fold the best factors of every group. Also writes the measured channel importance to `program.importance`.

        unfoldable: groups that need an explicit multiply (`multiplier.py`), which is inserted where it saves enough
        error.
        """
        result = FoldSearchResult()
        segments = find_segments(program, matmuls, [group.values for group in groups])
        sweep = Sweep(program, program.batches)
        statistics: Statistics = {}
        passed: set[Node] = set()
        every = [*groups, *unfoldable]
        waiting = dict(enumerate(every))
        restored: list[tuple[Segment, SegmentFindings]] = []
        for index, segment in enumerate(program.track(segments)):
            passed.update(segment.inputs)
            found = SegmentFindings.load(program, f"{index:04}")
            if found is None:
                for earlier, findings in restored:  # the run that found them had come here with the weights of before
                    statistics |= self._advance(sweep, earlier)
                    findings.apply(program, every, result)
                restored.clear()
                on_blocks, ranks = self.objective is Objective.BLOCK, ranks_of(program)
                block_inputs = first_batches(sweep.batches, segment, sweep.ready, ranks) if on_blocks else []
                statistics |= self._advance(sweep, segment)
                found = SegmentFindings.of_importance(segment, statistics)
                found.apply(program, every, result)
                facts = GroupFacts(segment, block_inputs, statistics)
                for number, group in waiting.items():
                    if all(m.activation in passed for m, _ in group.matmuls):
                        found.groups[number] = self._found(program, group, facts)
                        found.groups[number].apply(program, group, result)
                found.save(program, f"{index:04}")
            else:
                restored.append((segment, found))
            waiting = {number: group for number, group in waiting.items() if number not in found.groups}
            still_needed = {matmul.activation for group in waiting.values() for matmul, _ in group.matmuls}
            statistics = {node: values for node, values in statistics.items() if node in still_needed}
        for _, findings in restored:
            findings.apply(program, every, result)
        for group, factors in result.multiplied:
            names = frozenset(node.name for node in group.nodes)
            apply = partial(fold_into_multiplier, names=names, factors=factors)
            result.folds.append(Fold(f"{group} (multiplied)", apply))
            apply(program)
        return result

    def _observers(self) -> list[Observer]:
        return [self.magnitude(), TokenSample(), ChannelImportance()]

    def _advance(self, sweep: Sweep, segment: Segment) -> Statistics:
        """Run all batches through a segment; returns what was observed on its inputs."""
        observers = {value: self._observers() for value in segment.inputs}
        sweep.advance(segment, observers)
        observed = {node: (kinds, values_of(kinds)) for node, kinds in observers.items()}
        return {
            n: dict(zip(map(type, kinds), values, strict=True)) for n, (kinds, values) in observed.items() if values
        }

    def _found(self, program: Program, group: ScaleGroup, facts: GroupFacts) -> "GroupFindings":
        weights = {m.node: finite_rows(program, m) for m, _ in group.matmuls}
        seen = group.restricted(lambda m: m.activation in facts.statistics)
        if not seen.matmuls:
            return GroupFindings(None, NO_TOKENS)
        magnitudes = {m.node: facts.statistics[m.activation][self.magnitude] for m, _ in seen.matmuls}
        candidates = self.candidates(seen, lambda m: magnitudes[m.node], lambda m: weights[m.node])
        rounded = (representable_factors(group, factors, self.power_of_two) for factors in candidates)
        enclosed = self.objective is Objective.BLOCK and facts.encloses(group)
        error = facts.block_error(program, seen, self.quantizers) if enclosed else None
        remark, of_own_batches = None, error is not None
        if error is None:
            error = output_error(facts.operands(seen, weights), self.quantizers)
            if self.objective is Objective.BLOCK:
                remark = _NOT_COMPARABLE if enclosed else _NOT_IN_ONE_SEGMENT
        best = search_factors(rounded, error, group.count, ranks_of(program), of_own_batches)
        return GroupFindings(best, remark)


@dataclass(frozen=True)
class GroupFindings:
    """What the search found for a group: its best factors, None if none were searched, and a remark."""

    best: FactorSearchResult | None
    remark: str | None

    def apply(self, program: Program, group: ScaleGroup, result: "FoldSearchResult") -> None:
        """Fold the factors if they are worth it, and add what is to be reported."""
        if self.remark is not None:
            result.misses.append(Miss(str(group), self.remark))
        if self.best is not None:
            result.add(program, group, self.best)


@dataclass(frozen=True)
class SegmentFindings:
    """importance: of the inputs of a segment's matmuls, by the name of their weight. groups: by number, those found."""

    importance: dict[str, Tensor]
    groups: dict[int, GroupFindings] = field(default_factory=dict[int, GroupFindings])

    @staticmethod
    def of_importance(segment: Segment, statistics: Statistics) -> "SegmentFindings":
        """Those of a segment in which no group has been searched yet."""
        seen = [matmul for matmul in segment.matmuls if matmul.activation in statistics]
        return SegmentFindings({m.parameter: statistics[m.activation][ChannelImportance] for m in seen})

    def apply(self, program: Program, groups: Sequence[ScaleGroup], result: "FoldSearchResult") -> None:
        """Write them into the program and the result."""
        for name, importance in self.importance.items():
            program.importance[name] = importance.to(program.device(name))
        for number, found in self.groups.items():
            found.apply(program, groups[number], result)

    def save(self, program: Program, part: str) -> None:
        """Save them in the resume folder."""
        tensors = {f"importance.{name}": value.clone() for name, value in self.importance.items()}  # q, k, v share one
        tensors |= {f"factors.{n}": found.best.factors for n, found in self.groups.items() if found.best is not None}
        errors = {n: (f.best.error, f.best.error_before) if f.best else None for n, f in self.groups.items()}
        notes = [{"group": n, "errors": errors[n], "remark": found.remark} for n, found in self.groups.items()]
        save_part(program, part, tensors, notes)

    @staticmethod
    def load(program: Program, part: str) -> "SegmentFindings | None":
        """Those that an interrupted run has saved; None if it has not come so far."""
        saved = load_part(program, part)
        if saved is None:
            return None
        tensors, notes = saved
        groups: dict[int, GroupFindings] = {}
        for note in notes:
            number, errors = int(note["group"]), note["errors"]
            best = None if errors is None else FactorSearchResult(tensors[f"factors.{number}"], *errors)
            groups[number] = GroupFindings(best, note["remark"])
        start = "importance."
        named = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        return SegmentFindings(named, groups)


@dataclass(frozen=True)
class FoldSearchResult:
    """folds: the applied ones. multiplied: groups that get an explicit multiply, and its factors. numbers: for each
    group, the error with the best factors over the error without. misses: groups that were skipped, and remarks.
    """

    folds: list[Fold] = field(default_factory=list[Fold])
    multiplied: list[tuple[ScaleGroup, Tensor]] = field(default_factory=list[tuple[ScaleGroup, Tensor]])
    misses: list[Miss] = field(default_factory=list[Miss])
    numbers: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])

    def add(self, program: Program, group: ScaleGroup, best: FactorSearchResult) -> None:
        """Fold the best factors if they reduce the error; keep those of an explicit multiply if they save enough."""
        self.numbers[str(group)] = {"error_over_rtn": best.error / max(best.error_before, 1e-30)}
        if not group.absorbers and best.error < _MULTIPLY_RATIO * best.error_before:
            self.multiplied.append((group, best.factors))
        elif group.absorbers and best.error < best.error_before:
            self.folds.append(Fold(str(group), partial(fold, group=group, factors=best.factors)))
            self.folds[-1].apply(program)
        else:
            self.misses.append(Miss(str(group), _NO_GAIN if group.absorbers else _MULTIPLY_NOT_WORTH))
