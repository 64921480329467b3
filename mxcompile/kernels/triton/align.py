"""x -> e4m3 elements with one power of two per token, the input of the FP8 matmul (gluon/fp8_linear.py), or the values.

    power[m] = 2**(floor(log2(max |x[m]|)) - 7)        aligned[m] = e4m3(x[m] / power[m])

x may be quantized to an MX format in the same kernel. Elements of MXFP4, MXINT4 and MXFP6 have no more significant bits
than e4m3, so they are exact unless they are small: below 2**-13 (integers: 2**-14) of the largest of their token they
are rounded to multiples of 2**-16 of it, the smallest step of e4m3.

Elements of MXFP8 E4M3 lose more, and are aligned only where the model asks for it: `reference.align` of the rounded
values. Rounding can raise the largest of a token to the next power of two; for MXFP8 the power follows the rounded one.
"""

# ruff: noqa: N803  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

import math
from functools import lru_cache
from typing import Any, Final, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxcompile.formats import MXFP8_E4M3, MXFormat, ScaleRule
from mxcompile.kernels.triton.elements import narrow, power_of_two, unsupported_device, unsupported_dtype, widen
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.quantize import _round_magnitude, _scale_exponent, fraction_limit
from mxcompile.kernels.triton.reductions import maximum
from mxcompile.numerics.reference import ALIGNED_TOP_EXPONENT

_MOST_COLUMNS: Final = 4096
_TOP = tl.constexpr(ALIGNED_TOP_EXPONENT)
_E4M3 = tl.constexpr((4, 3, -6, 448.0))
Rounding: TypeAlias = tuple[MXFormat, ScaleRule]


def supports(x: Tensor, rounding: Rounding | None = None) -> str | None:
    """None if `align` and `values` support the call, else the reason."""
    if rounding is not None and rounding[1] is ScaleRule.MSE:
        return "scale rule mse searches exponents, which the kernel does not do"
    return unsupported_device(x) or unsupported_dtype(x.dtype)


def align(x: Tensor, rounding: Rounding | None = None) -> tuple[Tensor, Tensor]:
    """x `[..., size]` to e4m3 `[tokens, size]` and powers `[tokens]` in float32, in one launch.

    The power of a token that holds Inf or NaN is NaN.
    """
    rows, size = math.prod(x.shape[:-1]), x.shape[-1]
    aligned = torch.empty((rows, size), dtype=torch.float8_e4m3fn, device=x.device)
    powers = torch.empty(rows, dtype=torch.float32, device=x.device)
    _launch(x, aligned, powers, rounding)
    return aligned, powers


def values(x: Tensor, rounding: Rounding | None = None) -> Tensor:
    """The aligned values in the shape and dtype of x: `reference.align(x)`, bit for bit (except for NaN payloads).

    rounding: if given, x is quantized to that MXFP8 E4M3 first. Only for calls that `supports` accepts.
    """
    aligned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, aligned, None, rounding)
    return aligned


def _launch(x: Tensor, aligned: Tensor, powers: Tensor | None, rounding: Rounding | None) -> None:
    rows, size = math.prod(x.shape[:-1]), x.shape[-1]
    if not rows:
        return
    x = x if x.dim() == 2 else x.reshape(rows, size)
    constants = _constants(rounding, x.dtype, size, _MOST_COLUMNS)
    launch(_align_kernel, rows, x, aligned, powers, size, *x.stride(), **constants)


@lru_cache(maxsize=4096)
def _constants(rounding: Rounding | None, dtype: torch.dtype, size: int, most_columns: int) -> dict[str, Any]:
    """The constexpr arguments of the kernel, and compiler options."""
    block = 32 if rounding is None else rounding[0].block_size
    columns = max(block, min(most_columns, triton.next_power_of_2(size)))
    shared = {
        "BLOCK": block,
        "BLOCKS": columns // block,
        "WHOLE": columns >= size,
        "num_warps": max(1, columns // 1024),
        "enable_fp_fusion": False,
    }
    if rounding is None:
        return {"ROUNDING": None, "ALIGN_ROUNDED": False, **shared}
    fmt, rule = rounding
    limit, largest = fraction_limit(fmt, rule), int(torch.finfo(dtype).max).bit_length() - 1
    scaled = (fmt.exponent_bits, fmt.mantissa_bits, fmt.emin, fmt.emax, fmt.max_value, limit, largest)
    return {"ROUNDING": scaled, "ALIGN_ROUNDED": fmt.name == MXFP8_E4M3.name, **shared}


@triton.jit
def _align_kernel(
    x,
    aligned,
    powers,
    size,
    x_stride_row,
    x_stride_column,
    ROUNDING: tl.constexpr,
    ALIGN_ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride_row
    aligned += row * size
    lane = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = _load(x, lane, size, x_stride_column)
    largest = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not WHOLE:
        for first in range(BLOCKS * BLOCK, size, BLOCKS * BLOCK):
            values_behind = _load(x, first + lane, size, x_stride_column)
            largest = tl.maximum(largest, values_behind.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    amax = tl.reduce(tl.reduce(largest, 1, maximum), 0, maximum)
    largest_bits = amax
    if ALIGN_ROUNDED:
        # Rounding is monotonic, also across blocks, so the largest value stays the largest.
        largest_bits = _rounded_magnitude(amax, amax, ROUNDING).to(tl.int32, bitcast=True)
    # A rounded value may reach the next power of two; 2**8 is still below the maximum of e4m3, 448.
    exponent = tl.maximum((largest_bits >> 23) - 127 - _TOP, -127)
    power = tl.where(amax >= 0x7F800000, float("nan"), power_of_two(exponent))
    if powers is not None:
        tl.store(powers + row, power)
    _store(aligned, values, lane, size, exponent, power, ROUNDING)
    if not WHOLE:
        for first in range(BLOCKS * BLOCK, size, BLOCKS * BLOCK):
            values_behind = _load(x, first + lane, size, x_stride_column)
            _store(aligned, values_behind, first + lane, size, exponent, power, ROUNDING)


@triton.jit
def _load(x, column, size, stride):
    return widen(tl.load(x + column.to(tl.int64) * stride, mask=column < size, other=0.0))


@triton.jit
def _store(aligned, values, column, size, exponent, power, ROUNDING: tl.constexpr):
    if ROUNDING is not None:
        values = _rounded(values, ROUNDING)
    scaled = values * power_of_two(-exponent)
    if aligned.dtype.element_ty == tl.float8e4nv:
        tl.store(aligned + column, scaled.to(tl.float8e4nv), mask=column < size)
    else:
        bits = scaled.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        nearest = magnitude.to(tl.float32, bitcast=True)
        nearest = _round_magnitude(nearest, _E4M3[0], _E4M3[1], _E4M3[2], _E4M3[3]) * power
        signed = (nearest.to(tl.int32, bitcast=True) | (bits ^ magnitude)).to(tl.float32, bitcast=True)
        tl.store(aligned + column, narrow(signed, aligned.dtype.element_ty), mask=column < size)


@triton.jit
def _rounded(values, ROUNDING: tl.constexpr):
    """Quantize-dequantize blocks `[n, block]` in float32 as triton/quantize.py does, except for Inf and NaN."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    amax = tl.expand_dims(tl.reduce(magnitude, 1, maximum), 1)
    v = _rounded_magnitude(magnitude, amax, ROUNDING)
    return (v.to(tl.int32, bitcast=True) | (bits ^ magnitude)).to(tl.float32, bitcast=True)


@triton.jit
def _rounded_magnitude(magnitude, amax, ROUNDING: tl.constexpr):
    """Bits of magnitudes to float32, rounded with the scale of their block's maximum `amax`."""
    exponent = _scale_exponent(amax, ROUNDING[3], ROUNDING[5], ROUNDING[6])
    v = magnitude.to(tl.float32, bitcast=True) * power_of_two(-exponent)
    return _round_magnitude(v, ROUNDING[0], ROUNDING[1], ROUNDING[2], ROUNDING[4]) * power_of_two(exponent)
