"""Which channel factors of a scale group lose least: candidates tried with the quantizers in the loop.

The error of a choice s is that of the group's outputs over a sample of tokens,

    sum over matmuls of || Q_a(X / s) Q_w(W s)^T - X W^T ||^2      (tokens of great energy capped)

with the weight quantizer alone for weight-only formats (AWQ, Lin et al., arXiv 2306.00978, eq. 4) and with both if
activations are quantized too (AQAS, Lee et al., arXiv 2311.05161).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxcompile import reference
from mxcompile.analysis.groups import ScaleGroup
from mxcompile.formats import MXFormat, activation_rule
from mxcompile.importance import channel_importance, quantize_weighted, token_weights
from mxcompile.rows import row_wise

_SMALLEST = 1e-5
_LARGEST_RATIO = 2.0**10


@dataclass(frozen=True)
class Quantizers:
    """What weights and activations will be rounded to; activation None if they stay float."""

    weight: MXFormat
    activation: MXFormat | None

    def round_weight(self, rows: Tensor, importance: Tensor) -> Tensor:
        """A weight `[out, in]` as its MX values, with scales for inputs of that importance `[in]`."""

        def round_rows(part: Tensor) -> tuple[Tensor, ...]:
            codes, scales = quantize_weighted(part, importance, self.weight)
            return (reference.dequantize(codes, scales, self.weight, part.shape[-1], part.dtype),)

        return row_wise(round_rows, rows)[0]

    def round_input(self, x: Tensor) -> Tensor:
        """An input `[tokens, in]` as its MX values."""
        if self.activation is None:
            return x
        return reference.quantize_dequantize(x, self.activation, activation_rule(self.activation))


@dataclass(frozen=True)
class Operand:
    """A matmul of the group: sampled inputs `[tokens, in]`, weight `[out, in]`, factor numbers `[in]` (-1: none)."""

    inputs: Tensor
    weight: Tensor
    channels: Tensor


@dataclass(frozen=True)
class Found:
    """The best factors `[count]`, their error, and that of leaving the group as it is."""

    factors: Tensor
    error: float
    error_before: float


def search(group: ScaleGroup, operands: list[Operand], candidates: Iterator[Tensor], quantizers: Quantizers) -> Found:
    """Try all candidates; factors of 1 are always among them."""
    exact = [operand.inputs @ operand.weight.T for operand in operands]
    best = torch.ones(group.count)
    least = before = _error(operands, exact, best, quantizers)
    for factors in candidates:
        error = _error(operands, exact, factors, quantizers)
        if error < least:
            best, least = factors, error
    return Found(best, least, before)


def candidates(activation: Tensor, weight: Tensor, grid: int) -> Iterator[Tensor]:
    """Factors `[count]` from each factor's mean magnitudes in activations and weights.

    AWQ's x^a and x^a / w^(1-a), a on a grid in (0, 1].
    """
    activation, weight = activation.clamp(min=_SMALLEST), weight.clamp(min=_SMALLEST)
    for step in range(1, grid + 1):
        a = step / grid
        yield normalized(activation**a)
        yield normalized(activation**a / weight ** (1 - a))


def normalized(factors: Tensor) -> Tensor:
    """The factors over the geometric mean of their extremes, at most 2^10 apart."""
    factors = factors.clamp(min=_SMALLEST)
    factors = factors / (factors.max() * factors.min()).sqrt()
    return factors.clamp(_LARGEST_RATIO**-0.5, _LARGEST_RATIO**0.5)


def _error(operands: list[Operand], exact: list[Tensor], factors: Tensor, quantizers: Quantizers) -> float:
    padded = torch.cat((factors, torch.ones(1))).to(operands[0].weight.device)
    rounded: dict[tuple[int, int], Tensor] = {}
    total = 0.0
    for operand, wanted in zip(operands, exact, strict=True):
        scale = padded[operand.channels]
        key = (operand.inputs.data_ptr(), operand.channels.data_ptr())
        if key not in rounded:
            rounded[key] = quantizers.round_input(operand.inputs / scale)
        importance = channel_importance(operand.inputs) / scale.square()
        given = rounded[key] @ quantizers.round_weight(operand.weight * scale, importance).T
        total += ((given - wanted).square() * token_weights(operand.inputs)).sum().item()
    return total
