"""linear(x, w) -> linear(x[p], w[:, p]): put channels in an order in which those that share a scale are alike.

The rows of what makes x are put in the same order, so nothing is computed at run time, and only the order in which sums
are taken changes. A block of one large and 31 small channels loses the small ones; sorted, large ones share blocks.
Equal blocks, which other methods aim at for scales of whole rows, are equally bad ones in MX. Channels that may change
places are found from data flow (`orders.py`): those inside an MLP, those of a head's values, and the residual stream's,
which have one order in the whole model.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.order_region import moved
from mxcompile.analysis.folds.orders import OrderGroup, OrderKind, find_orders, reorder
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.calibration.runs.run import NO_TOKENS, Request
from mxcompile.calibration.statistics.observers import ChannelImportance
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat, ScaleRule, activation_rule
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Fold, Miss, PassResult
from mxcompile.numerics.block_order import BlockErrors, RoundingErrors, alike, exchanged
from mxcompile.numerics.importance import round_rows
from mxcompile.numerics.row_slices import column_wise
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.preservation import REQUIRED_DB, REQUIRED_DB_HALF

_SORTED = 1e-3  # logarithms that differ by less count as sorted: a second run measures them a little differently
_GAIN = 0.02  # of the expected error: a new order that saves less is not worth it
_BLOCK = 32
_SMALLEST = 1e-12


class SortedBy(Enum):
    """What channels are sorted by: the energy of the weights' columns, or of the activations; or, not sorted but
    exchanged, what rounding is expected to cost."""

    WEIGHT = "weight"
    ACTIVATION = "activation"
    ERROR = "error"


class OrderedValues(Enum):
    """Which values are sorted: all that can be, or those of one kind."""

    ALL = "all"
    HIDDEN = OrderKind.HIDDEN.value
    HEADS = OrderKind.HEADS.value
    STREAM = OrderKind.STREAM.value


@dataclass(frozen=True)
class Permute(Pass):
    """by: sort by the energy of the columns of the weights that read the value, which needs no data, or of the value;
        error: the better of both; for the residual stream, also blocks of channels that are alike for all readers, and
        exchange channels while that lowers the error expected of all, in the formats `weight` and `activation` (none:
        float) to come. Of the present order and these, the one in which rounded weights and inputs lose least.
    values: hidden (of MLPs), heads (from v to o, inside each head), stream (the residual stream), or all of these.
    """

    by: SortedBy = SortedBy.WEIGHT
    values: OrderedValues = OrderedValues.ALL
    weight: MXFormat | None = None
    activation: MXFormat | None = None

    name = "permute"
    preserves_function = True

    def __post_init__(self) -> None:
        super().__post_init__()
        formats = [fmt for fmt in (self.weight, self.activation) if fmt is not None]
        if (self.by is SortedBy.ERROR) != bool(formats):
            raise PipelineError("permute{by=error} and weight=... or activation=..., formats to come, go together")
        if len({fmt.block_size for fmt in formats}) > 1:
            raise PipelineError("permute{by=error}: weight and activation must have the same block size")

    @property
    def reads_calibration(self) -> bool:
        """Only the energy of activations depends on data."""
        return self.by is not SortedBy.WEIGHT

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
            ordered = self._exchanged(program, seen) if self.by is SortedBy.ERROR else self._sorted(program, seen)
            if isinstance(ordered, str):
                misses.append(Miss(str(group), ordered))
                continue
            source, numbers[str(group)] = ordered
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

    def _sorted(self, program: Program, group: OrderGroup) -> tuple[Tensor, dict[str, float]] | str:
        """The order by one key, or why it stays as it is."""
        scores = group.mean_log(partial(_energies, program, self.by))
        source = group.sorted_by(scores)
        if _is_sorted(scores, group):
            return "its channels are sorted already"
        return source, {"spread_db": _spread_db(scores), "sorted_spread_db": _spread_db(scores[source])}

    def _exchanged(self, program: Program, group: OrderGroup) -> tuple[Tensor, dict[str, float]] | str:
        """The order with the least expected error that was found, or why it stays as it is."""
        block = next(fmt.block_size for fmt in (self.weight, self.activation) if fmt is not None)
        kinds = (SortedBy.WEIGHT, SortedBy.ACTIVATION)
        energies = {kind: partial(_energies, program, kind) for kind in kinds}
        weights, inputs = _by_value(group, block, energies)
        if not len(weights):
            return f"no reader has its channels in whole blocks of {block}"
        of_weights = RoundingErrors.of(self.weight, ScaleRule.MSE)
        input_rule = activation_rule(self.activation) if self.activation is not None else ScaleRule.MSE
        errors = BlockErrors(weights, inputs, of_weights, RoundingErrors.of(self.activation, input_rule), block)
        present = torch.arange(group.count)
        orders = [present, *(group.sorted_by(group.mean_log(energies[kind])) for kind in kinds)]
        if group.kind is OrderKind.STREAM:
            if len(group.cells) == 1:
                orders.append(alike(weights.clamp(min=_SMALLEST), block))
            orders = [present, exchanged(errors, min(orders, key=errors.total), group.cells)]
        inputs_alone = replace(errors, of_weights=RoundingErrors.of(None, ScaleRule.MSE))
        lost = [inputs_alone.total(order) + self._lost_by_weights(program, group, order) for order in orders]
        if not min(lost) < (1 - _GAIN) * lost[0]:
            return f"no order was found that saves {_GAIN:.0%} of the expected error"
        return orders[lost.index(min(lost))], {"expected_error": lost[0], "reordered_expected_error": min(lost)}

    def _lost_by_weights(self, program: Program, group: OrderGroup, order: Tensor) -> float:
        """The error of outputs, over their energy, of weights rounded in an order: the mean over values.

        Rounded, as energies do not show where weights lie on a format's levels, as those of a file in few bits.
        """
        if self.weight is None:
            return 0.0
        sums: dict[Node, Tensor] = {}
        for matmul, channels in group.matmuls:
            places = moved(channels, order)
            inputs = _energies(program, SortedBy.ACTIVATION, matmul)
            rows, inputs = finite_rows(program, matmul)[..., places.to(inputs.device)], inputs[places.to(inputs.device)]
            error = round_rows(rows, self.weight, ScaleRule.MSE)[0].sub_(rows)
            columns = torch.stack([each.double().square().flatten(0, -2).sum(0) for each in (error, rows)])
            sums[matmul.activation] = sums.get(matmul.activation, torch.zeros(())) + (columns @ inputs).cpu()
        return float(torch.stack([lost / energy.clamp(min=_SMALLEST) for lost, energy in sums.values()]).mean())


def _energies(program: Program, by: SortedBy, matmul: Matmul) -> Tensor:
    """The energy of every input channel `[in]`, above 0: of a weight's columns, or of the value."""
    if by is SortedBy.ACTIVATION:
        energies = _energy_of(matmul).result(program).double()
    else:
        energies = column_wise(lambda rows: rows.double().square().sum(0), finite_rows(program, matmul))
    return energies.clamp(min=_SMALLEST * energies.amax().clamp(min=_SMALLEST))


def _by_value(
    group: OrderGroup, block: int, energies: Mapping[SortedBy, Callable[[Matmul], Tensor]]
) -> tuple[Tensor, Tensor]:
    """Energies `[values, channels]` of weights and inputs, of the readers' blocks that are blocks of the group.

    Readers of one value are one row. A value that has channels several times (heads that share them) has several rows.
    """
    rows: dict[tuple[Node, int], Tensor] = {}
    for matmul, channels in group.matmuls:
        weights, inputs = (energies[kind](matmul).float().cpu() for kind in (SortedBy.WEIGHT, SortedBy.ACTIVATION))
        times: Counter[int] = Counter()
        for start in range(0, len(channels) - block + 1, block):
            first, places = int(channels[start]), slice(start, start + block)
            if first < 0 or first % block or not torch.equal(channels[places], first + torch.arange(block)):
                continue
            row = rows.setdefault((matmul.activation, times[first]), torch.zeros(2, group.count))
            times[first] += 1
            row[0, first : first + block] += weights[places]
            row[1, first : first + block] = inputs[places]
    found = torch.stack([*rows.values()]) if rows else torch.zeros(0, 2, group.count)
    return found[:, 0], found[:, 1]


def _energy_of(matmul: Matmul) -> Request:
    return Request(matmul.activation.name, ChannelImportance)


def _is_sorted(scores: Tensor, group: OrderGroup) -> bool:
    return all(bool((scores[cell].diff() < _SORTED).all()) for cell in group.cells)


def _spread_db(scores: Tensor) -> float:
    """How far the largest energy of a block is above its mean, in dB, averaged over blocks; scores: logarithms."""
    blocks = [block.exp() for block in scores.split(_BLOCK)]
    return float(10 * torch.stack([block.amax() / block.mean() for block in blocks]).log10().mean())
