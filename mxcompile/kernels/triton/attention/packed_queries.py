"""Queries as the left operand of attention over packed keys: part of `packed_attention_kernel.py`, which says what its
rows are.
"""

# ruff: noqa: N803, N806, RUF005  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton
import triton.language as tl

from mxcompile.kernels.triton.attention.packed_states import element_of
from mxcompile.kernels.triton.elements import widen
from mxcompile.kernels.triton.reductions import maximum, plus

# A value that nothing moves past: loads before it are all on their way when it is needed.
KEPT: tl.constexpr = tl.constexpr("mov.b32 $0, $1;")


@triton.jit
def load_queries(
    query,
    strides,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Query rows, once as they are and once for every plane of keys: in the channels that the plane has, and zero where
    a channel is of another block. Nothing that needs one of these stands between the loads: it would wait for each."""
    row, lane = tl.arange(0, ROWS[0]), tl.arange(0, SIZES[3])
    whole = tl.full((ROWS[0], SIZES[3]), 0.0, query.dtype.element_ty)
    if KEY[4][2]:
        offsets = (row % HEADS[1]).to(tl.int64) * strides[1] + (row // HEADS[1]).to(tl.int64) * strides[2]
        inside = (row < HEADS[1] * HEADS[2])[:, None] & (lane < SIZES[0])[None, :]
        whole = tl.load(query + offsets[:, None] + lane[None, :], mask=inside, other=0.0)
    row, column, planes = tl.arange(0, ROWS[1]), tl.arange(0, KEY[1][1]), ()
    block, of_query = row // ROWS[0], row % ROWS[0]
    offsets = (of_query % HEADS[1]).to(tl.int64) * strides[1] + (of_query // HEADS[1]).to(tl.int64) * strides[2]
    own = (column // KEY[0][2])[None, :] == block[:, None]
    PLANES: tl.constexpr = KEY[0][4]
    for plane in tl.static_range(PLANES):
        element = element_of(column, plane, KEY)
        inside = (of_query < HEADS[1] * HEADS[2])[:, None] & own & (element < SIZES[0])[None, :]
        planes = planes + (tl.load(query + offsets[:, None] + element[None, :], mask=inside, other=0.0),)
    kept = ()
    for plane in tl.static_range(PLANES):
        values = planes[plane]
        if not INTERPRETED:
            values = tl.inline_asm_elementwise(
                KEPT, "=r,r", [values], dtype=query.dtype.element_ty, is_pure=False, pack=2
            )
        kept = kept + (values,)
    return whole, kept


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
