"""Histograms of a tensor's magnitudes by octave, four bins each.

MX scales are powers of two, so values are counted by octave. The bin is the exponent of the float32 and the first two
bits of its mantissa: counting is exact, covers every value, and needs no range in advance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_VALUES = 1 << 17


_SMALL, _NONFINITE, _BINS = 4, 1020, 1024
_SHIFT = 21  # keeps 8 exponent and 2 mantissa bits of a float32


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's values by magnitude.

    Bin b covers magnitudes from 2^(b // 4 - 127) (1 + b % 4 / 4) up to the start of bin b + 1; `counts[i]` belongs to
    bin `first + i`. zeros: includes magnitudes below 2^-126. nonfinite: Inf and NaN.
    """

    zeros: int
    nonfinite: int
    first: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor) -> "Histogram":
        """Count values `[..., size]`; of large tensors, evenly spaced rows with about 131072 values."""
        rows = values.detach().reshape(-1, values.shape[-1]) if values.dim() else values.detach().reshape(1, 1)
        rows = rows[:: max(1, rows.numel() // _VALUES)]
        bits = rows.float().contiguous().view(torch.int32) & 0x7FFFFFFF
        counts: list[int] = torch.bincount((bits >> _SHIFT).flatten(), minlength=_BINS).tolist()
        finite = counts[_SMALL:_NONFINITE]
        used = [index for index, count in enumerate(finite) if count]
        first, end = (used[0], used[-1] + 1) if used else (0, 0)
        return cls(sum(counts[:_SMALL]), sum(counts[_NONFINITE:]), _SMALL + first, tuple(finite[first:end]))


@dataclass(frozen=True)
class LayerHistograms:
    """The operands of a layer's matmul: its weight, its input in the float model, and that input as quantized.

    input: None if it does not depend on the model's inputs. rounded: None if the layer does not quantize its input.
    """

    weight: Histogram
    input: Histogram | None
    rounded: Histogram | None


@dataclass(frozen=True)
class HistogramChange:
    """The histograms of a layer before and after a pass."""

    before: LayerHistograms
    after: LayerHistograms
