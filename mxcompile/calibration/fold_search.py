"""Search factors and fold them, group by group, while calibration batches run through the model segment by segment.

A fold preserves the function, and the values that it divides are never carried from one segment to the next. So a fold
does not change the inputs of later segments, and one run over the data is enough.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.groups import ScaleGroup, fold, representable_factors
from mxcompile.analysis.folds.multiplier import fold_into_multiplier
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import find_segments
from mxcompile.calibration.factor_search import FactorSearchResult, Objective, output_error, search_factors
from mxcompile.calibration.group_facts import GroupFacts, first_batches
from mxcompile.calibration.observers import ChannelImportance, Observer, TokenSample, values_of
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.run import NO_TOKENS
from mxcompile.calibration.sweep import Sweep
from mxcompile.graph.program import Program
from mxcompile.graph.records import Fold, Miss

_MULTIPLY_RATIO = 0.9  # an explicit multiply costs run time: the error with it must be below this share of that without
_NO_GAIN = "no candidate factors reduce the error"
_MULTIPLY_NOT_WORTH = f"an explicit multiply would save less than {1 - _MULTIPLY_RATIO:.0%} of the error"
_NOT_IN_ONE_SEGMENT = "error measured on the group's own outputs: its matmuls are in more than one segment"
_NOT_COMPARABLE = "error measured on the group's own outputs: its segment has no float output with rows in order"
MatmulStatistic = Callable[[Matmul], Tensor]


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
        statistics: dict[Node, dict[type[Observer], Tensor]] = {}
        passed: set[Node] = set()
        waiting = [*groups, *unfoldable]
        for segment in program.track(segments):
            block_inputs = (
                first_batches(map(sweep.ready, sweep.batches), segment) if self.objective is Objective.BLOCK else []
            )
            observers = {value: self._observers() for value in segment.inputs}
            sweep.advance(segment, observers)
            passed.update(segment.inputs)
            for node, kinds in observers.items():
                if values := values_of(kinds):
                    statistics[node] = dict(zip(map(type, kinds), values, strict=True))
            for matmul in segment.matmuls:
                if matmul.activation in statistics:
                    program.importance[matmul.parameter] = statistics[matmul.activation][ChannelImportance]
            ready = [group for group in waiting if all(m.activation in passed for m, _ in group.matmuls)]
            for group in ready:
                self._fold(program, group, GroupFacts(segment, block_inputs, statistics), result)
                waiting.remove(group)
            still_needed = {matmul.activation for group in waiting for matmul, _ in group.matmuls}
            statistics = {node: values for node, values in statistics.items() if node in still_needed}
        for group, factors in result.multiplied:
            names = frozenset(node.name for node in group.nodes)
            apply = partial(fold_into_multiplier, names=names, factors=factors)
            result.folds.append(Fold(f"{group} (multiplied)", apply))
            apply(program)
        return result

    def _observers(self) -> list[Observer]:
        return [self.magnitude(), TokenSample(), ChannelImportance()]

    def _fold(self, program: Program, group: ScaleGroup, facts: GroupFacts, result: "FoldSearchResult") -> None:
        weights = {m.node: finite_rows(program, m) for m, _ in group.matmuls}
        seen = group.restricted(lambda m: m.activation in facts.statistics)
        if not seen.matmuls:
            result.misses.append(Miss(str(group), NO_TOKENS))
            return
        magnitudes = {m.node: facts.statistics[m.activation][self.magnitude] for m, _ in seen.matmuls}
        candidates = self.candidates(seen, lambda m: magnitudes[m.node], lambda m: weights[m.node])
        rounded = (representable_factors(group, factors, self.power_of_two) for factors in candidates)
        enclosed = bool(facts.block_inputs) and facts.encloses(group)
        error = facts.block_error(program, seen, self.quantizers) if enclosed else None
        if error is None:
            error = output_error(facts.operands(seen, weights), self.quantizers)
            if self.objective is Objective.BLOCK:
                reason = _NOT_COMPARABLE if enclosed else _NOT_IN_ONE_SEGMENT
                result.misses.append(Miss(str(group), reason))
        result.add(program, group, search_factors(rounded, error, group.count))


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
