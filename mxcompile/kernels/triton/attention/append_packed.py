"""A token's key or value is rotated (RoPE on halves), rounded, packed and written to a cache, by a program of
`packed_attention_kernel.py`.

Bit for bit what `numerics.next_token.rotate`, `mx::quantize` and an index copy give: products of bfloat16 numbers are
exact in float32, so that a multiply-add rounds as the definition does. Elements that share bytes (`elements.py`) are
loaded as parts of a block.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.triton.elements import narrow, parts, power_of_two, widen
from mxcompile.kernels.triton.quantize import _round_magnitude, _scale_exponent, fraction_limit
from mxcompile.kernels.triton.reductions import maximum


@cache
def append_constants(fmt: MXFormat, size: int, rule: ScaleRule, dtype: torch.dtype) -> tuple[Any, ...]:
    """SIDE: block, parts, bits; sizes; then the arguments of `round_magnitude` and `scale_exponent`, and factors."""
    largest = int(torch.finfo(dtype).max).bit_length() - 1
    factor = 2.0**fmt.mantissa_bits if fmt.is_integer else 2.0 ** -(126 + fmt.emin)
    blocks = fmt.blocks(size)
    layout = (fmt.block_size, parts(fmt), fmt.bits, fmt.block_bytes, blocks, triton.next_power_of_2(blocks), size)
    numbers = (fmt.exponent_bits, fmt.mantissa_bits, fmt.emin, fmt.emax, fmt.max_value)
    return (*layout, *numbers, fraction_limit(fmt, rule), largest, factor)


@triton.jit
def _load_part(pointer, rotation, part: tl.constexpr, SIDE: tl.constexpr, ROTATE: tl.constexpr):
    """Bits of float32 `[blocks, lanes]` of one part of all blocks, rotated and rounded to their dtype."""
    WIDTH: tl.constexpr = SIDE[0] // SIDE[1]
    SIZE: tl.constexpr = SIDE[6]
    element = tl.arange(0, SIDE[5])[:, None] * SIDE[0] + part * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = element < SIZE
    x = tl.load(pointer + element, mask=inside, other=0.0)
    wide = widen(x)
    if ROTATE:
        first = element < SIZE // 2
        other = widen(
            tl.load(pointer + tl.where(first, element + SIZE // 2, element - SIZE // 2), mask=inside, other=0)
        )
        cos = widen(tl.load(rotation[0] + element, mask=inside, other=0))
        sin = widen(tl.load(rotation[1] + element, mask=inside, other=0))
        wide = widen(narrow(wide * cos + other * tl.where(first, -sin, sin), x.dtype))
    return wide.to(tl.int32, bitcast=True)


@triton.jit
def _codes(bits, amax, exponent, SIDE: tl.constexpr):
    """Codes of values (bits of float32), as `reference.encode` gives them; zero in a block that is not finite."""
    magnitude = bits & 0x7FFFFFFF
    v = magnitude.to(tl.float32, bitcast=True) * power_of_two(-exponent)
    v = _round_magnitude(v, SIDE[7], SIDE[8], SIDE[9], SIDE[11]) * SIDE[14]
    if SIDE[7] == 0:
        number = v.to(tl.int32)
        code = tl.where(bits < 0, -number, number) & (2 ** SIDE[2] - 1)
    else:
        code = (v.to(tl.int32, bitcast=True) >> (23 - SIDE[8])) | ((bits >> 31) & 1) << (SIDE[2] - 1)
    return tl.where(amax >= 0x7F800000, 0, code)


@triton.jit
def append_state(pointer, rotation, elements, scales, inside, SIDE: tl.constexpr, ROTATE: tl.constexpr):
    """Round and pack a row, and store its elements and scales where `inside`."""
    PARTS: tl.constexpr = SIDE[1]
    WIDTH: tl.constexpr = SIDE[0] // SIDE[1]
    p0 = _load_part(pointer, rotation, 0, SIDE, ROTATE)
    p1, p2, p3 = p0, p0, p0
    if PARTS > 1:
        p1 = _load_part(pointer, rotation, 1, SIDE, ROTATE)
    if PARTS > 2:
        p2 = _load_part(pointer, rotation, 2, SIDE, ROTATE)
        p3 = _load_part(pointer, rotation, 3, SIDE, ROTATE)
    largest = tl.maximum(tl.maximum(p0 & 0x7FFFFFFF, p1 & 0x7FFFFFFF), tl.maximum(p2 & 0x7FFFFFFF, p3 & 0x7FFFFFFF))
    amax = tl.expand_dims(tl.reduce(largest, 1, maximum), 1)
    exponent = _scale_exponent(amax, SIDE[10], SIDE[12], SIDE[13])
    exponent = tl.where(amax == 0, -1 - SIDE[10], exponent)  # as the reference has it
    c0 = _codes(p0, amax, exponent, SIDE)
    block, lane = tl.arange(0, SIDE[5])[:, None], tl.arange(0, WIDTH)[None, :]
    exists = inside & (block < SIDE[4])
    stored = exists & (lane >= 0)
    pointers = elements + block * SIDE[3] + lane
    if PARTS == 1:
        tl.store(pointers, c0.to(tl.uint8), mask=stored)
    elif PARTS == 2:
        c1 = _codes(p1, amax, exponent, SIDE)
        tl.store(pointers, (c0 | (c1 << 4)).to(tl.uint8), mask=stored)
    else:
        c1 = _codes(p1, amax, exponent, SIDE)
        c2 = _codes(p2, amax, exponent, SIDE)
        c3 = _codes(p3, amax, exponent, SIDE)
        pairs = (c0 >> 4) | ((c1 >> 4) << 2) | ((c2 >> 4) << 4) | ((c3 >> 4) << 6)
        tl.store(pointers, ((c0 & 15) | ((c2 & 15) << 4)).to(tl.uint8), mask=stored)
        tl.store(pointers + WIDTH, ((c1 & 15) | ((c3 & 15) << 4)).to(tl.uint8), mask=stored)
        tl.store(pointers + 2 * WIDTH, pairs.to(tl.uint8), mask=stored)
    bytes = tl.where(amax >= 0x7F800000, 255, exponent + 127)
    tl.store(scales + block, bytes.to(tl.uint8), mask=exists)
