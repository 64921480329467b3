"""An order of channels in which blocks lose little: places are exchanged while that lowers the expected error.

The largest channel of a block sets the step for all of them. Weights that are small beside others of their block are
lost, and so are small values of the input. What that costs the outputs is expected from energies of channels alone and
summed over all values that have this order: what is good for one may be bad for others, which no sorting key settles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.numerics.reference import quantize_dequantize

_PARTNERS: Final = 128  # places that one place is compared with in a sweep
_SWEEPS: Final = 8
_FEW: Final = 0.02  # of the places exchanged in a sweep: further sweeps gain little
_LEAST_GAIN: Final = 1e-7  # of the error of all blocks: less is rounding
_LARGER: Final = 4.0
_SAMPLE: Final = 1024  # blocks


@dataclass(frozen=True)
class RoundingErrors:
    """The expected squared error of a channel: a share of its energy, and one of its block's; at most all it has.

    A block's energy is the 2-norm of its channels' energies, which the expected square of its largest number follows,
    whether all are alike or one is larger.
    """

    of_own: float
    of_block: float

    @classmethod
    def of(cls, fmt: MXFormat | None, rule: ScaleRule) -> Self:
        """Measured on normal numbers, in blocks of equal channels and with one that is larger. None: float."""
        if fmt is None:
            return cls(0.0, 0.0)
        equal = torch.randn(_SAMPLE, fmt.block_size, generator=torch.Generator().manual_seed(0))
        uneven = equal.clone()
        uneven[:, 0] *= _LARGER
        beside_equals, beside_larger = (
            float((quantize_dequantize(x, fmt, rule) - x)[:, 1:].square().mean()) for x in (equal, uneven)
        )
        count = fmt.block_size
        blocks = [torch.tensor([first, *[1.0] * (count - 1)]).norm() for first in (1.0, _LARGER**2)]
        of_block = max(0.0, (beside_larger - beside_equals) / float(blocks[1] - blocks[0]))
        return cls(max(0.0, beside_equals - of_block * float(blocks[0])), of_block)

    def __call__(self, energies: Tensor) -> Tensor:
        """Errors of channels `[..., block]` with these energies."""
        expected = self.of_own * energies + self.of_block * energies.norm(dim=-1, keepdim=True)
        return torch.minimum(expected, energies)


@dataclass(frozen=True)
class BlockErrors:
    """Expected errors of outputs over their energy, summed over values.

    weights, inputs: energies `[values, channels]` of the columns that read a value, and of the value; 0 where a value
    has no such channel.
    """

    weights: Tensor
    inputs: Tensor
    of_weights: RoundingErrors
    of_inputs: RoundingErrors
    block: int

    def of(self, weights: Tensor, inputs: Tensor) -> Tensor:
        """The error of each block; weights, inputs: `[..., values, block]` as `by_block` returns them."""
        return (self.of_weights(weights) * inputs + self.of_inputs(inputs) * weights).sum((-1, -2))

    def by_block(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, inputs) in an order, `[blocks, values, block]`, so that every value's outputs have energy 1."""
        outputs = (self.weights * self.inputs).sum(-1, keepdim=True)
        missing = -len(order) % self.block

        def split(energies: Tensor) -> Tensor:
            return pad(energies[:, order], (0, missing)).unflatten(1, (-1, self.block)).transpose(0, 1).contiguous()

        return split(self.weights / torch.where(outputs > 0, outputs, 1.0)), split(self.inputs)

    def total(self, order: Tensor) -> float:
        """The error of all blocks: the mean over values."""
        return float(self.of(*self.by_block(order)).sum()) / len(self.weights)


def alike(energies: Tensor, block: int) -> Tensor:
    """An order in blocks of channels that are alike in all values; energies: `[values, channels]`, above 0.

    The channel that is farthest from the mean of those left, by logarithms, and its nearest, block after block.
    """
    logs = energies.log()
    points = (logs - logs.mean(-1, keepdim=True)).T
    left, order = torch.arange(len(points)), list[Tensor]()
    while len(left):
        rest = points[left]
        farthest = rest[(rest - rest.mean(0)).square().sum(1).argmax()]
        distances = (rest - farthest).square().sum(1).argsort()
        order.append(left[distances[:block]])
        left = left[distances[block:].sort().values]
    return torch.cat(order)


def exchanged(errors: BlockErrors, order: Tensor, cells: Sequence[Tensor]) -> Tensor:
    """An order with no greater an error. order: for each place, the channel there; cells: places with free exchange.

    Every place is compared with others of its cell and takes the best exchange, again and again, while many gain.
    """
    order, generator = order.clone(), torch.Generator().manual_seed(0)
    weights, inputs = errors.by_block(order)
    search = _Search(errors, order, weights, inputs, errors.of(weights, inputs))
    for _ in range(_SWEEPS):
        count = 0
        for cell in cells:
            for place in cell[torch.randperm(len(cell), generator=generator)].tolist():
                others = cell[torch.randperm(len(cell), generator=generator)[:_PARTNERS]]
                count += search.exchange(place, others[others // errors.block != place // errors.block])
        if count < _FEW * len(order):
            break
    return search.order


class _Search:
    """An order, what its blocks hold `[blocks, values, block]`, and what they lose `[blocks]`; changed in place."""

    def __init__(self, errors: BlockErrors, order: Tensor, weights: Tensor, inputs: Tensor, lost: Tensor) -> None:
        self.order, self._errors, self._held, self._lost = order, errors, (weights, inputs), lost
        self._least = _LEAST_GAIN * float(lost.sum())

    def exchange(self, place: int, others: Tensor) -> bool:
        """Exchange a place with the one of the others, all in other blocks, that gains most, if any gains."""
        if not len(others):
            return False
        here, column = divmod(place, self._errors.block)
        there, columns = others // self._errors.block, others % self._errors.block
        rows = torch.arange(len(others))
        after_here = [held[here].repeat(len(others), 1, 1) for held in self._held]
        after_there = [held[there] for held in self._held]
        for held, mine, theirs in zip(self._held, after_here, after_there, strict=True):
            mine[:, :, column] = held[there, :, columns]
            theirs[rows, :, columns] = held[here, :, column]
        lost_here, lost_there = self._errors.of(*after_here), self._errors.of(*after_there)
        gains = self._lost[here] + self._lost[there] - lost_here - lost_there
        best = int(gains.argmax())
        if gains[best] <= self._least:
            return False
        block, other = int(there[best]), int(others[best])
        for held, mine, theirs in zip(self._held, after_here, after_there, strict=True):
            held[here], held[block] = mine[best], theirs[best]
        self._lost[here], self._lost[block] = lost_here[best], lost_there[best]
        self.order[place], self.order[other] = int(self.order[other]), int(self.order[place])
        return True
