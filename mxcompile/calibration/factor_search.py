"""Which channel factors of a scale group lose least: candidates tried with the quantizers in the loop.

The error of a choice s is that of the group's outputs over a sample of tokens,

    sum over matmuls of || Q_a(X / s) Q_w(W s)^T - X W^T ||^2      (tokens of great energy capped)

with the weight quantizer alone for weight-only formats (AWQ, Lin et al., arXiv 2306.00978, eq. 4) and with both if
activations are quantized too (AQAS, Lee et al., arXiv 2311.05161). Weights are tried with the scales that
`round-weights` will give them, chosen by the importance of their input channels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mxcompile.calibration.quantizers import Quantizers
from mxcompile.numerics.importance import token_weights

_SMALLEST = 1e-5
_LARGEST_RATIO = 2.0**10


class Objective(Enum):
    """What factors are scored on: the outputs of the group's matmuls, or what the segment around them gives on."""

    OUTPUT = "output"
    BLOCK = "block"


@dataclass(frozen=True)
class Operand:
    """An input value of the group and the weights it meets.

    inputs: a sample of it `[tokens, in]`. importance: mean square of its channels `[in]`. weight: of all its matmuls,
    `[out, in]`. channels: the number of the factor of each channel `[in]`, -1 for none.
    """

    inputs: Tensor
    importance: Tensor
    weight: Tensor
    channels: Tensor


@dataclass(frozen=True)
class FactorSearchResult:
    """The best factors `[count]`, their error, and that of leaving the group as it is."""

    factors: Tensor
    error: float
    error_before: float


def search_factors(candidates: Iterable[Tensor], error: Callable[[Tensor], float], count: int) -> FactorSearchResult:
    """The candidate `[count]` of least error; factors of 1 are always among them."""
    best = torch.ones(count)
    least = before = error(best)
    for factors in candidates:
        found = error(factors)
        if found < least:
            best, least = factors, found
    return FactorSearchResult(best, least, before)


def output_error(operands: Iterable[Operand], quantizers: Quantizers) -> Callable[[Tensor], float]:
    """Squared error of the outputs of all matmuls, as a function of the factors `[count]`."""
    prepared = [(o, token_weights(o.inputs).sqrt(), o.inputs @ o.weight.T) for o in operands]

    def error(factors: Tensor) -> float:
        total = 0.0
        for operand, counts, wanted in prepared:
            scale = per_channel(factors, operand.channels)
            weight = quantizers.round_weight(operand.weight * scale, operand.importance / scale.square())
            given = quantizers.round_input(operand.inputs / scale) @ weight.T
            total += given.sub_(wanted).mul_(counts).square_().sum().item()
        return total

    return error


def per_channel(factors: Tensor, channels: Tensor) -> Tensor:
    """The factor of every channel `[in]`, 1 where it has none, on the channels' device."""
    return torch.cat((factors.to(channels.device), torch.ones(1, device=channels.device)))[channels]


def power_candidates(activation: Tensor, weight: Tensor, grid: int, activation_alone: bool) -> Iterator[Tensor]:
    """Factors `[count]` from a magnitude of each channel in activations and weights, a on a grid in (0, 1].

    x^a / w^(1-a) (SmoothQuant, Xiao et al., arXiv 2211.10438, eq. 4) and, if asked for, x^a (AWQ); at 1 they are one.
    """
    activation, weight = activation.clamp(min=_SMALLEST), weight.clamp(min=_SMALLEST)
    for step in range(1, grid + 1):
        a = step / grid
        if activation_alone and step < grid:
            yield normalize_factors(activation**a)
        yield normalize_factors(activation**a / weight ** (1 - a))


def normalize_factors(factors: Tensor) -> Tensor:
    """The factors over the geometric mean of their extremes, at most 2^10 apart."""
    factors = factors.clamp(min=_SMALLEST)
    factors = factors / (factors.max() * factors.min()).sqrt()
    return factors.clamp(_LARGEST_RATIO**-0.5, _LARGEST_RATIO**0.5)
