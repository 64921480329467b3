"""Round to MX elements in few passes over memory, for searches and calibration, where rounding dominates the time.

`reference.py` remains the definition.
"""

import torch
from torch import Tensor

from mxcompile.formats import SCALE_BIAS, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.row_slices import row_wise

_EXPONENT_BITS = 0x7F800000
_MAGIC = 1.5 * 2.0**23


def round_steps_in_place(v: Tensor, fmt: MXFormat) -> Tensor:
    """Round finite float32 values, in units of `unit(fmt)`, to the nearest element: ties to even, saturating.

    Equals `reference.round_elements` except for the sign of zero, which is lost. Overwrites v.
    """
    if fmt.is_integer:
        largest = fmt.max_value * 2.0**fmt.mantissa_bits
        return v.round_().clamp_(-largest, largest)
    # Adding 1.5 * 2^23 steps leaves float32 no bits below one step, so the addition itself rounds as needed.
    magic = _power(v, fmt).mul_(_MAGIC * 2.0**-fmt.mantissa_bits)
    return v.add_(magic).sub_(magic).clamp_(-fmt.max_value, fmt.max_value)


def steps(v: Tensor, fmt: MXFormat) -> Tensor:
    """The distance of neighbouring elements around each of these float32 elements; one number for integers."""
    if fmt.is_integer:
        return torch.full((), unit(fmt), device=v.device)
    return _power(v, fmt).mul_(2.0**-fmt.mantissa_bits)


def _power(v: Tensor, fmt: MXFormat) -> Tensor:
    """The power of two at or below each |v|, within the format's normal elements."""
    power = (v.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return power.clamp_(2.0**fmt.emin, 2.0**fmt.emax)


def unit(fmt: MXFormat) -> float:
    """The step between integer elements; 1 for floating-point formats, whose steps vary."""
    return 2.0**-fmt.mantissa_bits if fmt.is_integer else 1.0


def in_steps(values: Tensor, exponent: Tensor, fmt: MXFormat, *, unseen: bool = False) -> Tensor:
    """Float32 values divided by a scale 2^exponent and the format's unit: what `round_steps_in_place` rounds.

    Divided one after the other where the two together are beyond float32, for scales near 2^-127. unseen: always, which
    needs no look at the exponents; only values that are far below a step, which round to zero, may differ.
    """
    up = reference.power_of_two(-exponent)
    if unseen or (exponent.numel() and int(exponent.min()) < fmt.mantissa_bits - SCALE_BIAS + 1):
        return values * up * (1 / unit(fmt))
    return values * (up * (1 / unit(fmt)))


def quantize_dequantize(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """`reference.quantize_dequantize`, bit for bit (the payload of a NaN excepted), a few rows at a time."""
    if rule is ScaleRule.MSE or not x.numel():
        return reference.quantize_dequantize(x, fmt, rule)
    largest = reference.largest_exponent(x.dtype)

    def convert(rows: Tensor) -> tuple[Tensor]:
        blocks = reference.to_blocks(rows.float(), fmt)
        amax = blocks.abs().amax(-1, keepdim=True)
        finite = torch.isfinite(amax)
        exponent = reference.scale_exponents(torch.where(finite, amax, 0.0), fmt, rule, largest)
        v = blocks * reference.power_of_two(-exponent)
        v = round_steps_in_place(v.mul_(1 / unit(fmt)), fmt).add_(0.0) if fmt.is_integer else _signed(v, fmt)
        up = torch.where(finite, reference.power_of_two(exponent) * unit(fmt), torch.nan)
        return (v.mul_(up).flatten(-2)[..., : rows.shape[-1]].to(rows.dtype),)

    return row_wise(convert, x.unsqueeze(0))[0].squeeze(0)


def _signed(v: Tensor, fmt: MXFormat) -> Tensor:
    """Rounded floating-point elements that keep the sign of zero."""
    return round_steps_in_place(v.clone(), fmt).copysign_(v)
