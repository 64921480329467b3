"""Search and fold factors group by group, while calibration data move through the model segment by segment.

A fold leaves the function as it was, and no value that it divides is carried from one segment to the next, so what
later segments see does not change: one run over the data is enough.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.groups import ScaleGroup, fold, half_precision_factors
from mxcompile.analysis.folds.multiplier import multiply
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import find_segments
from mxcompile.calibration.factor_search import FactorSearchResult, Objective, output_error, search_factors
from mxcompile.calibration.group_facts import GroupFacts, first_batches
from mxcompile.calibration.observers import ChannelImportance, Observer, TokenSample
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.sweep import Sweep
from mxcompile.graph.program import Program
from mxcompile.graph.records import Fold, Miss

_PAYS = 0.9  # an explicit multiply must save this much of the error
_LEFT = "no factors lose less than none"
_NOT_MULTIPLIED = f"an explicit multiply would save less than {1 - _PAYS:.0%} of the error"
MatmulStatistic = Callable[[Matmul], Tensor]


@dataclass(frozen=True)
class FoldSearch:
    """quantizers: what weights and activations will be rounded to.

    magnitude: what `candidates` wants to know of each input channel. candidates(group, activation, weight): factors to
    try, from functions that give the magnitudes `[in]` and the weight `[..., out, in]` of a matmul.
    objective: OUTPUT scores the outputs of the group's matmuls on a sample of tokens, BLOCK what the enclosing segment
    gives on to the rest of the model, on the first batches.
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
        """Fold the best factors into every group; what is known of input channels goes to `program.importance`.

        unfoldable: groups that an explicit multiply would make (`multiplier.py`); it is inserted where it pays.
        """
        found = FoldSearchResult()
        segments = find_segments(program, matmuls, [group.values for group in groups])
        sweep = Sweep(program, program.batches)
        known: dict[Node, dict[type[Observer], Tensor]] = {}
        waiting = [*groups, *unfoldable]
        for segment in program.through(segments):
            before = first_batches(sweep.states, segment) if self.objective is Objective.BLOCK else []
            observers = {value: self._observers() for value in segment.inputs}
            sweep.advance(segment, observers)
            known |= {node: {type(o): o.value for o in kinds} for node, kinds in observers.items()}
            for matmul in segment.matmuls:
                program.importance[matmul.parameter] = known[matmul.activation][ChannelImportance]
            ready = [group for group in waiting if all(m.activation in known for m, _ in group.matmuls)]
            for group in ready:
                self._fold(program, group, GroupFacts(segment, before, known), found)
                waiting.remove(group)
            still = {matmul.activation for group in waiting for matmul, _ in group.matmuls}
            known = {node: statistics for node, statistics in known.items() if node in still}
        for group, factors in found.multiplied:
            names = frozenset(node.name for node in group.nodes)
            found.folds.append(Fold(f"{group} (multiplied)", partial(multiply, names=names, factors=factors)))
            found.folds[-1].apply(program)
        return found

    def _observers(self) -> list[Observer]:
        return [self.magnitude(), TokenSample(), ChannelImportance()]

    def _fold(self, program: Program, group: ScaleGroup, facts: GroupFacts, found: "FoldSearchResult") -> None:
        weights = {m.node: finite_rows(program, m).float() for m, _ in group.matmuls}
        tried = self.candidates(group, lambda m: facts.known[m.activation][self.magnitude], lambda m: weights[m.node])
        rounded = (half_precision_factors(group, factors, self.power_of_two) for factors in tried)
        if facts.before and facts.encloses(group):
            error = facts.block_error(program, group, self.quantizers)
        else:
            error = output_error(facts.operands(group, weights), self.quantizers)
            if self.objective is Objective.BLOCK:
                found.misses.append(Miss(str(group), "scored on its outputs: it reaches beyond one segment"))
        found.add(program, group, search_factors(rounded, error, group.count))


@dataclass(frozen=True)
class FoldSearchResult:
    """folds: those applied. multiplied: groups with an explicit multiply, and their factors. numbers: error of each
    group's factors over that of none. misses: groups left alone.
    """

    folds: list[Fold] = field(default_factory=list[Fold])
    multiplied: list[tuple[ScaleGroup, Tensor]] = field(default_factory=list[tuple[ScaleGroup, Tensor]])
    misses: list[Miss] = field(default_factory=list[Miss])
    numbers: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])

    def add(self, program: Program, group: ScaleGroup, best: FactorSearchResult) -> None:
        """Fold the factors found if they lose less than none, or note them for an explicit multiply if that pays."""
        self.numbers[str(group)] = {"error_over_rtn": best.error / max(best.error_before, 1e-30)}
        if not group.absorbers and best.error < _PAYS * best.error_before:
            self.multiplied.append((group, best.factors))
        elif group.absorbers and best.error < best.error_before:
            self.folds.append(Fold(str(group), partial(fold, group=group, factors=best.factors)))
            self.folds[-1].apply(program)
        else:
            self.misses.append(Miss(str(group), _LEFT if group.absorbers else _NOT_MULTIPLIED))
