"""linear(x, w) -> linear(mx::rotate(x), w H): spread an outlier over the block that shares its scale.

A block-diagonal Hadamard rotation, one block for each MX block of channels, of a value and of the weights that read it.
Weights are rotated once, values at run time. Rotations larger than an MX block only spread outliers into blocks that
had none (Shao et al., arXiv 2511.04214; Egiazarian et al., arXiv 2509.23202). A value is rotated if that saves a tenth
of the error of the matmuls that read it, with both quantizers in the loop; mostly so with 4-bit inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.rotation import rotate, rotation_of
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.factor_search import Operand, output_error
from mxcompile.calibration.finished_parts import load_part, save_part
from mxcompile.calibration.group_facts import list_matrices, subsample_tokens
from mxcompile.calibration.observers import ChannelImportance, Observer, RotatedObserver, TokenSample, values_of
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.ranks import ranks_of
from mxcompile.calibration.run import NO_TOKENS
from mxcompile.calibration.sweep import Sweep
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat
from mxcompile.graph.dataflow import effective_readers
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Fold, Miss, PassResult
from mxcompile.numerics.hadamard import rotate_input, rotate_weight
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.preservation import REQUIRED_DB, REQUIRED_DB_HALF

_ROTATED_RATIO = 0.9  # a rotation costs run time: the error with it must be below this share of that without
_NOT_WORTH = f"a rotation would save less than {1 - _ROTATED_RATIO:.0%} of the error"


@dataclass(frozen=True)
class Rotate(Pass):
    """weight, activation: the formats that later passes will use (activation none: weight-only).

    block: channels of a rotation, a power of two; none: the block size of the activation, or of the weight.
    """

    weight: MXFormat
    activation: MXFormat | None = None
    block: int | None = None

    name = "rotate"
    preserves_function = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 2 or self.size & (self.size - 1):
            raise PipelineError(f"rotate{{block={self.size}}}: the block must be a power of two, 2 or more")

    @property
    def size(self) -> int:
        """The number of channels of a rotation."""
        return (self.activation or self.weight).block_size if self.block is None else self.block

    def required_db(self, program: Program) -> float:
        """Less for half-precision weights: a rotated weight is rounded to half precision again."""
        dtypes = {program.stored(matmul.parameter).dtype for matmul in choose(program).matmuls}
        return REQUIRED_DB_HALF if any(dtype.itemsize < 4 for dtype in dtypes) else REQUIRED_DB

    def run(self, program: Program) -> PassResult:
        """Measure every value, segment by segment; rotate at the end, because no measurement depends on rotations."""
        sweep = Sweep(program, program.batches)
        folds: list[Fold] = []
        misses: list[Miss] = []
        numbers: dict[str, dict[str, float]] = {}
        restored: list[Segment] = []
        for index, segment in enumerate(program.track(find_segments(program, choose(program).matmuls))):
            readers = {value: segment.readers_of(value) for value in segment.inputs if rotation_of(value) is None}
            reasons = {value: self._why_not(matmuls) for value, matmuls in readers.items()}
            wanted = [value for value, reason in reasons.items() if reason is None]
            found = _load(program, index, wanted)
            if found is None:
                for earlier in restored:
                    sweep.advance(earlier)
                restored.clear()
                found = self._measure(program, sweep, segment, {value: readers[value] for value in wanted})
                _save(program, index, found)
            else:
                restored.append(segment)
            for value, measured in found.items():
                if measured is None:
                    reasons[value] = NO_TOKENS
                    continue
                ratio, importance = measured
                fold = self._fold(value, readers[value], importance)
                numbers[fold.where] = {"error_over_plain": ratio}
                if ratio < _ROTATED_RATIO:
                    folds.append(fold)
                else:
                    reasons[value] = _NOT_WORTH
            misses += [Miss(where(m.node), r) for value, r in reasons.items() if r for m in readers[value]]
        for fold in folds:
            fold.apply(program)
        return PassResult(len(folds), tuple(misses), numbers, tuple(folds))

    def _measure(
        self, program: Program, sweep: Sweep, segment: Segment, readers: Mapping[Node, Sequence[Matmul]]
    ) -> "_Measured":
        """Advance through a segment, and measure the values that some matmuls read."""
        observed = {value: _ValueObservers(self.size) for value in readers}
        sweep.advance(segment, {value: observers.all for value, observers in observed.items()})
        seen = [value for value, observers in observed.items() if not observers.seen_nothing]
        ratios = ranks_of(program).map(
            lambda value: self._error_over_plain(program, readers[value], observed[value]),
            seen,
            [float(sum(matmul.root.meta["val"].numel() for matmul in readers[value])) for value in seen],
        )
        measured = {v: (ratio, observed[v].rotated.value) for v, ratio in zip(seen, ratios, strict=True)}
        return {value: measured.get(value) for value in observed}

    def _why_not(self, readers: Sequence[Matmul]) -> str | None:
        size = readers[0].in_features
        if size % self.size:
            return f"{size} input channels are not a multiple of the rotation's block of {self.size}"
        if any(effective_readers(matmul.root) - {other.node for other in readers} for matmul in readers):
            return "its weight is also multiplied with other values, which would need the same rotation"
        return None

    def _fold(self, value: Node, readers: Sequence[Matmul], importance: Tensor) -> Fold:
        names = frozenset(matmul.node.name for matmul in readers)
        apply = partial(rotate, names=names, block=self.size, importance=importance)
        return Fold(f"%{value.name} -> {', '.join(m.module_path or m.parameter for m in readers)}", apply)

    def _error_over_plain(self, program: Program, readers: Sequence[Matmul], observers: "_ValueObservers") -> float:
        """Squared error of the matmuls' outputs on a sample of tokens, with the rotation over without."""
        weights = list_matrices(finite_rows(program, matmul) for matmul in readers)
        sample = subsample_tokens(observers.sample.value, weights)
        no_factors = torch.full((sample.shape[-1],), -1, device=weights[0].device)
        plain = Operand(sample, observers.plain.value, weights, no_factors)
        rotated = Operand(
            rotate_input(sample, self.size),
            observers.rotated.value,
            weights,
            no_factors,
            lambda weight: rotate_weight(weight.float(), self.size),
        )
        errors = [
            output_error([operand], Quantizers(self.weight, self.activation))(torch.ones(0, dtype=torch.float32))
            for operand in (plain, rotated)
        ]
        return errors[1] / max(errors[0], 1e-30)


_Measured = dict[Node, tuple[float, Tensor] | None]
"""By value: the error with the rotation over without, and the importance of the rotated value's channels; None if no
token has reached it."""


def _save(program: Program, index: int, found: _Measured) -> None:
    seen = {value.name: measured for value, measured in found.items() if measured is not None}
    tensors = {name: importance for name, (_, importance) in seen.items()}
    save_part(program, f"{index:04}", tensors, [{name: ratio for name, (ratio, _) in seen.items()}])


def _load(program: Program, index: int, values: Sequence[Node]) -> _Measured | None:
    """What an interrupted run has measured; None if it has not come so far."""
    saved = load_part(program, f"{index:04}")
    if saved is None:
        return None
    tensors, (ratios,) = saved
    device = program.device(next(iter(program.parameter_names())))
    return {v: (ratios[v.name], tensors[v.name].to(device)) if v.name in ratios else None for v in values}


class _ValueObservers:
    """Observers of one value: a sample of its tokens, and the importance of its channels without and with rotation."""

    def __init__(self, block: int) -> None:
        self.sample, self.plain, self.rotated = TokenSample(), ChannelImportance(), ChannelImportance()
        self.all: list[Observer] = [self.sample, self.plain, RotatedObserver(self.rotated, block)]

    @property
    def seen_nothing(self) -> bool:
        """True if no token has reached the value."""
        return not values_of(self.all)
