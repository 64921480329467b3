"""linear(x, w) -> linear(x[p], w[:, p]): put channels in an order in which those that share a scale are alike.

The rows of what makes x are put in the same order, so nothing is computed at run time, and only the order in which sums
are taken changes. A block of one large and 31 small channels loses the small ones; sorted, large ones share blocks.
Equal blocks, which other methods aim at for scales of whole rows, are equally bad ones in MX. Channels that may change
places are found from data flow (`orders.py`): those inside an MLP, those of a head's values, and the residual stream's,
which have one order in the whole model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.orders import OrderGroup, OrderKind, find_orders, reorder
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.calibration.runs.run import NO_TOKENS, Request
from mxcompile.calibration.statistics.observers import ChannelImportance
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Fold, Miss, PassResult
from mxcompile.numerics.row_slices import column_wise
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.preservation import REQUIRED_DB, REQUIRED_DB_HALF

_SORTED = 1e-3  # logarithms that differ by less count as sorted: a second run measures them a little differently
_BLOCK = 32
_SMALLEST = 1e-12


class SortedBy(Enum):
    """What channels are sorted by: the energy of the weights' columns, or of the activations."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


class OrderedValues(Enum):
    """Which values are sorted: all that can be, or those of one kind."""

    ALL = "all"
    HIDDEN = OrderKind.HIDDEN.value
    HEADS = OrderKind.HEADS.value
    STREAM = OrderKind.STREAM.value


@dataclass(frozen=True)
class Permute(Pass):
    """by: sort by the energy of the columns of the weights that read the value, which needs no data, or of the value.

    values: hidden (of MLPs), heads (from v to o, inside each head), stream (the residual stream), or all of these.
    """

    by: SortedBy = SortedBy.WEIGHT
    values: OrderedValues = OrderedValues.ALL

    name = "permute"
    preserves_function = True

    @property
    def reads_calibration(self) -> bool:
        """Only the energy of activations depends on data."""
        return self.by is SortedBy.ACTIVATION

    def required_db(self, program: Program) -> float:
        """Less for half-precision weights: sums in another order are rounded to half precision differently."""
        dtypes = {program.stored(matmul.parameter).dtype for matmul in choose(program).matmuls}
        return REQUIRED_DB_HALF if any(dtype.itemsize < 4 for dtype in dtypes) else REQUIRED_DB

    def requests(self, program: Program) -> Sequence[Request]:
        """The mean square of every channel, if channels are sorted by activations."""
        if self.by is SortedBy.WEIGHT:
            return ()
        return [_energy_of(matmul) for group in self._groups(program)[0] for matmul, _ in group.matmuls]

    def run(self, program: Program) -> PassResult:
        """Sort the channels of every group."""
        groups, misses = self._groups(program)
        numbers: dict[str, dict[str, float]] = {}
        folds: list[Fold] = []
        for group in program.track(groups):
            seen = self._seen(program, group)
            if not seen.matmuls:
                misses.append(Miss(str(group), NO_TOKENS))
                continue
            scores = seen.mean_log(partial(self._energies, program))
            source = group.sorted_by(scores)
            if _is_sorted(scores, group):
                misses.append(Miss(str(group), "its channels are sorted already"))
                continue
            numbers[str(group)] = {"spread_db": _spread_db(scores), "sorted_spread_db": _spread_db(scores[source])}
            folds.append(Fold(str(group), partial(reorder, group=group, source=source)))
            folds[-1].apply(program)
        return PassResult(len(folds), tuple(misses), numbers, tuple(folds))

    def _groups(self, program: Program) -> tuple[list[OrderGroup], list[Miss]]:
        groups, unordered = find_orders(program, choose(program).matmuls)
        misses = [Miss(where(miss.matmul.node), miss.reason) for miss in unordered]
        if self.values is not OrderedValues.ALL:
            groups = [group for group in groups if group.kind.value == self.values.value]
        return groups, misses

    def _seen(self, program: Program, group: OrderGroup) -> OrderGroup:
        if self.by is SortedBy.WEIGHT:
            return group
        return group.restricted(lambda matmul: _energy_of(matmul).seen(program))

    def _energies(self, program: Program, matmul: Matmul) -> Tensor:
        """The energy of every input channel `[in]`, above 0."""
        if self.by is SortedBy.ACTIVATION:
            energies = _energy_of(matmul).result(program).double()
        else:
            energies = column_wise(lambda rows: rows.double().square().sum(0), finite_rows(program, matmul))
        return energies.clamp(min=_SMALLEST * energies.amax().clamp(min=_SMALLEST))


def _energy_of(matmul: Matmul) -> Request:
    return Request(matmul.activation.name, ChannelImportance)


def _is_sorted(scores: Tensor, group: OrderGroup) -> bool:
    return all(bool((scores[cell].diff() < _SORTED).all()) for cell in group.cells)


def _spread_db(scores: Tensor) -> float:
    """How far the largest energy of a block is above its mean, in dB, averaged over blocks; scores: logarithms."""
    blocks = [block.exp() for block in scores.split(_BLOCK)]
    return float(10 * torch.stack([block.amax() / block.mean() for block in blocks]).log10().mean())
