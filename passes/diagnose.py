"""linear(x, w) -> the same: measure what makes x and the output hard to quantize, and what each step would save.

For the input and the output of every matmul: the profile of their energy over channels, blocks and tokens
(`value_profile.py`). For the input and the weights that it is multiplied with: the SQNR of the outputs in the planned
formats, and the dB that a fold, sorted channels, a rotation and 8-bit elements would save (`remedies.py`). The numbers
go to the ledger and the report page; `mxcompile diagnose` prints them with a recommendation (Nrusimha et al., arXiv
2404.03605, for kurtosis and outlier channels).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import ScaleGroup, find_groups
from mxcompile.analysis.folds.order_region import moved
from mxcompile.analysis.folds.orders import find_orders
from mxcompile.analysis.folds.rotation import rotation_of
from mxcompile.analysis.layers import find_layers
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.run import NO_TOKENS
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.calibration.searches.group_facts import list_matrices
from mxcompile.calibration.searches.remedies import SampledValue
from mxcompile.calibration.statistics.observers import ChannelImportance, Observer, TokenSample, values_of
from mxcompile.calibration.statistics.value_profile import Profile, ValueProfile
from mxcompile.formats import MXINT4, MXINT8, MXFormat
from mxcompile.graph.dataflow import effective_readers
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Miss, PassResult
from mxcompile.numerics.row_slices import column_wise
from mxcompile.pipeline.interfaces import FLOATING, Pass

_SMALLEST = 1e-12
_Folds = dict[Node, tuple[ScaleGroup, Tensor]]
"""By value: the scale group whose factors divide it alone, and the index of each channel's factor."""


@dataclass(frozen=True)
class Diagnose(Pass):
    """weight, activation: the planned formats (activation none: weight-only)."""

    weight: MXFormat = MXINT4
    activation: MXFormat | None = MXINT8

    name = "diagnose"
    accepts = FLOATING
    preserves_function = True

    def run(self, program: Program) -> PassResult:
        """Observe every value, segment by segment; nothing is changed."""
        matmuls = choose(program).matmuls
        names = {layer.node: name for name, layer in find_layers(program).items()}
        steps = _Steps(_folds(program, matmuls), _orders(program, matmuls))
        sweep = Sweep(program, program.batches)
        numbers: dict[str, dict[str, float]] = {}
        misses: list[Miss] = []
        for segment in program.track(find_segments(program, matmuls)):
            seen = _observe(sweep, segment)
            savings = ranks_of(program).map(
                lambda value, of=segment, seen=seen: self._savings(program, value, of, seen, steps), seen.inputs
            )
            by_value = dict(zip(seen.inputs, savings, strict=True))
            for matmul in segment.matmuls:
                if matmul.activation not in by_value:
                    misses.append(Miss(where(matmul.node), NO_TOKENS))
                    continue
                profile = asdict(seen.profiles[matmul.activation])
                output = asdict(seen.profiles[matmul.node]) if matmul.node in seen.profiles else {}
                numbers[names[matmul.node]] = (
                    {f"input_{key}": number for key, number in profile.items()}
                    | {f"output_{key}": number for key, number in output.items()}
                    | by_value[matmul.activation]
                )
        return PassResult(0, tuple(misses), numbers)

    def _savings(
        self, program: Program, value: Node, segment: Segment, seen: "_Observed", steps: "_Steps"
    ) -> dict[str, float]:
        """SQNR and savings in dB of the matmuls that read a value, by the names of the ledger."""
        readers = segment.readers_of(value)
        weights = list_matrices(finite_rows(program, matmul) for matmul in readers)
        sample, importance = seen.samples[value]
        sampled, quantizers = SampledValue.of(sample, importance, weights), Quantizers(self.weight, self.activation)
        result = {
            "imbalance": sampled.imbalance(),
            "sqnr_db": sampled.db(quantizers),
            "bits_db": sampled.saved_by_bits(quantizers),
        }
        if value in steps.folds:
            result["fold_db"] = sampled.saved_by_fold(quantizers, *steps.folds[value])
        if value in steps.orders:
            result["permute_db"] = sampled.saved_by_order(quantizers, steps.orders[value])
        block = (self.activation or self.weight).block_size
        if _can_rotate(value, readers, block):
            result["rotate_db"] = sampled.saved_by_rotation(quantizers, block)
        return result


@dataclass(frozen=True)
class _Steps:
    """folds: values that can be folded. orders: the order `[in]` in which `permute` would put a value's channels."""

    folds: _Folds
    orders: dict[Node, Tensor]


@dataclass
class _Observed:
    """What was observed in a segment. inputs: the values that a token has reached."""

    inputs: list[Node] = field(default_factory=list[Node])
    profiles: dict[Node, Profile] = field(default_factory=dict[Node, Profile])
    samples: dict[Node, tuple[Tensor, Tensor]] = field(default_factory=dict[Node, tuple[Tensor, Tensor]])


def _observe(sweep: Sweep, segment: Segment) -> _Observed:
    """Advance through a segment."""
    observers: dict[Node, list[Observer]] = {matmul.node: [ValueProfile()] for matmul in segment.matmuls}
    for value in segment.inputs:
        observers[value] = [ValueProfile(), TokenSample(), ChannelImportance()]
    sweep.advance(segment, observers)
    observed = _Observed()
    for node, kinds in observers.items():
        if values := values_of(kinds):
            observed.profiles[node] = Profile.of(values[0])
        if len(values) > 1:
            observed.samples[node] = values[1], values[2]
    observed.inputs = [value for value in segment.inputs if value in observed.samples]
    return observed


def _folds(program: Program, matmuls: Sequence[Matmul]) -> _Folds:
    groups, _ = find_groups(program, matmuls)
    alone = [group for group in groups if len({matmul.activation for matmul, _ in group.matmuls}) == 1]
    return {group.matmuls[0][0].activation: (group, group.matmuls[0][1]) for group in alone}


def _orders(program: Program, matmuls: Sequence[Matmul]) -> dict[Node, Tensor]:
    def energies(matmul: Matmul) -> Tensor:
        columns = column_wise(lambda rows: rows.double().square().sum(0), finite_rows(program, matmul))
        return columns.clamp(min=_SMALLEST * columns.amax().clamp(min=_SMALLEST))

    orders: dict[Node, Tensor] = {}
    for group in find_orders(program, matmuls)[0]:
        source = group.sorted_by(group.mean_log(energies))
        orders |= {matmul.activation: moved(channels, source) for matmul, channels in group.matmuls}
    return orders


def _can_rotate(value: Node, readers: Sequence[Matmul], block: int) -> bool:
    """Whether `rotate` would consider the value."""
    shared = any(effective_readers(matmul.root) - {other.node for other in readers} for matmul in readers)
    return rotation_of(value) is None and readers[0].in_features % block == 0 and not shared
