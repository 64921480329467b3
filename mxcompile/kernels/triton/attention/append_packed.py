"""A token's query and key are rotated (RoPE on halves), its key and value rounded, packed and written to a cache.

In one launch, and bit for bit what `numerics.next_token.rotate`, `mx::quantize` and an index copy give. A program
handles the key, the value, or the queries of one KV head. Elements that share bytes (`elements.py`) are loaded as parts
of a block.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, ScaleRule, why_no_kernel
from mxcompile.kernels.triton.attention.one_token_kernel import load_rotated
from mxcompile.kernels.triton.elements import (
    narrow,
    parts,
    power_of_two,
    starts_early,
    unsupported_device,
    widen,
)
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.quantize import _round_magnitude, _scale_exponent, fraction_limit
from mxcompile.kernels.triton.reductions import maximum
from mxcompile.numerics.packed_attention import PackedStates

Rotation = tuple[Tensor, Tensor]


def supports(query: Tensor, states: PackedStates, rule: ScaleRule) -> str | None:
    """None if `append` writes such states, else the reason."""
    if rule is ScaleRule.MSE:
        return "scale rule mse searches exponents, which the kernel does not do"
    return why_no_kernel(states.fmt) or unsupported_device(query)


def append(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    states: tuple[PackedStates, PackedStates],
    rules: tuple[ScaleRule, ScaleRule],
    position: Tensor,
    rotation: Rotation | None,
) -> Tensor:
    """Write a key and a value, `[batch, kv_heads, 1, size]`, to packed ones at `position`, one int64, in place; nothing
    where that is outside. Returns the query `[batch, heads, 1, size]`, rotated.

    rotation: cos and sin `[batch or 1, 1, 1, size]`, for queries and keys.
    """
    (batch, heads, _, size), kv_heads = query.shape, new[0].shape[1]
    _check(query, new, states, position, rotation)
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, *new))
    turned = query if rotation is None else torch.empty((batch, heads, 1, size), dtype=query.dtype, device=query.device)
    cos, sin = (query, query) if rotation is None else (part.contiguous() for part in rotation)
    steps = [0 if rotation is None or part.shape[0] == 1 else part.stride(0) for part in (cos, sin)]
    tensors = [part for side in states for part in (side.elements, side.scales)]
    launch(
        _append_kernel,
        (batch * kv_heads, 2 if rotation is None else 3),
        query,
        (key, value),
        (cos, sin),
        position,
        tuple(tensors),
        turned,
        states[0].elements.shape[2],
        (query.stride(0), query.stride(1)),
        (*key.stride()[:2], *value.stride()[:2], *steps),
        *(tuple(part.stride(i) for part in tensors) for i in range(3)),
        KEY=_constants(states[0].fmt, states[0].size, rules[0], key.dtype),
        VALUE=_constants(states[1].fmt, states[1].size, rules[1], value.dtype),
        HEADS=(kv_heads, heads // kv_heads, triton.next_power_of_2(heads // kv_heads)),
        LANES=triton.next_power_of_2(size),
        ROTATE=rotation is not None,
        DEPENDENT=(dependent := starts_early(query)),
        INTERPRETED=not query.is_cuda,
        num_warps=1,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if dependent else {}),
    )
    return turned


def _check(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    states: tuple[PackedStates, PackedStates],
    position: Tensor,
    rotation: Rotation | None,
) -> None:
    for part, side in zip(new, states, strict=True):
        batch, kv_heads, _, _ = side.elements.shape
        fits = part.shape == (batch, kv_heads, 1, side.size) and side.elements.stride(3) == side.scales.stride(3) == 1
        if not fits:
            raise MXCompileError(f"a new token's {[*part.shape]} cannot be written to {[*side.elements.shape]}")
    sizes = [(n, 1, 1, query.shape[3]) for n in (1, query.shape[0])]
    if position.numel() != 1 or any(part.shape not in sizes for part in rotation or ()):
        raise MXCompileError(f"cos and sin of {[*query.shape]} are {sizes[0]} or {sizes[1]}, the position one number")


@cache
def _constants(fmt: MXFormat, size: int, rule: ScaleRule, dtype: torch.dtype) -> tuple[Any, ...]:
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
def _append_state(pointer, rotation, elements, scales, inside, SIDE: tl.constexpr, ROTATE: tl.constexpr):
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


@triton.jit(do_not_specialize=["tokens"])
def _append_kernel(
    query,
    new,
    rotation,
    position,
    states,
    turned,
    tokens,
    query_strides,
    new_strides,
    batch_strides,
    head_strides,
    strides,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    ROTATE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Axis 0 numbers batch entries and KV heads; axis 1: the key, the value, and the queries. HEADS: KV heads, query
    heads that share one, and the power of two above."""
    batch = (tl.program_id(0) // HEADS[0]).to(tl.int64)
    kv_head = (tl.program_id(0) % HEADS[0]).to(tl.int64)
    rotation = (rotation[0] + batch * new_strides[4], rotation[1] + batch * new_strides[5])
    if DEPENDENT:  # attention can start now: it prefetches, and waits for this kernel, which waits for the one before
        gdc_launch_dependents()
        gdc_wait()
    place = tl.load(position).to(tl.int64)
    one = tl.arange(0, 1)
    inside = ((place + one >= 0) & (place + one < tokens))[:, None]
    if tl.program_id(1) == 0:
        elements = states[0] + batch * batch_strides[0] + kv_head * head_strides[0] + place * strides[0]
        scales = states[1] + batch * batch_strides[1] + kv_head * head_strides[1] + place * strides[1]
        key = new[0] + batch * new_strides[0] + kv_head * new_strides[1]
        _append_state(key, rotation, elements, scales, inside, KEY, ROTATE)
    elif tl.program_id(1) == 1:
        elements = states[2] + batch * batch_strides[2] + kv_head * head_strides[2] + place * strides[2]
        scales = states[3] + batch * batch_strides[3] + kv_head * head_strides[3] + place * strides[3]
        value = new[1] + batch * new_strides[2] + kv_head * new_strides[3]
        _append_state(value, rotation, elements, scales, inside, VALUE, False)
    else:
        SIZE: tl.constexpr = KEY[6]
        row, lane = tl.arange(0, HEADS[2]), tl.arange(0, LANES)
        exists = row < HEADS[1]
        rows = query + batch * query_strides[0] + kv_head * HEADS[1] * query_strides[1]
        x = load_rotated(rows, row, query_strides[1], exists, rotation, SIZE, LANES, ROTATE, INTERPRETED)
        head = tl.program_id(0).to(tl.int64) * HEADS[1] + row
        into = turned + head[:, None] * SIZE + lane[None, :]
        tl.store(into, x, mask=exists[:, None] & (lane < SIZE)[None, :])
