"""Scale groups: which values can be divided by channel factors, and which parameters absorb the factors.

    linear(norm(x) * g, w)                 g / s,           w * s
    linear(silu(gate) * linear(x, u), w)   u / s (rows),    w * s (columns)

A group is found from data flow alone: the input of a matmul is required to carry one factor per channel, and the
consequences for all other values are propagated (`region.py`, `constraints.py`). What cannot carry a factor pins it to
1. If all factors are pinned, there is no group, and the first pin is the reason.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.constraints import constraint_of
from mxcompile.analysis.folds.factors import ONE, UNKNOWN, InconsistentSizesError
from mxcompile.analysis.folds.region import ConcreteSizes, Region
from mxcompile.analysis.matmuls import Matmul
from mxcompile.graph.program import Program
from mxcompile.numerics.row_slices import row_wise

_BY_LINEAR = "its input is made by a linear, not by a norm: ask for it with through_linears=true"


@dataclass(frozen=True)
class Absorber:
    """A parameter that absorbs factors: (w + offset) * s**power - offset.

    channels: index of the factor of every element, broadcast against the parameter; -1 where there is none.
    """

    parameter: str
    channels: Tensor
    power: int
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Values that are scaled together, and the parameters that absorb the factors.

    value: the first matmul input that is divided. count: how many factors can be chosen freely.
    in_half_precision: a divided value or parameter has a 16-bit dtype: only powers of two divide it without loss.
    matmuls: the wanted ones that read a divided value, each with the factor indices `[in]` of its input channels, -1
        for a channel without a factor.
    values: all computed values that are divided or multiplied.
    """

    value: Node
    count: int
    matmuls: tuple[tuple[Matmul, Tensor], ...]
    absorbers: tuple[Absorber, ...]
    values: frozenset[Node]
    in_half_precision: bool

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The matmuls' nodes."""
        return tuple(matmul.node for matmul, _ in self.matmuls)

    def __str__(self) -> str:
        readers = ", ".join(dict.fromkeys(matmul.module_path or matmul.parameter for matmul, _ in self.matmuls))
        return f"%{self.value.name} -> {readers}"

    def made_by_norm(self, program: Program) -> bool:
        """True if only vectors divide the value: a norm's weight and bias."""
        return all(program.stored(a.parameter).dim() == 1 for a in self.absorbers if a.power == -1)

    def restricted(self, keep: Callable[[Matmul], bool]) -> "ScaleGroup":
        """The group with some of its matmuls only, for statistics of those that calibration data reach."""
        return replace(self, matmuls=tuple((matmul, numbers) for matmul, numbers in self.matmuls if keep(matmul)))

    def largest(self, channels: Callable[[Matmul], Tensor]) -> Tensor:
        """For every factor, the maximum over its channels of a statistic per input channel. Float32 `[count]`.

        channels: the statistic `[in]` of a matmul.
        """
        result = torch.zeros(self.count + 1, dtype=torch.float32)
        for matmul, numbers in self.matmuls:
            indices = torch.where(numbers < 0, self.count, numbers)
            result.scatter_reduce_(0, indices, channels(matmul).float().cpu(), "amax")
        return result[:-1]

    def mean(self, channels: Callable[[Matmul], Tensor]) -> Tensor:
        """For every factor, the mean over its channels of a statistic per input channel. Float32 `[count]`.

        channels: the statistic `[in]` of a matmul.
        """
        total = torch.zeros(2, self.count + 1, dtype=torch.float32)
        for matmul, numbers in self.matmuls:
            indices = torch.where(numbers < 0, self.count, numbers)
            total[0].scatter_add_(0, indices, channels(matmul).float().cpu())
            total[1].scatter_add_(0, indices, torch.ones(len(indices), dtype=torch.float32))
        return (total[0] / total[1].clamp(min=1))[:-1]


@dataclass(frozen=True)
class UnfoldableInput:
    """A matmul whose input is not divided by factors, and why. by_choice: it could be, but options exclude it."""

    matmul: Matmul
    reason: str
    by_choice: bool = False


def find_groups(
    program: Program, wanted: Iterable[Matmul], through_linears: bool = True
) -> tuple[list[ScaleGroup], list[UnfoldableInput]]:
    """The scale groups of the wanted matmuls, in graph order, and the matmuls without a group.

    through_linears: False leaves out groups whose value is made by a linear rather than a norm.
    """
    wanted, sizes = list(wanted), [ConcreteSizes(program), ConcreteSizes(program, small=False)]
    groups: list[ScaleGroup] = []
    misses: list[UnfoldableInput] = []
    reasons: dict[Node, str] = {}
    done: set[Node] = set()
    for matmul in wanted:
        if matmul.node in done:
            continue
        value = matmul.activation
        if value not in reasons:
            region = _solved(program, sizes, matmul)
            if isinstance(region, Region):
                groups.append(_collected(program, region, value, wanted))
                done.update(groups[-1].nodes)
                continue
            reasons[value] = region
        misses.append(UnfoldableInput(matmul, reasons[value]))
    if through_linears:
        return groups, misses
    kept = [group for group in groups if group.made_by_norm(program)]
    left = [matmul for group in groups if group not in kept for matmul, _ in group.matmuls]
    return kept, [*misses, *(UnfoldableInput(matmul, _BY_LINEAR, by_choice=True) for matmul in left)]


def fold(program: Program, group: ScaleGroup, factors: Tensor) -> None:
    """Divide the group's values by `factors` `[count]` (positive, float32): its parameters absorb them."""
    padded = torch.cat((factors.float().cpu(), torch.ones(1, dtype=torch.float32)))
    for absorber in group.absorbers:
        before = program.tensor(absorber.parameter).detach()
        scale = (padded[absorber.channels] ** absorber.power).to(before.device)
        program.set_tensor(absorber.parameter, _absorbed(before, scale, absorber.offset))
    for name, channels in {matmul.parameter: channels for matmul, channels in group.matmuls}.items():
        if name in program.importance:
            importance = program.importance[name]
            program.importance[name] = importance / padded[channels].square().to(importance.device)


def _absorbed(tensor: Tensor, scale: Tensor, offset: float) -> Tensor:
    """(tensor + offset) * scale - offset, in float32 or float64, a few rows at a time. scale: broadcast to tensor."""

    def scaled(values: Tensor, factors: Tensor) -> tuple[Tensor]:
        wide = values if values.dtype == torch.float64 else values.float()
        return (((wide + offset) * factors - offset).to(values.dtype),)

    if tensor.dim() < 2:
        return scaled(tensor, scale)[0]
    return row_wise(scaled, tensor, scale.broadcast_to(tensor.shape))[0]


def representable_factors(group: ScaleGroup, factors: Tensor, power_of_two: bool) -> Tensor:
    """The factors, rounded to powers of two if asked for, or if the group cannot absorb others without loss."""
    return torch.exp2(torch.log2(factors).round()) if power_of_two or group.in_half_precision else factors


def _solved(program: Program, sizes: Iterable[ConcreteSizes], matmul: Matmul) -> Region | str:
    """The region of a matmul's input, or why it has no factor to choose. Uses the first consistent `sizes`."""
    reason = ""
    for assumed in sizes:
        region = Region(program, assumed, constraint_of)
        channels = region.factors.new(matmul.in_features)
        rank = matmul.activation.meta["val"].dim()
        try:
            region.assign(matmul.activation, channels.view((1,) * (rank - 1) + (-1,)), -1)
            region = region.solve(channels)
        except (InconsistentSizesError, RuntimeError, IndexError) as error:
            reason = f"its data flow cannot be followed: {error}"
            continue
        free = region.free_factors(channels)
        return region if free else next(iter(region.factors.reasons.values()), "nothing can take factors up")
    return reason


def _collected(program: Program, region: Region, value: Node, wanted: Iterable[Matmul]) -> ScaleGroup:
    numbers: dict[int, int] = {}

    def numbered(labels: Tensor) -> Tensor:
        ids = region.factors.find(labels)
        for name in ids.unique().tolist():
            if name > ONE:
                numbers.setdefault(name, len(numbers))
        table = torch.full((max(numbers, default=0) + 1,), UNKNOWN)
        table[list(numbers)] = torch.tensor(list(numbers.values()))
        return torch.where(ids > ONE, table[ids.clamp(min=0, max=len(table) - 1)], UNKNOWN)

    matmuls: list[tuple[Matmul, Tensor]] = []
    for matmul in wanted:
        labels = region.get(matmul.activation)
        if labels is None or not region.free_factors(labels):
            continue
        channels = numbered(labels.flatten(0, -2)[0] if labels.dim() > 1 else labels).expand(matmul.in_features)
        matmuls.append((matmul, channels))
    absorbers = [
        Absorber(str(node.target), numbered(labels), region.power[node])
        for node, labels in region.labels.items()
        if node.op == "get_attr" and region.free_factors(labels)
    ]
    for node, offset in region.offsets.items():
        if region.free_factors(region.labels[node]):
            parameter = node.args[0] if isinstance(node.args[0], Node) else node.args[1]
            while isinstance(parameter, Node) and parameter.op != "get_attr":
                parameter = parameter.args[0]
            assert isinstance(parameter, Node)
            absorbers.append(Absorber(str(parameter.target), numbered(region.labels[node]), region.power[node], offset))
    scaled = [node for node, labels in region.labels.items() if region.free_factors(labels)]
    half = any(node.meta["val"].dtype.itemsize < 4 for node in scaled)
    values = frozenset(node for node in scaled if node.op != "get_attr")
    unique = {(a.parameter, a.power): a for a in absorbers}
    return ScaleGroup(value, len(numbers), tuple(matmuls), tuple(unique.values()), values, half)
