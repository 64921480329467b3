"""linear(x, w) -> linear(mx::rotate(x), w H): spread an outlier over the block that shares its scale.

With `kind=wush`, linear(x, w) -> linear(mx::multiply(x, T), w T^-1), with a matrix T for each block.

A block-diagonal Hadamard rotation, one block for each MX block of channels, of a value and of the weights that read it.
Weights are rotated once, values at run time. Rotations larger than an MX block only spread outliers into blocks that
had none (Shao et al., arXiv 2511.04214; Egiazarian et al., arXiv 2509.23202). A value is rotated if that saves a tenth
of the error of the matmuls that read it, with both quantizers in the loop; mostly so with 4-bit inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.block_transform import transform
from mxcompile.analysis.folds.rotation import is_rotated, rotate
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.finished_parts import load_part, save_part
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.run import NO_TOKENS
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.calibration.searches.factor_search import Operand, output_error
from mxcompile.calibration.searches.group_facts import list_matrices, subsample_tokens
from mxcompile.calibration.statistics.observers import (
    BlockMoments,
    ChannelImportance,
    Observer,
    RotatedObserver,
    TokenSample,
    values_of,
)
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat
from mxcompile.graph.dataflow import effective_readers
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Fold, Miss, PassResult
from mxcompile.numerics.block_transforms import apply_to_blocks, undo_in_weight, whitening_transforms
from mxcompile.numerics.hadamard import rotate_input, rotate_weight
from mxcompile.numerics.importance import floored
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.preservation import REQUIRED_DB, REQUIRED_DB_HALF

_ROTATED_RATIO = 0.9  # a rotation costs run time: the error with it must be below this share of that without
_NOT_WORTH = f"a rotation would save less than {1 - _ROTATED_RATIO:.0%} of the error"
_TRANSFORMS = " transforms"
_WORST_CONDITION = 100.0  # of a matrix: beyond it, its inverse makes some values of a weight much larger


class RotationKind(Enum):
    """One Hadamard matrix for all blocks, or for each block the matrix that gives inputs and weights equal moments."""

    HADAMARD = "hadamard"
    WUSH = "wush"


@dataclass(frozen=True)
class Rotate(Pass):
    """weight, activation: the formats that later passes will use (activation none: weight-only).

    block: channels of a rotation, a power of two; none: the block size of the activation, or of the weight.
    kind: hadamard; or wush: a matrix for each block (`block_transforms.py`) where it saves a tenth of the error that
        the Hadamard rotation, or none, leaves. It is stored with the weight, `block` numbers for each input channel.
    """

    weight: MXFormat
    activation: MXFormat | None = None
    block: int | None = None
    kind: RotationKind = RotationKind.HADAMARD

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
            readers = {value: segment.readers_of(value) for value in segment.inputs if not is_rotated(value)}
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
                fold = self._fold(value, readers[value], measured)
                numbers[fold.where] = {"error_over_plain": measured.error_over_plain}
                if measured.error_over_plain < _ROTATED_RATIO:
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
        observed = {value: self._observers(matmuls) for value, matmuls in readers.items()}
        sweep.advance(segment, {value: observers.all for value, observers in observed.items()})
        seen = [value for value, observers in observed.items() if not observers.seen_nothing]
        measured = ranks_of(program).map(
            lambda value: self._compare(program, readers[value], observed[value]),
            seen,
            [float(sum(matmul.root.meta["val"].numel() for matmul in readers[value])) for value in seen],
        )
        by_value = dict(zip(seen, measured, strict=True))
        return {value: by_value.get(value) for value in observed}

    def _observers(self, readers: Sequence[Matmul]) -> "_ValueObservers":
        """A matrix for each block is not made for experts: each of them would need its own."""
        with_moments = self.kind is RotationKind.WUSH and all(m.root.meta["val"].dim() == 2 for m in readers)
        return _ValueObservers(self.size, with_moments)

    def _why_not(self, readers: Sequence[Matmul]) -> str | None:
        size = readers[0].in_features
        if size % self.size:
            return f"{size} input channels are not a multiple of the rotation's block of {self.size}"
        if any(effective_readers(matmul.root) - {other.node for other in readers} for matmul in readers):
            return "its weight is also multiplied with other values, which would need the same rotation"
        return None

    def _fold(self, value: Node, readers: Sequence[Matmul], measured: "_Rotation") -> Fold:
        names = frozenset(matmul.node.name for matmul in readers)
        if measured.transforms is None:
            apply = partial(rotate, names=names, block=self.size, importance=measured.importance)
        else:
            apply = partial(transform, names=names, transforms=measured.transforms, importance=measured.importance)
        return Fold(f"%{value.name} -> {', '.join(m.module_path or m.parameter for m in readers)}", apply)

    def _compare(self, program: Program, readers: Sequence[Matmul], observers: "_ValueObservers") -> "_Rotation":
        """The squared errors of the matmuls' outputs on a sample of tokens, without a rotation and with each kind."""
        weights = list_matrices(finite_rows(program, matmul) for matmul in readers)
        sample = subsample_tokens(observers.sample.value, weights)
        no_factors = torch.full((sample.shape[-1],), -1, device=weights[0].device)

        def error(inputs: Tensor, importance: Tensor, convert: Callable[[Tensor], Tensor]) -> float:
            operand = Operand(inputs, importance, weights, no_factors, convert)
            return output_error([operand], Quantizers(self.weight, self.activation))(torch.ones(0, dtype=torch.float32))

        plain = error(sample, observers.plain.value, Tensor.float)
        importance = observers.rotated.value
        least = error(rotate_input(sample, self.size), importance, lambda w: rotate_weight(w.float(), self.size))
        rotation = _Rotation(least / max(plain, 1e-30), importance, None)
        if observers.moments is None:
            return rotation
        transforms, importance = _whitening(observers.moments.value, weights)
        inputs = apply_to_blocks(sample, transforms)
        transformed = error(inputs, importance, lambda w: undo_in_weight(w.float(), transforms))
        usable = float(torch.linalg.cond(transforms).max()) <= _WORST_CONDITION
        if usable and transformed < _ROTATED_RATIO * min(least, plain):
            return _Rotation(transformed / max(plain, 1e-30), importance, transforms)
        return rotation


@dataclass(frozen=True)
class _Rotation:
    """error_over_plain: the error with the rotation over that without. importance: mean square of each rotated channel
    `[in]`. transforms: the matrices, None for Hadamard's."""

    error_over_plain: float
    importance: Tensor
    transforms: Tensor | None


def _whitening(moments: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(matrices `[in / n, n, n]`, mean square of each channel of the transformed value `[in]`)."""
    transforms = whitening_transforms(moments, torch.cat([*weights])).float()
    products = (transforms @ moments * transforms).sum(-1)
    return transforms, floored(products.flatten())


_Measured = dict[Node, _Rotation | None]
"""By value; None if no token has reached it."""


def _save(program: Program, index: int, found: _Measured) -> None:
    seen = {value.name: measured for value, measured in found.items() if measured is not None}
    tensors = {name: rotation.importance for name, rotation in seen.items()}
    tensors |= {f"{n}{_TRANSFORMS}": each.transforms for n, each in seen.items() if each.transforms is not None}
    save_part(program, f"{index:04}", tensors, [{name: each.error_over_plain for name, each in seen.items()}])


def _load(program: Program, index: int, values: Sequence[Node]) -> _Measured | None:
    """What an interrupted run has measured; None if it has not come so far."""
    saved = load_part(program, f"{index:04}")
    if saved is None:
        return None
    tensors, (ratios,) = saved
    device = program.device(next(iter(program.parameter_names())))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

    def restored(name: str) -> _Rotation | None:
        if name not in ratios:
            return None
        return _Rotation(ratios[name], tensors[name], tensors.get(f"{name}{_TRANSFORMS}"))

    return {value: restored(value.name) for value in values}


class _ValueObservers:
    """Observers of one value: a sample of its tokens, and the importance of its channels without and with rotation.

    moments: second moments of its blocks, None if not asked for.
    """

    def __init__(self, block: int, with_moments: bool) -> None:
        self.sample, self.plain, self.rotated = TokenSample(), ChannelImportance(), ChannelImportance()
        self.moments = BlockMoments(block) if with_moments else None
        self.all: list[Observer] = [self.sample, self.plain, RotatedObserver(self.rotated, block)]
        self.all += [] if self.moments is None else [self.moments]

    @property
    def seen_nothing(self) -> bool:
        """True if no token has reached the value."""
        return not values_of(self.all)
