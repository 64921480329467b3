"""Histograms of a tensor's magnitudes by octave, four bins each.

MX scales are powers of two, so values are counted by octave. A float32's exponent and the first two bits of its
mantissa are such a bin: counting them is exact, takes any value, and needs no range to be known before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_VALUES = 1 << 17


_SMALL, _NONFINITE, _BINS = 4, 1020, 1024
_SHIFT = 21  # of a float32's bits: 8 of the exponent and 2 of the mantissa are left


@dataclass(frozen=True)
class Histogram:
    """How many of a tensor's values have which magnitude.

    Bin b holds magnitudes from 2^(b // 4 - 127) (1 + b % 4 / 4) up to where bin b + 1 begins; `counts[i]` is that of
    bin `first + i`. zeros: also what is smaller than 2^-126. nonfinite: Inf and NaN.
    """

    zeros: int
    nonfinite: int
    first: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor) -> "Histogram":
        """Count values `[..., size]`: evenly spaced rows of many, about 131072 values."""
        rows = values.detach().reshape(-1, values.shape[-1]) if values.dim() else values.detach().reshape(1, 1)
        rows = rows[:: max(1, rows.numel() // _VALUES)]
        bits = rows.float().contiguous().view(torch.int32) & 0x7FFFFFFF
        counts: list[int] = torch.bincount((bits >> _SHIFT).flatten(), minlength=_BINS).tolist()
        finite = counts[_SMALL:_NONFINITE]
        used = [index for index, count in enumerate(finite) if count]
        first, end = (used[0], used[-1] + 1) if used else (0, 0)
        return cls(sum(counts[:_SMALL]), sum(counts[_NONFINITE:]), _SMALL + first, tuple(finite[first:end]))


@dataclass(frozen=True)
class Values:
    """What a layer multiplies: its weight, its input in the float model, and that input rounded, if the layer does so.

    input is None if it does not depend on the model's inputs.
    """

    weight: Histogram
    input: Histogram | None
    rounded: Histogram | None


@dataclass(frozen=True)
class Distribution:
    """The values of a layer before and after a pass."""

    before: Values
    after: Values
