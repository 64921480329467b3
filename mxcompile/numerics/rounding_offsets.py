"""Where elements were before they were rounded, in a byte each: what training by small steps begins from.

offset = (w - q) / (distance of neighbouring elements around q), within half of it on both sides, in 254ths
"""

import torch
from torch import Tensor

from mxcompile.formats import SCALE_BIAS, MXFormat
from mxcompile.numerics import reference
from mxcompile.numerics.fast_rounding import steps

_PARTS = 254


def offsets_of(unrounded: Tensor, values: Tensor, scales: Tensor, fmt: MXFormat) -> Tensor:
    """Offsets, int8 `[out, in]`. unrounded, values: `[out, in]`; scales: E8M0 bytes `[out, blocks]`."""
    moved = (unrounded.float() - values.float()) / _distances(values, scales, fmt)
    return moved.mul_(_PARTS).round_().clamp_(-_PARTS // 2, _PARTS // 2).to(torch.int8)


def unrounded_by(offsets: Tensor, values: Tensor, scales: Tensor, fmt: MXFormat) -> Tensor:
    """What was rounded to these values, up to a 508th of a step: float32 `[out, in]`."""
    return torch.addcmul(values.float(), offsets.float(), _distances(values, scales, fmt), value=1 / _PARTS)


def _distances(values: Tensor, scales: Tensor, fmt: MXFormat) -> Tensor:
    """The distance of neighbouring elements around each value, `[out, in]`."""
    exponents = scales.to(torch.int32).unsqueeze(-1) - SCALE_BIAS
    codes = reference.to_blocks(values.float(), fmt) * reference.power_of_two(-exponents)
    distances = steps(codes, fmt) * reference.power_of_two(exponents)
    return distances.expand_as(codes).flatten(-2)[..., : values.shape[-1]]
