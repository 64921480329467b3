"""Search the channel factors of a scale group that minimize its quantization error: try candidates, keep the best.

The error of factors s is measured on the outputs of the group's matmuls for a sample of tokens X,

    sum over matmuls of || Q_a(X / s) Q_w(W s)^T - X W^T ||^2      (the weight of high-energy tokens is capped)

with Q_w alone for weight-only formats (AWQ, Lin et al., arXiv 2306.00978, eq. 4) and with both quantizers if
activations are quantized too (AQAS, Lee et al., arXiv 2311.05161). Q_w chooses scales as `round-weights` does, by the
importance of the input channels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.ranks.exchange import ALONE, Ranks
from mxcompile.numerics.importance import token_weights

_SMALLEST = 1e-5
_LARGEST_RATIO = 2.0**10


class Objective(Enum):
    """Where the error of factors is measured: on the outputs of the group's matmuls, or of the segment around them."""

    OUTPUT = "output"
    BLOCK = "block"


@dataclass(frozen=True)
class Operand:
    """An input value of the group, and the weights of all matmuls that read it.

    inputs: sampled tokens `[tokens, in]`. importance: mean square of each channel `[in]`. weights: those of its
    matmuls, each `[out, in]`; converted to float32 by `convert` one at a time, each time they are used. channels: index
    of each channel's factor `[in]`, -1 for none.
    """

    inputs: Tensor
    importance: Tensor
    weights: Sequence[Tensor]
    channels: Tensor
    convert: Callable[[Tensor], Tensor] = Tensor.float

    def outputs(self, inputs: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        """Inputs `[tokens, in]` times all weights, after `rounded`: `[tokens, out]`."""
        result = inputs.new_empty(len(inputs), sum(map(len, self.weights)))
        start = 0
        for weight in self.weights:
            torch.mm(inputs, rounded(self.convert(weight)).T, out=result[:, start : start + len(weight)])
            start += len(weight)
        return result


@dataclass(frozen=True)
class FactorSearchResult:
    """The best factors `[count]`, their error, and the error of factors of 1."""

    factors: Tensor
    error: float
    error_before: float


def search_factors(
    candidates: Iterable[Tensor],
    error: Callable[[Tensor], float],
    count: int,
    ranks: Ranks = ALONE,
    of_own_batches: bool = False,
) -> FactorSearchResult:
    """The candidate `[count]` with the least error; factors of 1 are always tried.

    ranks: processes that try some candidates each. of_own_batches: the error is that of a process's own batches, so
    each tries all candidates, and their errors are summed.
    """
    every = [torch.ones(count, dtype=torch.float32), *candidates]
    if of_own_batches:
        summed = torch.tensor(list(map(error, every)), dtype=torch.float64)
        ranks.sum(summed)
        errors = summed.tolist()
    else:
        errors = ranks.map(error, every)
    best, least = every[0], errors[0]
    for factors, candidate_error in zip(every[1:], errors[1:], strict=True):
        if candidate_error < least:
            best, least = factors, candidate_error
    return FactorSearchResult(best, least, errors[0])


def output_error(operands: Iterable[Operand], quantizers: Quantizers) -> Callable[[Tensor], float]:
    """A function from factors `[count]` to the squared error of the outputs of all matmuls."""
    prepared = [(o, token_weights(o.inputs).sqrt(), o.outputs(o.inputs, lambda weight: weight)) for o in operands]

    def error(factors: Tensor) -> float:
        total = 0.0
        for operand, token_scale, expected in prepared:
            scale = per_channel(factors, operand.channels)
            importance = operand.importance / scale.square()
            rounded = partial(_round_scaled, quantizers, scale, importance)
            output = operand.outputs(quantizers.round_input(operand.inputs / scale), rounded)
            total += output.sub_(expected).mul_(token_scale).square_().sum().item()
        return total

    return error


def _round_scaled(quantizers: Quantizers, scale: Tensor, importance: Tensor, weight: Tensor) -> Tensor:
    return quantizers.round_weight(weight * scale, importance)


def per_channel(factors: Tensor, channels: Tensor) -> Tensor:
    """The factor of every channel `[in]`, 1 for a channel without one, on the device of `channels`."""
    return torch.cat((factors.to(channels.device), torch.ones(1, dtype=torch.float32, device=channels.device)))[
        channels
    ]


def power_candidates(activation: Tensor, weight: Tensor, grid: int, activation_alone: bool) -> Iterator[Tensor]:
    """Candidate factors `[count]` from the magnitudes of channels in activations (x) and weights (w), for a in (0, 1].

    x^a / w^(1-a) (SmoothQuant, Xiao et al., arXiv 2211.10438, eq. 4). activation_alone: also x^a (AWQ), which is the
    same at a = 1. grid: the number of values of a.
    """
    live = (activation > 0) & (weight > 0)
    activation, weight = activation.clamp(min=_SMALLEST), weight.clamp(min=_SMALLEST)
    for step in range(1, grid + 1):
        a = step / grid
        if activation_alone and step < grid:
            yield normalize_factors(activation**a, live)
        yield normalize_factors(activation**a / weight ** (1 - a), live)


def normalize_factors(factors: Tensor, live: Tensor | None = None) -> Tensor:
    """Factors divided by the geometric mean of their extremes, with a ratio of at most 2^10 between the extremes.

    live: the channels that have a factor to choose, `[count]`, bool; None: all. The others, which are zero in the
    calibration data or in all weights, get a factor of 1 and do not count.
    """
    factors = factors.clamp(min=_SMALLEST)
    live = torch.ones_like(factors, dtype=torch.bool) if live is None else live
    if not live.any():
        return torch.ones_like(factors)
    extremes = factors[live].max(), factors[live].min()
    factors = factors / (extremes[0] * extremes[1]).sqrt()
    return torch.where(live, factors.clamp(_LARGEST_RATIO**-0.5, _LARGEST_RATIO**0.5), 1.0)
