"""x -> dequantize(quantize(x)) in one pass over memory, and packed weights -> values; bit for bit as reference.py.

A program processes a few whole blocks: the largest magnitude of each block (an integer maximum over float32 bit
patterns, which sort like the numbers, with Inf and NaN above all), the scale exponent from that bit pattern, then every
element.

Rounding to an element on a grid of step `s = 2**(e - mantissa_bits)` is `(v + c) - c` with `c = 1.5 * 2**23 * s`:
float32 numbers near `c` lie exactly `s` apart and `c / s` is even, so the addition rounds to the nearest multiple of
`s`, ties to even, for every `v < 2**22 * s` (here `v < 2**8 * s`), and the subtraction is exact. No compiler may
cancel the two (Triton sets no reassociation flag). Contracting the multiplication that produced `v` and the
addition into one FMA changes nothing either: the factor is a power of two, so the product is exact unless it underflows
below 2**-126, and then both round to zero.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

import math
from functools import cache
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, ScaleRule, why_no_kernel
from mxcompile.kernels.triton.elements import (
    decode,
    element_constants,
    element_offsets,
    load_codes,
    narrow,
    power_of_two,
    scale_value,
    unsupported_device,
    unsupported_dtype,
    widen,
)
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.reductions import maximum, plus

Rounding: TypeAlias = tuple[MXFormat, ScaleRule]
_TILE_VALUES = 2048
_WARPS = 4


def supports(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> str | None:
    """None if `quantize_dequantize` supports the call, else the reason. Every format of `FORMATS` is supported."""
    return _why_not(fmt, rule, x.dtype) or unsupported_device(x)


@cache
def _why_not(fmt: MXFormat, rule: ScaleRule, dtype: torch.dtype) -> str | None:
    try:
        rule.threshold(fmt)
    except MXCompileError as error:
        return str(error)
    return why_no_kernel(fmt) or unsupported_dtype(dtype)


def quantize_dequantize(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """Equals reference.quantize_dequantize bit for bit (except for NaN payloads), in one launch.

    x `[..., size]`, bfloat16, float16 or float32, any strides; the result has its shape and dtype and is contiguous.
    """
    return _by_block(x, None, fmt, rule)


def straight_through(gradient: Tensor, x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """Equals `numerics.straight_through.straight_through`, in one launch; contiguous, in the gradient's dtype."""
    return _by_block(x, gradient, fmt, rule)


def _by_block(x: Tensor, gradient: Tensor | None, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """Rounded values of x, or a gradient of these without its saturated elements."""
    dtype = x.dtype if gradient is None else gradient.dtype
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    size, tile = x.shape[-1], _TILE_VALUES // fmt.block_size
    x = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), size)
    blocks = fmt.blocks(size)
    total = x.shape[0] * blocks
    launch(
        _quantize_dequantize_kernel,
        -(-total // tile),
        x,
        None if gradient is None else gradient.contiguous(),
        y,
        total,
        blocks,
        size,
        *x.stride(),
        **_constants(fmt, rule, x.dtype),
    )
    return y


@cache
def _constants(fmt: MXFormat, rule: ScaleRule, dtype: torch.dtype) -> dict[str, Any]:
    """The constexpr arguments of the kernel, and compiler options."""
    return {
        "BLOCK": fmt.block_size,
        "EXPONENT_BITS": fmt.exponent_bits,
        "MANTISSA_BITS": fmt.mantissa_bits,
        "EMIN": fmt.emin,
        "EMAX": fmt.emax,
        "MAX_VALUE": fmt.max_value,
        "LIMIT": fraction_limit(fmt, rule),
        "LARGEST": int(torch.finfo(dtype).max).bit_length() - 1,
        "SEARCH": rule is ScaleRule.MSE,
        "TILE": _TILE_VALUES // fmt.block_size,
        "num_warps": _WARPS,
        "enable_fp_fusion": False,
    }


def why_not_decoded(elements: Tensor, fmt: MXFormat, dtype: torch.dtype) -> str | None:
    """None if `dequantize` supports the call, else the reason."""
    if fmt.aligned:
        return "values of an aligned format depend on a whole token"
    return why_no_kernel(fmt) or unsupported_dtype(dtype) or unsupported_device(elements)


def dequantize(elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, dtype: torch.dtype) -> Tensor:
    """Packed elements `[..., blocks * block_bytes]` and scales `[..., blocks]` to values `[..., size]` of `dtype`.

    Equals `reference.dequantize(unpack(elements), ...)` bit for bit (except for NaN payloads).
    """
    blocks = fmt.blocks(size)
    if scales.shape[-1] != blocks or elements.shape != (*scales.shape[:-1], blocks * fmt.block_bytes):
        raise MXCompileError(f"{fmt} values of size {size} cannot come from {elements.shape} and {scales.shape}")
    y = torch.empty((*scales.shape[:-1], size), dtype=dtype, device=scales.device)
    if y.numel() == 0:
        return y
    total, tile = scales.numel(), _TILE_VALUES // fmt.block_size
    launch(
        _dequantize_kernel,
        -(-total // tile),
        elements.contiguous(),
        scales.contiguous(),
        y,
        total,
        blocks,
        size,
        **element_constants(fmt),
        TILE=tile,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return y


def why_not_rounded(size: int, rounding: Rounding) -> str | None:
    """None if `rounded_rows` rounds rows of that size, else the reason."""
    fmt, rule = rounding
    if fmt.aligned:
        return "alignment is by whole tokens"
    if size % fmt.block_size:
        return f"rows of {size} values are no multiple of blocks of {fmt.block_size}"
    return "scale rule mse searches exponents" if rule is ScaleRule.MSE else why_no_kernel(fmt)


def rounding_constants(rounding: Rounding | None, dtype: torch.dtype) -> dict[str, Any]:
    """ROUNDING of `rounded_rows` for values of a dtype: None, or block size and arguments of `round_to_elements`."""
    if rounding is None:
        return {"ROUNDING": None}
    fmt, rule = rounding
    largest = int(torch.finfo(dtype).max).bit_length() - 1
    limits = (fmt.emin, fmt.emax, fmt.max_value, fraction_limit(fmt, rule), largest)
    return {"ROUNDING": (fmt.block_size, fmt.exponent_bits, fmt.mantissa_bits, *limits)}


def fraction_limit(fmt: MXFormat, rule: ScaleRule) -> int:
    """The largest 23-bit fraction of a block's maximum that does not raise the exponent (see ScaleRule.threshold)."""
    limit = int((rule.threshold(fmt) - 1) * 2**23)
    return limit - 1 if rule is ScaleRule.EVEN else limit


@triton.jit
def _scale_exponent(amax, EMAX: tl.constexpr, LIMIT: tl.constexpr, LARGEST: tl.constexpr):
    """reference.scale_exponents for the bit pattern of a block's largest magnitude (int32)."""
    # A subnormal of 2**-127 or more becomes exponent field 0 with its fraction in place. Smaller ones get field -1,
    # which the clamp turns into -127 whatever the true exponent.
    bits = tl.where(amax < 0x00800000, 2 * amax - 0x00800000, amax)
    beyond = ((bits & 0x007FFFFF) > LIMIT).to(tl.int32)
    exponent = (bits >> 23) - 127 - EMAX + beyond
    return tl.minimum(tl.maximum(exponent, -127), LARGEST - EMAX)


@triton.jit
def _round_magnitude(
    v, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, EMIN: tl.constexpr, MAX_VALUE: tl.constexpr
):
    """Round non-negative float32 below 2**(emax + 1) to the nearest element, ties to even, saturating."""
    if EXPONENT_BITS == 0:
        MAGIC: tl.constexpr = 1.5 * 2.0 ** (23 - MANTISSA_BITS)
        rounded = (v + MAGIC) - MAGIC
    else:
        field = tl.maximum(v.to(tl.int32, bitcast=True) >> 23, EMIN + 127)
        magic = (((field + (23 - MANTISSA_BITS)) << 23) | 0x00400000).to(tl.float32, bitcast=True)
        rounded = (v + magic) - magic
    return tl.minimum(rounded, MAX_VALUE)


@triton.jit
def _least_squares_exponent(
    magnitude,
    floor,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """reference._least_squares_exponent, with sums in its order. magnitude: float32 `[blocks, block_size]`."""
    v = magnitude * power_of_two(-floor)
    best = floor
    least = _squared_error(v, floor - floor, EXPONENT_BITS, MANTISSA_BITS, EMIN, MAX_VALUE)
    for index in tl.static_range(2):
        candidate = tl.minimum(tl.maximum(floor + (2 * index - 1), -127), LARGEST - EMAX)
        error = _squared_error(v, candidate - floor, EXPONENT_BITS, MANTISSA_BITS, EMIN, MAX_VALUE)
        best = tl.where(error < least, candidate, best)
        least = tl.minimum(error, least)
    return best


@triton.jit
def _squared_error(
    v,
    shift,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MAX_VALUE: tl.constexpr,
):
    """What each block `[blocks, 1]` loses in a scale that is 2**shift times as large as its unit."""
    rounded = _round_magnitude(v * power_of_two(-shift), EXPONENT_BITS, MANTISSA_BITS, EMIN, MAX_VALUE)
    error = rounded * power_of_two(shift) - v
    squares = error * error
    for halving in tl.static_range(7):
        if (v.shape[1] >> halving) > 1:  # one half plus the other
            parts = tl.reshape(squares, (v.shape[0], 2, v.shape[1] >> (halving + 1)))
            squares = tl.reduce(parts, 1, plus)
    return squares


@triton.jit
def round_to_elements(
    bits,
    amax,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    LIMIT: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Values, as bit patterns of float32, to float32: elements times the scale of their block.

    amax: the bit pattern of the block's largest magnitude, of a shape that broadcasts.
    """
    exponent = _scale_exponent(amax, EMAX, LIMIT, LARGEST)
    return _round_on_scale(bits, amax, exponent, EXPONENT_BITS, MANTISSA_BITS, EMIN, MAX_VALUE)


@triton.jit
def _round_on_scale(
    bits,
    amax,
    exponent,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MAX_VALUE: tl.constexpr,
):
    magnitude = bits & 0x7FFFFFFF
    v = magnitude.to(tl.float32, bitcast=True) * power_of_two(-exponent)
    v = _round_magnitude(v, EXPONENT_BITS, MANTISSA_BITS, EMIN, MAX_VALUE) * power_of_two(exponent)
    sign = bits ^ magnitude
    if EXPONENT_BITS == 0:
        sign = tl.where(v == 0.0, 0, sign)  # two's complement has one zero
    result = v.to(tl.int32, bitcast=True) | sign
    return tl.where(amax >= 0x7F800000, 0x7FC00000, result).to(tl.float32, bitcast=True)


@triton.jit
def rounded_rows(values, ROUNDING: tl.constexpr):
    """Float32 `[rows, columns]`, of whole blocks, to elements times the scales of their blocks."""
    bits = tl.reshape(values.to(tl.int32, bitcast=True), (values.shape[0], values.shape[1] // ROUNDING[0], ROUNDING[0]))
    amax = tl.expand_dims(tl.reduce(bits & 0x7FFFFFFF, 2, maximum), 2)
    result = round_to_elements(
        bits, amax, ROUNDING[1], ROUNDING[2], ROUNDING[3], ROUNDING[4], ROUNDING[5], ROUNDING[6], ROUNDING[7]
    )
    return tl.reshape(result, (values.shape[0], values.shape[1]))


@triton.jit(do_not_specialize=["total"])
def _quantize_dequantize_kernel(
    x,
    gradient,
    y,
    total,
    blocks,
    size,
    x_stride_row,
    x_stride_column,
    BLOCK: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    LIMIT: tl.constexpr,
    LARGEST: tl.constexpr,
    SEARCH: tl.constexpr,
    TILE: tl.constexpr,
):
    # Indices have the integer width that the number of blocks needs.
    index = tl.program_id(0).to(total.dtype) * TILE + tl.arange(0, TILE)
    row = (index // blocks).to(tl.int64)[:, None]
    column = (index % blocks)[:, None].to(tl.int32) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (index < total)[:, None] & (column < size)
    pointers = x + row * x_stride_row + column.to(tl.int64) * x_stride_column
    values = widen(tl.load(pointers, mask=inside, other=0.0))
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    amax = tl.expand_dims(tl.reduce(magnitude, 1, maximum), 1)
    exponent = _scale_exponent(amax, EMAX, LIMIT, LARGEST)
    numbers = tl.where(amax >= 0x7F800000, 0, magnitude).to(tl.float32, bitcast=True)
    if SEARCH:
        exponent = _least_squares_exponent(
            numbers, exponent, EXPONENT_BITS, MANTISSA_BITS, EMIN, EMAX, MAX_VALUE, LARGEST
        )
    to = row * size + column
    if gradient is None:
        result = _round_on_scale(bits, amax, exponent, EXPONENT_BITS, MANTISSA_BITS, EMIN, MAX_VALUE)
        tl.store(y + to, narrow(result, y.dtype.element_ty), mask=inside)
    else:
        passed = widen(tl.load(gradient + to, mask=inside, other=0.0))
        saturated = numbers * power_of_two(-exponent) > MAX_VALUE
        tl.store(y + to, narrow(tl.where(saturated, 0.0, passed), y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["total"])
def _dequantize_kernel(
    elements,
    scales,
    y,
    total,
    blocks,
    size,
    BITS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MAX_CODE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK // PARTS
    index = tl.program_id(0).to(total.dtype) * TILE + tl.arange(0, TILE)
    row = (index // blocks).to(tl.int64)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    first = (index % blocks)[:, None].to(tl.int32) * BLOCK + lane
    scale = scale_value(tl.load(scales + index, mask=index < total, other=0))[:, None]
    pointers = elements + element_offsets(index[:, None].to(tl.int64) * WIDTH + lane, BITS, WIDTH)
    inside = (index < total)[:, None] & (lane < WIDTH)
    for part in tl.static_range(PARTS):
        codes = load_codes(pointers, inside, part, BITS, WIDTH)
        values = decode(codes, BITS, EXPONENT_BITS, MANTISSA_BITS, EMIN, MAX_CODE) * scale
        column = first + part * WIDTH
        tl.store(y + row * size + column, narrow(values, y.dtype.element_ty), mask=inside & (column < size))
