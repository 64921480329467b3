"""The tokens of a packed cache that attention reads exactly, the newest and the first: a program of its own attends to
them, and the others leave them out. Part of `packed_attention_kernel.py`; see `numerics/exact_tokens.py`.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton
import triton.language as tl

from mxcompile.kernels.triton.attention.one_token_kernel import FLOAT32_LOWEST, multiply, partial_pointers
from mxcompile.kernels.triton.elements import narrow, widen
from mxcompile.kernels.triton.reductions import maximum, plus


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b)


@triton.jit
def count_newest(held, position, EXACT: tl.constexpr):
    """How many tokens before `position` are read exactly: those of the window, back to the first that is not held.

    EXACT: window, first tokens, slots of the newest; the power of two above the window; whether rows are aligned.
    """
    count = position * 0
    if EXACT[2] > 0:
        back = tl.arange(0, EXACT[3])
        place = position - 1 - back
        inside = (place >= 0) & (back < EXACT[0] - 1)
        is_held = tl.load(held + place % EXACT[2], mask=inside, other=-1) == place
        first_missing = tl.reduce(tl.where(inside & is_held, EXACT[3], back), 0, _minimum)
        count = tl.minimum(first_missing, EXACT[0] - 1)
    return count


@triton.jit
def _rows_of(first, newest, own, strides, row, slot, is_first, is_own, EXACT: tl.constexpr):
    """Pointers to rows of three tensors. strides: of their tokens."""
    address = tl.where(
        is_first,
        first.to(tl.int64) + row.to(tl.int64) * strides[2] * 2,
        newest.to(tl.int64) + slot.to(tl.int64) * strides[1] * 2,
    )
    address = tl.where(is_own, own.to(tl.int64), address)
    pointers = address.to(tl.pointer_type(own.dtype.element_ty))
    return tl.multiple_of(pointers, 16) if EXACT[4] else pointers


@triton.jit
def _load_rows(pointers, inside, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Rows `[rows, LANES]`; zero where not `inside` and beyond `SIZE`."""
    lane = tl.arange(0, LANES)
    in_bounds = inside[:, None] & (lane < SIZE)[None, :]
    return tl.load(pointers[:, None] + lane[None, :], mask=in_bounds, other=0.0)


@triton.jit
def _load_mask(mask, heads, place, inside, strides, MASK: tl.constexpr, MASK_OF_ROWS: tl.constexpr):
    """The mask of tokens `[rows or 1, tokens]`; anything if there is none."""
    values = place[None, :]
    if MASK != "":
        offsets, in_bounds = (place.to(tl.int64) * strides[3])[None, :], inside[None, :]
        if MASK_OF_ROWS:
            offsets += heads[0].to(tl.int64)[:, None] * strides[1]
            in_bounds = in_bounds & heads[1][:, None]
        values = tl.load(mask + offsets, mask=in_bounds, other=0)
    return values


@triton.jit
def _step(partial, query, keys, values, mask, inside, scale, MASK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Update maximum scores, denominators and weighted sums with some rows."""
    zero = tl.full((query.shape[0], keys.shape[0]), 0.0, tl.float32)
    scores = multiply(query, tl.trans(keys), zero, INTERPRETED) * scale
    inside = inside[None, :]
    if MASK == "bool":
        inside &= mask != 0
    elif MASK == "float":
        scores += widen(mask)
    scores = tl.where(inside, scores, float("-inf"))
    new_max = tl.maximum(partial[0], tl.reduce(scores, 1, maximum))
    exponentials = tl.exp(scores - new_max[:, None])
    rescale = tl.exp(partial[0] - new_max)
    denominator = partial[1] * rescale + tl.reduce(exponentials, 1, plus)
    rounded = narrow(exponentials, values.dtype) if INTERPRETED else exponentials.to(values.dtype)
    return new_max, denominator, multiply(rounded, values, partial[2] * rescale[:, None], INTERPRETED)


@triton.jit
def _of_head(exact, strides, batch, kv_head, HEADS: tl.constexpr):
    """Pointers to the query of some heads, and to their keys and values: of the new token, the newest, the first.

    exact: tensors in that order, and what `held` says. strides: of the query, and of keys and values, over batch
    entries, heads and tokens.
    """
    query = exact[0] + batch * strides[0] + kv_head * HEADS[1] * strides[1]
    pairs = (
        exact[1] + batch * strides[3] + kv_head * strides[4],
        exact[2] + batch * strides[6] + kv_head * strides[7],
        exact[3] + batch * strides[9] + kv_head * strides[10],
        exact[4] + batch * strides[12] + kv_head * strides[13],
        exact[5] + batch * strides[15] + kv_head * strides[16],
        exact[6] + batch * strides[18] + kv_head * strides[19],
    )
    return query, pairs


@triton.jit
def store_exact_partial(
    scratch,
    exact,
    strides,
    batch,
    kv_head,
    mask,
    mask_strides,
    scale,
    position,
    newest,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Attend to the exact tokens and store the partial result, as `_store_partial` does that of packed ones.

    exact, strides: see `_of_head`. newest: how many before `position` are exact. UNIT: by which the sums of
    values are multiplied in the end. Rows are the first tokens, those before `position`, newest first, and its own.
    """
    LANES: tl.constexpr = tl.constexpr((max(16, SIZES[3]), max(16, SIZES[2])))
    COUNT: tl.constexpr = tl.constexpr(EXACT[0] + EXACT[1])
    TILE: tl.constexpr = tl.constexpr(16 if COUNT <= 16 else 32 if COUNT <= 32 else 64)
    row = tl.arange(0, max(16, ROWS[0]))
    heads = (kv_head.to(tl.int32) * HEADS[1] + row, row < HEADS[1])
    query, pairs = _of_head(exact, strides, batch, kv_head, HEADS)
    query = _load_rows(query + row.to(tl.int64) * strides[1], heads[1], SIZES[0], LANES[0])
    partial = (
        tl.full((row.shape[0],), FLOAT32_LOWEST, tl.float32),
        tl.full((row.shape[0],), 0.0, tl.float32),
        tl.full((row.shape[0], LANES[1]), 0.0, tl.float32),
    )
    steps = ((strides[5], strides[11], strides[17]), (strides[8], strides[14], strides[20]))
    for base in range(0, COUNT, TILE):
        index = base + tl.arange(0, TILE)
        back = index - EXACT[1]
        is_first, is_own = back < 0, (back == EXACT[0] - 1) & (back >= 0)
        place = tl.where(is_first, index, tl.where(is_own, position, position - 1 - back))
        inside = tl.where(is_first, place <= position, (place >= EXACT[1]) & ((back < newest) | is_own))
        inside &= index < COUNT
        slot = tl.maximum(place, 0) % max(1, EXACT[2])
        keys = _rows_of(pairs[4], pairs[2], pairs[0], steps[0], index, slot, is_first, is_own, EXACT)
        values = _rows_of(pairs[5], pairs[3], pairs[1], steps[1], index, slot, is_first, is_own, EXACT)
        mask_values = _load_mask(mask, heads, place, inside, mask_strides, MASK, MASK_OF_ROWS)
        keys = _load_rows(keys, inside, SIZES[0], LANES[0])
        values = _load_rows(values, inside, SIZES[1], LANES[1])
        partial = _step(partial, query, keys, values, mask_values, inside, scale, MASK, INTERPRETED)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    numerators, maxima, denominators = partial_pointers(scratch, program * ROWS[0] + row, SIZES[1], LANES[1], ROWS[0])
    in_bounds = row < ROWS[0]
    lane = tl.arange(0, LANES[1])
    tl.store(numerators, partial[2] * (1 / UNIT), mask=in_bounds[:, None] & (lane < SIZES[1])[None, :])
    tl.store(maxima, partial[0], mask=in_bounds)
    tl.store(denominators, partial[1], mask=in_bounds)
