"""Rounding to MX elements in few passes over memory, for searches that round the same weights many times.

The same values as `reference.round_elements`, which stays the definition; only the sign of a zero is not kept.
"""

import torch
from torch import Tensor

from mxcompile.formats import MXFormat

_EXPONENT_BITS = 0x7F800000
_MAGIC = 1.5 * 2.0**23


def round_steps_in_place(v: Tensor, fmt: MXFormat) -> Tensor:
    """Finite float32 values, in `unit(fmt)`s, to the nearest elements, ties to even, saturating; overwrites v."""
    if fmt.is_integer:
        largest = fmt.max_value * 2.0**fmt.mantissa_bits
        return v.round_().clamp_(-largest, largest)
    # Adding 1.5 * 2^23 steps leaves float32 no bits below one step: its own rounding is the one wanted.
    power = (v.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    magic = power.clamp_(2.0**fmt.emin, 2.0**fmt.emax).mul_(_MAGIC * 2.0**-fmt.mantissa_bits)
    return v.add_(magic).sub_(magic).clamp_(-fmt.max_value, fmt.max_value)


def unit(fmt: MXFormat) -> float:
    """The step between integer elements; 1 for floating ones, whose steps differ."""
    return 2.0**-fmt.mantissa_bits if fmt.is_integer else 1.0
