"""Order groups: values whose channels can change places, and the parameters that are reordered for it.

    linear(gelu(linear(x, u, b)), w)    u[p], b[p] (rows), w[:, p] (columns)

The input of a matmul is given one label a channel; what else must move is found by propagation (`order_region.py`,
`order_constraints.py`). The model computes the same numbers in another order, so only the rounding of sums differs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.factors import UNKNOWN, InconsistentSizesError
from mxcompile.analysis.folds.groups import UnfoldableInput
from mxcompile.analysis.folds.movement import moved_from
from mxcompile.analysis.folds.order_constraints import MOVES, order_constraint_of
from mxcompile.analysis.folds.order_region import OrderRegion, moved
from mxcompile.analysis.folds.region import ConcreteSizes
from mxcompile.analysis.matmuls import Matmul
from mxcompile.graph.dataflow import TRANSPOSES
from mxcompile.graph.program import Program

_ALL_DIFFER = "its channels are all treated differently"


class OrderKind(StrEnum):
    """Where the channels of a group are: in one value (an MLP's hidden one), in one value within heads, or in several
    values that are added to each other (the residual stream)."""

    HIDDEN = "hidden"
    HEADS = "heads"
    STREAM = "stream"


@dataclass(frozen=True, eq=False)
class OrderGroup:
    """Channels that can change places, numbered 0 to count - 1 by their places in the first value.

    value: the first matmul input that is reordered.
    cells: the sets of channels that may change places with each other, ascending.
    matmuls: the wanted ones that read a reordered value, each with the channels `[in]` of its input, -1 for one that
        stays.
    parameters: (name, channels of its elements, -1 for those that stay, broadcast against it), in any order; a matrix
        may be there twice, for its rows and its columns.
    values: all computed values that are reordered.
    """

    value: Node
    count: int
    cells: tuple[Tensor, ...]
    matmuls: tuple[tuple[Matmul, Tensor], ...]
    parameters: tuple[tuple[str, Tensor], ...]
    values: frozenset[Node]

    @property
    def kind(self) -> OrderKind:
        """Where the channels are."""
        if len({matmul.activation for matmul, _ in self.matmuls}) > 1:
            return OrderKind.STREAM
        return OrderKind.HEADS if len(self.cells) > 1 else OrderKind.HIDDEN

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The matmuls' nodes."""
        return tuple(matmul.node for matmul, _ in self.matmuls)

    def __str__(self) -> str:
        paths = dict.fromkeys(matmul.module_path or matmul.parameter for matmul, _ in self.matmuls)
        readers = list(paths) if self.kind is not OrderKind.STREAM else [f"{len(paths)} layers"]
        return f"%{self.value.name} -> {', '.join(readers)}"

    def restricted(self, keep: Callable[[Matmul], bool]) -> "OrderGroup":
        """The group with some of its matmuls only, for statistics of those that calibration data reach."""
        return replace(self, matmuls=tuple((matmul, channels) for matmul, channels in self.matmuls if keep(matmul)))

    def mean_log(self, energies: Callable[[Matmul], Tensor]) -> Tensor:
        """For every channel, the mean over matmuls of the logarithm of a positive number per column. Float64 `[count]`.

        energies: `[in]` of a matmul. Each matmul's logarithms are shifted to a mean of 0 first.
        """
        total = torch.zeros(2, self.count + 1, dtype=torch.float64)
        for matmul, channels in self.matmuls:
            logs = energies(matmul).double().cpu().log()
            indices = torch.where(channels < 0, self.count, channels)
            total[0].scatter_add_(0, indices, logs - logs.mean())
            total[1].scatter_add_(0, indices, torch.ones(len(indices), dtype=torch.float64))
        return (total[0] / total[1].clamp(min=1))[:-1]

    def sorted_by(self, scores: Tensor) -> Tensor:
        """The order with falling scores `[count]` in every cell: for each place, the channel that comes there."""
        source = torch.arange(self.count)
        for cell in self.cells:
            source[cell] = cell[torch.argsort(scores[cell], descending=True, stable=True)]
        return source


def find_orders(program: Program, wanted: Iterable[Matmul]) -> tuple[list[OrderGroup], list[UnfoldableInput]]:
    """The order groups of the wanted matmuls, in graph order, and the matmuls without a group."""
    wanted, sizes = list(wanted), [ConcreteSizes(program), ConcreteSizes(program, small=False)]
    groups: list[OrderGroup] = []
    misses: list[UnfoldableInput] = []
    reasons: dict[Node, str] = {}
    done: set[Node] = set()
    for matmul in wanted:
        value = matmul.activation
        if matmul.node in done:
            continue
        if value not in reasons:
            solved = _solved(program, sizes, matmul)
            if not isinstance(solved, str):
                groups.append(_collected(solved, value, wanted))
                done.update(groups[-1].nodes)
                continue
            reasons[value] = solved
        misses.append(UnfoldableInput(matmul, reasons[value]))
    return groups, misses


def reorder(program: Program, group: OrderGroup, source: Tensor) -> None:
    """Put channel `source[i]` in the place of channel i, in all values and parameters of the group. source: `[count]`.

    Each cell must be mapped onto itself.
    """
    for name, channels in group.parameters:
        program.set_tensor(name, _reordered(program.tensor(name).detach(), channels, source))
    for name, channels in {matmul.parameter: channels for matmul, channels in group.matmuls}.items():
        if name in program.importance:
            importance = program.importance[name]
            program.importance[name] = _reordered(importance, channels, source)


def _reordered(tensor: Tensor, channels: Tensor, source: Tensor) -> Tensor:
    varying = [dim for dim, size in enumerate(channels.shape) if size > 1]
    index = moved(channels, source).to(tensor.device)
    if len(varying) == 1:
        return tensor.index_select(varying[0], index)
    front = list(range(len(varying)))
    rows = tensor.movedim(varying, front)
    ordered = rows.flatten(0, len(varying) - 1).index_select(0, index).view(rows.shape)
    return ordered.movedim(front, varying).contiguous()


def _solved(program: Program, sizes: Sequence[ConcreteSizes], matmul: Matmul) -> "_Cells | str":
    """The cells of a matmul's input, or why no channel may change places."""
    reason = ""
    for assumed in sizes:
        region = OrderRegion(program, assumed, order_constraint_of)
        channels = region.factors.new(matmul.in_features)
        rank = matmul.activation.meta["val"].dim()
        try:
            region.assign(matmul.activation, channels.view((1,) * (rank - 1) + (-1,)), 1)
            region.solve(channels)
            cells = _Cells(region)
            twisted = cells.twisted()
        except (InconsistentSizesError, RuntimeError, IndexError) as error:
            reason = f"its data flow cannot be followed: {error}"
            continue
        if twisted is not None:
            return f"%{twisted.name} puts copies of its channels in different orders"
        return cells if cells.members else next(iter(region.factors.reasons.values()), _ALL_DIFFER)
    return reason


class _Cells:
    """The channels of a solved region that may change places, numbered, and its cells of these numbers."""

    def __init__(self, region: OrderRegion) -> None:
        self.region = region
        cells = region.cells()
        ids = torch.cat(cells).sort().values if cells else torch.zeros(0, dtype=torch.long)
        self.count = len(ids)
        self._numbers = torch.full((len(region.factors),), UNKNOWN)
        self._numbers[ids] = torch.arange(self.count)
        self.members = tuple(self._numbers[cell] for cell in cells)

    def numbered(self, labels: Tensor) -> Tensor:
        """Labels as channel numbers, -1 for what stays."""
        ids = self.region.factors.find(labels)
        return torch.where(ids == UNKNOWN, UNKNOWN, self._numbers[ids.clamp(min=0)])

    def reordered(self) -> Iterator[tuple[Node, Tensor]]:
        """Every value that changes, with its channel numbers."""
        for node, labels in self.region.labels.items():
            if bool(((channels := self.numbered(labels)) >= 0).any()):
                yield node, channels

    def twisted(self) -> Node | None:
        """The first op that moves elements and does not commute with an exchange of channels; None if all do.

        Two exchanges generate all others: of the first two channels of every cell, and of all in a circle.
        """
        swap, turn = torch.arange(self.count), torch.arange(self.count)
        for cell in self.members:
            swap[cell[:2]] = cell[:2].flip(0)
            turn[cell] = cell.roll(1)
        for node, channels in self.reordered():
            if node.target not in MOVES or (node.target in TRANSPOSES and not _repeats(channels)):
                continue
            origin, labels = moved_from(self.region, node)
            before, after = self.numbered(labels), channels.expand(origin.shape)
            for source in (swap, turn):
                here, there = (
                    origin.flatten()[moved(after, source)],
                    moved(before, source)[origin.flatten().clamp(min=0)],
                )
                if not torch.equal(*(torch.where(origin.flatten() < 0, UNKNOWN, places) for places in (here, there))):
                    return node
        return None


def _repeats(channels: Tensor) -> bool:
    known = channels[channels >= 0]
    return len(known) > len(known.unique())


def _collected(cells: _Cells, value: Node, wanted: Iterable[Matmul]) -> OrderGroup:
    region = cells.region
    matmuls: list[tuple[Matmul, Tensor]] = []
    for matmul in wanted:
        if region.get(matmul.activation) is None:
            continue
        channels = region.channels((matmul.activation, -1))
        if channels is not None and bool((cells.numbered(channels) >= 0).any()):
            matmuls.append((matmul, cells.numbered(channels).expand(matmul.in_features)))
    values = dict(cells.reordered())
    parameters = [(str(node.target), channels) for node, channels in values.items() if node.op == "get_attr"]
    for (node, _), labels in region.axes.items():
        if bool(((channels := cells.numbered(labels)) >= 0).any()):
            parameters += [(name, channels) for name in sorted(region.matrix_names(node))]
    unique = {(name, tuple(channels.shape)): (name, channels) for name, channels in parameters}
    computed = frozenset(node for node in values if node.op != "get_attr")
    return OrderGroup(value, cells.count, cells.members, tuple(matmuls), tuple(unique.values()), computed)
