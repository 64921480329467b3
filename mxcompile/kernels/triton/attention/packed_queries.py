"""Queries as the left operand of attention over packed keys: part of `packed_attention_kernel.py`, which says what its
rows are.
"""

# ruff: noqa: N803, N806, RUF005  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton
import triton.language as tl

from mxcompile.kernels.triton.attention.packed_states import element_of
from mxcompile.kernels.triton.elements import narrow, widen
from mxcompile.kernels.triton.reductions import maximum, plus

# A value that nothing moves past: loads before it are all on their way when it is needed.
KEPT: tl.constexpr = tl.constexpr("mov.b32 $0, $1;")


@triton.jit
def load_queries(
    query,
    strides,
    rotation,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEY: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Query rows, once as they are and once for every plane of keys: in the channels that the plane has, and zero where
    a channel is of another block; with RoPE if `ROTATE`. Nothing that needs one of these stands between the loads: it
    would wait for each."""
    row, lane = tl.arange(0, ROWS[0]), tl.arange(0, SIZES[3])
    whole = (tl.full((ROWS[0], SIZES[3]), 0.0, query.dtype.element_ty),)
    if KEY[4][2]:
        offsets = (row % HEADS[1]).to(tl.int64) * strides[1] + (row // HEADS[1]).to(tl.int64) * strides[2]
        whole = _load(query + offsets, lane, (row < HEADS[1] * HEADS[2])[:, None], rotation, SIZES, ROTATE)
    row, column, planes = tl.arange(0, ROWS[1]), tl.arange(0, KEY[1][1]), ()
    block, of_query = row // ROWS[0], row % ROWS[0]
    offsets = (of_query % HEADS[1]).to(tl.int64) * strides[1] + (of_query // HEADS[1]).to(tl.int64) * strides[2]
    own = (column // KEY[0][2])[None, :] == block[:, None]
    PLANES: tl.constexpr = KEY[0][4]
    for plane in tl.static_range(PLANES):
        element = element_of(column, plane, KEY)
        inside = (of_query < HEADS[1] * HEADS[2])[:, None] & own
        planes = planes + (_load(query + offsets, element, inside, rotation, SIZES, ROTATE),)
    kept = ()
    for plane in tl.static_range(PLANES):
        values = _turned(planes[plane], element_of(column, plane, KEY), SIZES, ROTATE, INTERPRETED)
        if not INTERPRETED:
            values = tl.inline_asm_elementwise(
                KEPT, "=r,r", [values], dtype=query.dtype.element_ty, is_pure=False, pack=2
            )
        kept = kept + (values,)
    return _turned(whole, lane, SIZES, ROTATE and KEY[4][2], INTERPRETED), kept


@triton.jit
def _load(rows, element, inside, rotation, SIZES: tl.constexpr, ROTATE: tl.constexpr):
    """Elements of rows, `[rows, elements]`; for RoPE also their partners, cos and sin."""
    exists = element < SIZES[0]
    inside = inside & exists[None, :]
    loaded = (tl.load(rows[:, None] + element[None, :], mask=inside, other=0.0),)
    if ROTATE:
        HALF: tl.constexpr = SIZES[0] // 2
        partner = tl.where(element < HALF, element + HALF, element - HALF)
        other = tl.load(rows[:, None] + partner[None, :], mask=inside, other=0.0)
        cos = tl.load(rotation[0] + element, mask=exists, other=0.0)
        loaded = loaded + (other, cos, tl.load(rotation[1] + element, mask=exists, other=0.0))
    return loaded


@triton.jit
def _turned(loaded, element, SIZES: tl.constexpr, ROTATE: tl.constexpr, INTERPRETED: tl.constexpr):
    """What `_load` loaded, with RoPE as in `one_token_kernel.load_rotated`."""
    values = loaded[0]
    if ROTATE:
        sin = widen(loaded[3])
        sin = tl.where(element < SIZES[0] // 2, -sin, sin)[None, :]
        wide = widen(values) * widen(loaded[2])[None, :] + widen(loaded[1]) * sin
        values = narrow(wide, values.dtype) if INTERPRETED else wide.to(values.dtype)
    return values


@triton.jit
def _row_scales(values):
    """2**14 over the power of two of each query row's largest number, and its reciprocal: float16 takes rows times
    these, and what it loses is less than 2**-38 of the largest."""
    largest = tl.reduce(tl.abs(widen(values)), 1, maximum).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(largest, 15), 254)
    return _power(127 + 127 + 14 - exponent), _power(exponent - 14)


@triton.jit
def _power(biased):
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def queries(loaded, scale, ROWS: tl.constexpr, KEY: tl.constexpr):
    """All planes as the format of the keys has them, and by what scores of query rows are to be multiplied."""
    factors, scales = tl.full((ROWS[0],), 1.0, tl.float32), tl.full((ROWS[0],), 1.0, tl.float32)
    if KEY[4][2]:
        factors, scales = _row_scales(loaded[0])
    every = tl.broadcast_to(factors[None, :], (KEY[2][1], ROWS[0]))
    every = tl.reshape(every, (ROWS[1],))[:, None]
    planes = ()
    PLANES: tl.constexpr = KEY[0][4]
    for plane in tl.static_range(PLANES):
        if KEY[4][2]:
            planes = planes + ((widen(loaded[1][plane]) * every).to(tl.float16),)
        else:
            planes = planes + (loaded[1][plane],)
    return planes, scales * (scale * KEY[4][0])


@triton.jit
def surplus(planes, KEY: tl.constexpr, ROWS: tl.constexpr):
    """What a product is too large by because keys have a number added to each element, `[rows times blocks]`."""
    surplus = tl.full((ROWS[1],), 0.0, tl.float32)
    PLANES: tl.constexpr = KEY[0][4]
    if KEY[4][1] != 0:
        total = tl.full((ROWS[1], KEY[1][1]), 0.0, tl.float32)
        for plane in tl.static_range(PLANES):
            total += widen(planes[plane])
        surplus = tl.reduce(total, 1, plus) * KEY[4][1]
    return surplus
