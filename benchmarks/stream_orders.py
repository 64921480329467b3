"""The residual stream's one order by other keys than `permute` has: a pass for `benchmarks/permute.py`.

    python benchmarks/permute.py --variant planted --orders "none,permute{values=stream},stream{key=exchanged}" ...

Every norm has channels of its own that are hard to round, and all norms' readers have one order. `largest` sorts by the
largest energy that a channel of the weights has in any norm (each norm's over its mean). `nearest` fills block after
block with the channel that is farthest from the others and its 31 nearest, by the energies in all norms. `halves`
divides channels by their first principal component, again and again. `exchanged` searches (`block_order.py`), from the
best of these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.orders import OrderGroup, OrderKind, find_orders, reorder
from mxcompile.analysis.matmuls import Matmul
from mxcompile.calibration.runs.run import Request
from mxcompile.calibration.statistics.observers import ChannelImportance
from mxcompile.formats import MXINT4, MXINT8, MXFormat, ScaleRule, activation_rule
from mxcompile.graph.program import Program
from mxcompile.graph.records import PassResult
from mxcompile.numerics.block_order import BlockErrors, RoundingErrors, alike, exchanged
from mxcompile.pipeline.interfaces import Pass

BLOCK: Final = 32


class StreamKey(Enum):
    """See the file's text."""

    LARGEST = "largest"
    NEAREST = "nearest"
    HALVES = "halves"
    EXCHANGED = "exchanged"


@dataclass(frozen=True)
class StreamOrder(Pass):
    """weight, activation: the formats whose errors `exchanged` expects."""

    key: StreamKey
    weight: MXFormat = MXINT4
    activation: MXFormat = MXINT8
    name = "stream"
    preserves_function = True

    @property
    def reads_calibration(self) -> bool:
        """Energies of values."""
        return True

    def requests(self, program: Program) -> Sequence[Request]:
        """The mean square of every channel of the readers' inputs."""
        return [_energy_of(matmul) for group in _streams(program) for matmul, _ in group.matmuls]

    def run(self, program: Program) -> PassResult:
        """Reorder the residual stream."""
        groups = _streams(program)
        numbers: dict[str, dict[str, float]] = {}
        for group in groups:
            weights, inputs = energies_by_value(program, group)
            of_weights = RoundingErrors.of(self.weight, ScaleRule.MSE)
            of_inputs = RoundingErrors.of(self.activation, activation_rule(self.activation))
            errors = BlockErrors(weights, inputs, of_weights, of_inputs, BLOCK)
            present = torch.arange(group.count)
            source = self._order(errors, present)
            numbers[str(group)] = {"expected": errors.total(present), "expected_after": errors.total(source)}
            reorder(program, group, source)
        return PassResult(len(groups), (), numbers)

    def _order(self, errors: BlockErrors, present: Tensor) -> Tensor:
        logs = errors.weights.clamp(min=1e-20).log()
        points = (logs - logs.mean(-1, keepdim=True)).T
        if self.key is not StreamKey.EXCHANGED:
            return ORDERS[self.key](points)
        starts = [present, points.mean(1).argsort(descending=True), *(order(points) for order in ORDERS.values())]
        return exchanged(errors, min(starts, key=errors.total), [present])


def energies_by_value(program: Program, group: OrderGroup) -> tuple[Tensor, Tensor]:
    """Energies `[values, channels]` of the columns that read each value of a stream, and of the value."""
    found: dict[Node, Tensor] = {}
    for matmul, channels in group.matmuls:
        row = found.setdefault(matmul.activation, torch.zeros(2, group.count))
        row[0, channels] += program.stored(matmul.parameter).detach().float().square().sum(0).cpu()
        row[1, channels] = _energy_of(matmul).result(program).float().cpu()
    stacked = torch.stack([*found.values()])
    return stacked[:, 0], stacked[:, 1]


def largest(points: Tensor) -> Tensor:
    """points: `[channels, values]`, logarithms."""
    return points.amax(1).argsort(descending=True)


def nearest(points: Tensor) -> Tensor:
    """Blocks of channels that are alike in all norms."""
    return alike(points.T.exp(), BLOCK)


def halves(points: Tensor) -> Tensor:
    """Halves of whole blocks by the first principal component, down to single blocks."""

    def divided(channels: Tensor) -> Tensor:
        if len(channels) <= BLOCK:
            return channels
        rest = points[channels]
        component = torch.linalg.svd(rest - rest.mean(0), full_matrices=False).U[:, 0]
        in_order, half = channels[component.argsort()], len(channels) // BLOCK // 2 * BLOCK
        return torch.cat([divided(in_order[:half]), divided(in_order[half:])])

    return divided(torch.arange(len(points)))


ORDERS: Final[Mapping[StreamKey, Callable[[Tensor], Tensor]]] = {
    StreamKey.LARGEST: largest,
    StreamKey.NEAREST: nearest,
    StreamKey.HALVES: halves,
}


def _streams(program: Program) -> list[OrderGroup]:
    return [each for each in find_orders(program, choose(program).matmuls)[0] if each.kind is OrderKind.STREAM]


def _energy_of(matmul: Matmul) -> Request:
    return Request(matmul.activation.name, ChannelImportance)
