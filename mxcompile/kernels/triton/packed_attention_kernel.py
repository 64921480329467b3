"""The kernel of attention over packed keys and values: `packed_attention.py` launches it and says what it computes.

A block of 32 channels has one scale, so a score is a sum of partial products, one a block, each times its scale. The
rows of the left operand are therefore query rows times blocks: row `b * ROWS[0] + r` holds query row r in the channels
of block b and zeros elsewhere. Llama-3's four heads that share keys, and four blocks, are the sixteen rows that a
tensor core multiplies anyway. Scales are then multiplied with scores, not with elements; and with the weights of
values, of whose rows each channel keeps that of its own block.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxcompile.kernels.triton.attention_kernel import (
    FLOAT32_LOWEST,
    combine_partials,
    multiply,
    partial_pointers,
    prefetch,
    store_rows,
)
from mxcompile.kernels.triton.elements import arrives_last, narrow, widen
from mxcompile.kernels.triton.packed_states import element_of, load_words, plane_of


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sum(a, b):
    return a + b


@triton.jit
def _load_scales(pointer, token, stride, inside, SIDE: tl.constexpr):
    """Scale bytes of tokens: words of four `[words, tokens]`, or bytes `[blocks, tokens]`."""
    index = tl.arange(0, SIDE[2][1] // 4 if SIDE[2][2] else SIDE[2][1])
    in_bounds = (
        inside[None, :] if SIDE[2][2] or SIDE[2][0] == SIDE[2][1] else inside[None, :] & (index < SIDE[2][0])[:, None]
    )
    offsets = token.to(tl.int64)[None, :] * stride + index[:, None]
    return tl.load(pointer + offsets, mask=in_bounds, other=0)


@triton.jit
def _scale_exponents(scales, SIDE: tl.constexpr):
    """Scale bytes as int32 `[blocks, 1, tokens]`."""
    if SIDE[2][2]:
        shifts = tl.expand_dims(tl.expand_dims(8 * tl.arange(0, 4), 0), 2)
        scales = (tl.expand_dims(scales, 1) >> shifts) & 0xFF
        scales = tl.reshape(scales, (SIDE[2][1], scales.shape[2]))
    return tl.expand_dims(scales.to(tl.int32), 1)


@triton.jit
def _query_plane(
    query,
    strides,
    plane: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEY: tl.constexpr,
):
    """Rows of queries in the channels that one plane of keys has; zero where a channel is of another block."""
    row, column = tl.arange(0, ROWS[1]), tl.arange(0, KEY[1][1])
    block, of_query = row // ROWS[0], row % ROWS[0]
    offsets = (of_query % HEADS[1]).to(tl.int64) * strides[1] + (of_query // HEADS[1]).to(tl.int64) * strides[2]
    element = element_of(column, plane, KEY)
    own = (column // KEY[0][2])[None, :] == block[:, None]
    inside = (of_query < HEADS[1] * HEADS[2])[:, None] & own & (element < SIZE)[None, :]
    return tl.load(query + offsets[:, None] + element[None, :], mask=inside, other=0.0)


@triton.jit
def _query_planes(query, strides, SIZE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, KEY: tl.constexpr):
    """All planes; the first again in place of those that the format of the keys does not have."""
    q0 = _query_plane(query, strides, 0, SIZE, HEADS, ROWS, KEY)
    q1 = _query_plane(query, strides, 1, SIZE, HEADS, ROWS, KEY)
    q2, q3, q4, q5, q6, q7 = q0, q0, q0, q0, q0, q0
    if KEY[0][4] > 2:
        q2 = _query_plane(query, strides, 2, SIZE, HEADS, ROWS, KEY)
        q3 = _query_plane(query, strides, 3, SIZE, HEADS, ROWS, KEY)
    if KEY[0][4] > 4:
        q4 = _query_plane(query, strides, 4, SIZE, HEADS, ROWS, KEY)
        q5 = _query_plane(query, strides, 5, SIZE, HEADS, ROWS, KEY)
        q6 = _query_plane(query, strides, 6, SIZE, HEADS, ROWS, KEY)
        q7 = _query_plane(query, strides, 7, SIZE, HEADS, ROWS, KEY)
    return q0, q1, q2, q3, q4, q5, q6, q7


@triton.jit
def _own_block(acc, VALUE: tl.constexpr):
    """Of rows times blocks, `[blocks * queries, columns]`, the row of each column's own block: `[queries, columns]`."""
    block = tl.expand_dims(tl.expand_dims(tl.arange(0, VALUE[2][1]), 1), 2)
    own = tl.expand_dims(tl.expand_dims(tl.arange(0, VALUE[1][1]) // VALUE[0][2], 0), 0) == block
    split = tl.reshape(acc, (VALUE[2][1], acc.shape[0] // VALUE[2][1], VALUE[1][1]))
    return tl.reduce(tl.where(own, split, 0.0), 0, _sum)


@triton.jit
def _load_mask(mask, rows, token, inside, strides, MASK: tl.constexpr, MASK_OF_ROWS: tl.constexpr):
    """The mask of tokens, for each query row or for all; whether they exist if there is no mask."""
    values = inside[None, :]
    if MASK != "":
        offsets = token.to(tl.int64) * strides[3]
        if MASK_OF_ROWS:
            of_rows = rows[0].to(tl.int64) * strides[1] + rows[1].to(tl.int64) * strides[2]
            in_bounds = rows[2][:, None] & inside[None, :]
            values = tl.load(mask + of_rows[:, None] + offsets[None, :], mask=in_bounds, other=0)
        else:
            values = tl.load(mask + offsets, mask=inside, other=0)[None, :]
    return values


@triton.jit
def _masked(scores, values, inside, MASK: tl.constexpr):
    """Apply the mask to scores `[query rows, tokens]`; -inf beyond the last token."""
    if MASK == "bool":
        scores = tl.where(values != 0, scores, float("-inf"))
    elif MASK == "float":
        scores += widen(values)
    return tl.where(inside[None, :], scores, float("-inf"))


@triton.jit
def _zeros(ROWS: tl.constexpr, VALUE: tl.constexpr):
    """A sum of values for every plane."""
    zero = tl.full((ROWS, VALUE[1][1]), 0.0, tl.float32)
    result = (zero, zero)
    if VALUE[0][4] == 4:
        result = (zero, zero, zero, zero)
    elif VALUE[0][4] == 8:
        result = (zero, zero, zero, zero, zero, zero, zero, zero)
    return result


@triton.jit
def _add_plane(weights, words, acc, rescale, plane: tl.constexpr, VALUE: tl.constexpr, INTERPRETED: tl.constexpr):
    """`acc * rescale + weights @ values` for one plane of values."""
    values = plane_of(words, plane, VALUE, INTERPRETED)
    return multiply(weights, values, acc[plane] * rescale, INTERPRETED)


@triton.jit
def _add_values(weights, words, acc, rescale, VALUE: tl.constexpr, INTERPRETED: tl.constexpr):
    """The same for all planes."""
    result = (
        _add_plane(weights, words, acc, rescale, 0, VALUE, INTERPRETED),
        _add_plane(weights, words, acc, rescale, 1, VALUE, INTERPRETED),
    )
    if VALUE[0][4] > 2:
        result = (
            result[0],
            result[1],
            _add_plane(weights, words, acc, rescale, 2, VALUE, INTERPRETED),
            _add_plane(weights, words, acc, rescale, 3, VALUE, INTERPRETED),
        )
    if VALUE[0][4] > 4:
        result = (
            result[0],
            result[1],
            result[2],
            result[3],
            _add_plane(weights, words, acc, rescale, 4, VALUE, INTERPRETED),
            _add_plane(weights, words, acc, rescale, 5, VALUE, INTERPRETED),
            _add_plane(weights, words, acc, rescale, 6, VALUE, INTERPRETED),
            _add_plane(weights, words, acc, rescale, 7, VALUE, INTERPRETED),
        )
    return result


@triton.jit
def _wait_for_previous_kernel(states, strides, first, tokens, BLOCK: tl.constexpr):
    """Prefetch the first keys and values into L2, which the previous kernel does not write, and wait for it."""
    gdc_launch_dependents()
    token = tl.minimum(first + tl.arange(0, BLOCK), tokens - 1).to(tl.int64)
    prefetch(states[0] + token * strides[0])
    prefetch(states[2] + token * strides[2])
    gdc_wait()


@triton.jit
def _scores(planes, words, scales, KEY: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Products of queries and keys, `[query rows, tokens]`, from those of blocks times their scales."""
    words = (tl.trans(words[0]), tl.trans(words[1]), tl.trans(words[2]))
    partial = tl.full((ROWS[1], words[0].shape[1]), 0.0, tl.float32)
    PLANES: tl.constexpr = KEY[0][4]
    for plane in tl.static_range(PLANES):
        keys = plane_of(words, plane, KEY, INTERPRETED)
        partial = multiply(planes[plane], keys, partial, INTERPRETED)
    factors = (_scale_exponents(scales, KEY) << 23).to(tl.float32, bitcast=True)
    return tl.reduce(tl.reshape(partial, (KEY[2][1], ROWS[0], partial.shape[1])) * factors, 0, _sum)


@triton.jit
def _weights(exponentials, scales, VALUE: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Exponentials rounded to bfloat16, times the scales of every block of values: `[value rows, tokens]`."""
    rounded = narrow(exponentials, tl.bfloat16) if INTERPRETED else exponentials.to(tl.bfloat16)
    factors = (_scale_exponents(scales, VALUE) << 23).to(tl.float32, bitcast=True)
    weights = tl.reshape(tl.expand_dims(widen(rounded), 0) * factors, (ROWS[2], exponentials.shape[1]))
    return narrow(weights, tl.bfloat16) if INTERPRETED else weights.to(tl.bfloat16)


@triton.jit
def _attend_to_blocks(
    planes,
    states,
    strides,
    mask,
    mask_strides,
    rows,
    scale,
    tokens,
    blocks,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Maximum scores, denominators and weighted sums of values over blocks `blocks[0]` to `blocks[1]` of the tokens.

    planes: of the queries. rows: the head of each query row, which of its queries it is, and whether it exists.
    """
    running_max = tl.full((ROWS[0],), FLOAT32_LOWEST, tl.float32)
    denominators = tl.full((ROWS[0], BLOCK), 0.0, tl.float32)
    acc = _zeros(ROWS[2], VALUE)
    for block in range(blocks[0], blocks[1]):
        token = block * BLOCK + tl.arange(0, BLOCK)
        inside = token < tokens
        # Not copied ahead as words and scales are, so as early as possible.
        mask_values = _load_mask(mask, rows, token, inside, mask_strides, MASK, MASK_OF_ROWS)
        key_words = load_words(states[0], token, strides[0], inside, KEY)
        key_scales = _load_scales(states[1], token, strides[1], inside, KEY)
        value_words = load_words(states[2], token, strides[2], inside, VALUE)
        value_scales = _load_scales(states[3], token, strides[3], inside, VALUE)
        scores = _scores(planes, key_words, key_scales, KEY, ROWS, INTERPRETED) * scale
        scores = _masked(scores, mask_values, inside, MASK)
        new_max = tl.maximum(running_max, tl.reduce(scores, 1, _maximum))
        exponentials = tl.exp(scores - new_max[:, None])
        rescale = tl.exp(running_max - new_max)
        running_max = new_max
        denominators = denominators * rescale[:, None] + exponentials
        weights = _weights(exponentials, value_scales, VALUE, ROWS, INTERPRETED)
        every = tl.broadcast_to(tl.expand_dims(rescale, 0), (VALUE[2][1], ROWS[0]))
        acc = _add_values(weights, value_words, acc, tl.reshape(every, (ROWS[2],))[:, None], VALUE, INTERPRETED)
    return running_max, tl.reduce(denominators, 1, _sum), acc


@triton.jit(do_not_specialize=["scale", "tokens", "blocks_per_split"])
def attend_packed_kernel(
    query,
    states,
    mask,
    result,
    scratch,
    counters,
    scale,
    tokens,
    blocks_per_split,
    query_strides,
    batch_strides,
    head_strides,
    strides,
    mask_strides,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_ROWS: tl.constexpr,
    ROUNDING: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program of `packed_attention.attend`: axis 0 numbers batch entries and KV heads, axis 1 parts of the tokens.

    states: words of keys, their scales, words of values, their scales. KEY, VALUE: see `packed_attention.constants`.
    SIZES: of a key, of a value, and of a value as a power of two. HEADS: KV heads, query heads that share one, queries.
    ROWS: query rows, as a power of two; and those of keys and of values, times their blocks.
    """
    split = tl.program_id(1)
    batch = (tl.program_id(0) // HEADS[0]).to(tl.int64)
    kv_head = (tl.program_id(0) % HEADS[0]).to(tl.int64)
    states = (
        states[0] + batch * batch_strides[0] + kv_head * head_strides[0],
        states[1] + batch * batch_strides[1] + kv_head * head_strides[1],
        states[2] + batch * batch_strides[2] + kv_head * head_strides[2],
        states[3] + batch * batch_strides[3] + kv_head * head_strides[3],
    )
    if DEPENDENT:
        _wait_for_previous_kernel(states, strides, split * blocks_per_split * BLOCK, tokens, BLOCK)
    query += batch * query_strides[0] + kv_head * HEADS[1] * query_strides[1]
    planes = _query_planes(query, query_strides, SIZES[0], HEADS, ROWS, KEY)
    row = tl.arange(0, ROWS[0])
    head, number = kv_head.to(tl.int32) * HEADS[1] + row % HEADS[1], row // HEADS[1]
    exists = row < HEADS[1] * HEADS[2]
    blocks = (split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, (tokens + BLOCK - 1) // BLOCK))
    # fmt: off
    running_max, denominator, acc = _attend_to_blocks(
        planes, states, strides, mask + batch * mask_strides[0], mask_strides, (head, number, exists),
        scale * KEY[4], tokens, blocks, KEY, VALUE, ROWS, BLOCK, MASK, MASK_OF_ROWS, INTERPRETED,
    )
    # fmt: on
    _store_partial(scratch, running_max, denominator, acc, SIZES, ROWS, VALUE)
    if arrives_last(counters + tl.program_id(0), tl.num_programs(1)):
        full_denominator, full_acc = combine_partials(scratch, SIZES[1], SIZES[2], ROWS[0], CHUNK)
        place = (batch * HEADS[0] * HEADS[1] + head) * HEADS[2] + number
        store_rows(
            result, place, exists, full_denominator, full_acc * VALUE[4], SIZES[1], SIZES[2], ROUNDING, INTERPRETED
        )


@triton.jit
def _store_partial(
    scratch, running_max, denominator, acc, SIZES: tl.constexpr, ROWS: tl.constexpr, VALUE: tl.constexpr
):
    """Store the partial result of a program for the last one to combine."""
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    row = program * ROWS[0] + tl.arange(0, ROWS[0])
    numerators, max_pointers, denominator_pointers = partial_pointers(scratch, row, SIZES[1], 1, ROWS[0])
    column = tl.arange(0, VALUE[1][1])
    PLANES: tl.constexpr = VALUE[0][4]
    for plane in tl.static_range(PLANES):
        element = element_of(column, plane, VALUE)
        own = _own_block(acc[plane], VALUE)
        in_bounds = ((element < SIZES[1]) & (column < VALUE[1][0]))[None, :]
        tl.store(numerators + element[None, :], own, mask=in_bounds)
    tl.store(max_pointers, running_max)
    tl.store(denominator_pointers, denominator)
