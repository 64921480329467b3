"""The kernel of attention over packed keys and values: `packed_attention.py` launches it and says what it computes.

A block of 32 channels has one scale, so a score is a sum of partial products, one a block, each times its scale. The
rows of the left operand are therefore query rows times blocks: row `b * ROWS[0] + r` holds query row r in the channels
of block b and zeros elsewhere. Llama-3's four heads that share keys, and four blocks, are the sixteen rows that a
tensor core multiplies anyway. Scales are then multiplied with scores, not with elements; and with the weights of
values, of whose rows each channel keeps that of its own block.

A block of tokens has a slice for each warp, with a maximum, denominators and sums of its own, so that warps wait for
copies alone; slices become one when the loop is over. The last block overlaps the one before it, and does not end
beyond the last token, so no copy needs a mask. Keys keep what `packed_states.py` would otherwise take off every
element: it is taken off the scores, where it is a constant of a query.
"""

# ruff: noqa: N803, N806, RUF005  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton
import triton.language as tl

from mxcompile.kernels.triton.attention.exact_tokens import store_exact_partial
from mxcompile.kernels.triton.attention.one_token_kernel import (
    FLOAT32_LOWEST,
    combine_partials,
    multiply,
    partial_pointers,
    store_rows,
)
from mxcompile.kernels.triton.attention.packed_queries import queries, surplus
from mxcompile.kernels.triton.attention.packed_start import begin
from mxcompile.kernels.triton.attention.packed_states import element_of, load_words, plane_of
from mxcompile.kernels.triton.elements import arrives_last, narrow, widen
from mxcompile.kernels.triton.reductions import maximum, plus

# A scale byte of a word ($1), rotated by $2 bits to where float32 has its exponent.
SCALE_OF_BLOCK: tl.constexpr = tl.constexpr("shf.l.wrap.b32 $0, $1, $1, $2; and.b32 $0, $0, 0x7F800000;")
BYTE_AT: tl.constexpr = tl.constexpr("ld.global.u8 $0, [$1];")
# Two weights: exponentials ($5, $6) in bfloat16, times scale bytes of two words ($1, $2), which go to where bfloat16
# has its exponent. $3, $4: a nibble n selects byte n of the first word, 4 + n of the second.
WEIGHTS_OF_BLOCK: tl.constexpr = tl.constexpr(
    "{ .reg .b32 s, t, e; lop3.b32 s, $3, 0xFF, $4, 0xE2; prmt.b32 t, $1, $2, s; shl.b32 t, t, 7; "
    "and.b32 t, t, 0x7F807F80; cvt.rn.bf16x2.f32 e, $6, $5; mov.b32 s, 0x80008000; fma.rn.bf16x2 $0, e, t, s; }"
)


@triton.jit
def _load_scales(pointer, start, local, stride, SIDE: tl.constexpr):
    """Scale bytes of tokens `start + local`: words of four `[slices, words, tokens]`, or bytes in place of words."""
    index = tl.arange(0, SIDE[2][1] // 4 if SIDE[2][2] else SIDE[2][1])
    pointers = pointer + start * stride + (tl.expand_dims(local * stride, 1) + index[None, :, None])
    if SIDE[2][2] or SIDE[2][0] == SIDE[2][1]:
        scales = tl.load(pointers)
    else:
        scales = tl.load(pointers, mask=(index < SIDE[2][0])[None, :, None], other=0)
    return scales


@triton.jit
def _of_blocks(words, SIDE: tl.constexpr):
    """Words of four scales once for each block: `[slices, blocks, 1, tokens]`."""
    every = tl.broadcast_to(tl.expand_dims(words, 2), (words.shape[0], words.shape[1], 4, words.shape[2]))
    return tl.expand_dims(tl.reshape(every, (words.shape[0], SIDE[2][1], words.shape[2])), 2)


@triton.jit
def _scale_factors(scales, SIDE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Scale bytes as float32 `[slices, blocks, 1, tokens]`; those of 2**-127 become zero."""
    byte = (tl.arange(0, SIDE[2][1]) % 4)[None, :, None, None]
    if SIDE[2][2] and not INTERPRETED:
        bits = tl.inline_asm_elementwise(
            SCALE_OF_BLOCK,
            "=r,r,r",
            [_of_blocks(scales, SIDE), (23 - 8 * byte) & 31],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif SIDE[2][2]:
        bits = ((_of_blocks(scales, SIDE) >> 8 * byte) & 0xFF) << 23
    else:
        bits = tl.expand_dims(scales.to(tl.int32), 2) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _own_block(acc, VALUE: tl.constexpr):
    """Of rows times blocks, `[slices, blocks * queries, columns]`, the row of each column's own block:
    `[slices, queries, columns]`."""
    block = tl.arange(0, VALUE[2][1])[None, :, None, None]
    own = (tl.arange(0, VALUE[1][1]) // VALUE[0][2])[None, None, None, :] == block
    split = tl.reshape(acc, (acc.shape[0], VALUE[2][1], acc.shape[1] // VALUE[2][1], VALUE[1][1]))
    return tl.reduce(tl.where(own, split, 0.0), 1, plus)


@triton.jit
def _own_blocks(acc, VALUE: tl.constexpr):
    """The same for all planes, `[slices, queries, columns * planes]`: those of a column are adjacent."""
    first, second = _own_block(acc[0], VALUE), _own_block(acc[1], VALUE)
    if VALUE[0][4] == 2:
        planes = tl.join(first, second)
    else:
        third, fourth = _own_block(acc[2], VALUE), _own_block(acc[3], VALUE)
        if VALUE[0][4] == 4:
            planes = tl.join(tl.join(first, third), tl.join(second, fourth))
        else:
            fifth, sixth = _own_block(acc[4], VALUE), _own_block(acc[5], VALUE)
            seventh, eighth = _own_block(acc[6], VALUE), _own_block(acc[7], VALUE)
            even = tl.join(tl.join(first, fifth), tl.join(third, seventh))
            odd = tl.join(tl.join(second, sixth), tl.join(fourth, eighth))
            planes = tl.join(even, odd)
    return tl.reshape(planes, (planes.shape[0], planes.shape[1], VALUE[1][1] * VALUE[0][4]))


@triton.jit
def _load_mask(
    mask, rows, start, local, strides, MASK: tl.constexpr, MASK_OF_ROWS: tl.constexpr, INTERPRETED: tl.constexpr
):
    """The mask of tokens `[slices, query rows or 1, tokens]`; anything if there is none."""
    values = tl.expand_dims(local, 1)
    if MASK != "":
        pointers = mask + start * strides[3] + tl.expand_dims(local * strides[3], 1)
        if MASK_OF_ROWS:
            of_rows = rows[0].to(tl.int64) * strides[1] + rows[1].to(tl.int64) * strides[2]
            values = tl.load(pointers + of_rows[None, :, None], mask=rows[2][None, :, None], other=0)
        elif MASK == "bool" and not INTERPRETED:
            # By the threads that need them: a load of Triton's own would go through shared memory, with a barrier.
            values = tl.inline_asm_elementwise(
                BYTE_AT, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
            )
        else:
            values = tl.load(pointers)
    return values


@triton.jit
def _masked(scores, values, inside, MASK: tl.constexpr):
    """Apply the mask to scores `[slices, query rows, tokens]`; -inf where a token is not `inside`."""
    inside = tl.expand_dims(inside, 1)
    if MASK == "bool":
        inside &= values != 0
    elif MASK == "float":
        scores += widen(values)
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def _zeros(SLICES: tl.constexpr, ROWS: tl.constexpr, VALUE: tl.constexpr):
    """A sum of values for every plane, `[slices, rows, columns]`."""
    sums = ()
    PLANES: tl.constexpr = VALUE[0][4]
    for _ in tl.static_range(PLANES):
        sums = sums + (tl.full((SLICES, ROWS, VALUE[1][1]), 0.0, tl.float32),)
    return sums


@triton.jit
def _add_values(weights, words, acc, rescale, VALUE: tl.constexpr, INTERPRETED: tl.constexpr):
    """`acc * rescale + weights @ values` for every plane of values."""
    sums = ()
    PLANES: tl.constexpr = VALUE[0][4]
    for plane in tl.static_range(PLANES):
        values = plane_of(words, plane, VALUE, INTERPRETED)
        sums = sums + (multiply(weights, values, acc[plane] * rescale, INTERPRETED),)
    return sums


@triton.jit
def _scores(planes, surplus, words, scales, KEY: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Products of queries and keys, `[slices, query rows, tokens]`, from those of blocks times their scales."""
    words = (tl.trans(words[0], (0, 2, 1)), tl.trans(words[1], (0, 2, 1)), tl.trans(words[2], (0, 2, 1)))
    SLICES: tl.constexpr = words[0].shape[0]
    TOKENS: tl.constexpr = words[0].shape[2]
    partial = tl.broadcast_to(-surplus[None, :, None], (SLICES, ROWS[1], TOKENS))
    PLANES: tl.constexpr = KEY[0][4]
    for plane in tl.static_range(PLANES):
        keys = plane_of(words, plane, KEY, INTERPRETED)
        queries = tl.broadcast_to(tl.expand_dims(planes[plane], 0), (SLICES, ROWS[1], KEY[1][1]))
        partial = multiply(queries, keys, partial, INTERPRETED)
    partial = tl.reshape(partial, (SLICES, KEY[2][1], ROWS[0], TOKENS))
    return tl.reduce(partial * _scale_factors(scales, KEY, INTERPRETED), 1, plus)


@triton.jit
def _weights(exponentials, scales, VALUE: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Exponentials in bfloat16, times the scales of every block of values: `[slices, value rows, tokens]`."""
    exponentials = tl.expand_dims(exponentials, 1)
    if VALUE[2][2] and not INTERPRETED:
        byte = (tl.arange(0, VALUE[2][1]) % 4)[None, :, None, None]
        weights = tl.inline_asm_elementwise(
            WEIGHTS_OF_BLOCK,
            "=r,r,r,r,r,f,f",
            [_of_blocks(scales, VALUE), byte * 0x1111 + 0x4400, exponentials],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        weights = exponentials * _scale_factors(scales, VALUE, INTERPRETED)
        weights = narrow(weights, tl.bfloat16) if INTERPRETED else weights.to(tl.bfloat16)
    return tl.reshape(weights, (weights.shape[0], ROWS[2], weights.shape[3]))


@triton.jit
def _start_of(block, tokens, BLOCK: tl.constexpr):
    """The first token of a block: the last one has tokens of the one before it, too, so that it is whole."""
    return tl.maximum(tl.minimum(block * BLOCK, tokens - BLOCK), 0)


@triton.jit
def _attend_to_blocks(
    planes,
    states,
    strides,
    mask,
    mask_strides,
    rows,
    scales,
    tokens,
    blocks,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    SINK: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Maximum scores, denominators and weighted sums of values over blocks `blocks[0]` to `blocks[1]` of the tokens,
    for each slice of a block.

    planes: of the queries. rows: the head of each query row, which of its queries it is, and whether it exists. scales:
    by which scores of query rows are multiplied.
    """
    TOKENS: tl.constexpr = BLOCK // SLICES
    running_max = tl.full((SLICES, ROWS[0]), FLOAT32_LOWEST, tl.float32)
    denominators = tl.full((SLICES, ROWS[0], TOKENS), 0.0, tl.float32)
    acc = _zeros(SLICES, ROWS[2], VALUE)
    added = surplus(planes, KEY, ROWS)
    place = tl.arange(0, SLICES)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    local = tl.minimum(place, tl.maximum(tokens, 1) - 1)
    next_mask = _load_mask(
        mask,
        rows,
        _start_of(blocks[0], tokens, BLOCK).to(tl.int64),
        local,
        mask_strides,
        MASK,
        MASK_OF_ROWS,
        INTERPRETED,
    )
    for block in range(blocks[0], blocks[1]):
        start = _start_of(block, tokens, BLOCK)
        inside = (place + start >= block * BLOCK) & (place + start < tokens)
        if SINK > 0:
            inside &= place + start >= SINK
        # Not copied ahead as words and scales are, so a block ahead in registers.
        mask_values, ahead = next_mask, _start_of(block + 1, tokens, BLOCK).to(tl.int64)
        next_mask = _load_mask(mask, rows, ahead, local, mask_strides, MASK, MASK_OF_ROWS, INTERPRETED)
        start = start.to(tl.int64)
        key_words = load_words(states[0], start, local, strides[0], KEY)
        key_scales = _load_scales(states[1], start, local, strides[1], KEY)
        value_words = load_words(states[2], start, local, strides[2], VALUE)
        value_scales = _load_scales(states[3], start, local, strides[3], VALUE)
        scores = _scores(planes, added, key_words, key_scales, KEY, ROWS, INTERPRETED) * scales[None, :, None]
        scores = _masked(scores, mask_values, inside, MASK)
        new_max = tl.maximum(running_max, tl.reduce(scores, 2, maximum))
        exponentials = tl.exp(scores - tl.expand_dims(new_max, 2))
        rescale = tl.exp(running_max - new_max)
        running_max = new_max
        denominators = denominators * tl.expand_dims(rescale, 2) + exponentials
        weights = _weights(exponentials, value_scales, VALUE, ROWS, INTERPRETED)
        every = tl.broadcast_to(tl.expand_dims(rescale, 1), (SLICES, VALUE[2][1], ROWS[0]))
        every = tl.expand_dims(tl.reshape(every, (SLICES, ROWS[2])), 2)
        acc = _add_values(weights, value_words, acc, every, VALUE, INTERPRETED)
    return running_max, tl.reduce(denominators, 2, plus), acc


@triton.jit
def _states_of_head(states, strides, batch, kv_head):
    """Pointers to those of a KV head, and their strides over tokens. strides: over batch entries, heads and tokens."""
    pointers = (
        states[0] + batch * strides[0] + kv_head * strides[4],
        states[1] + batch * strides[1] + kv_head * strides[5],
        states[2] + batch * strides[2] + kv_head * strides[6],
        states[3] + batch * strides[3] + kv_head * strides[7],
    )
    return pointers, (strides[8], strides[9], strides[10], strides[11])


@triton.jit(do_not_specialize=["scale", "tokens"])
def attend_packed_kernel(
    query,
    states,
    position,
    new,
    exact,
    mask,
    result,
    scratch,
    counters,
    scale,
    tokens,
    query_strides,
    strides,
    new_strides,
    exact_strides,
    mask_strides,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
    UP_TO_POSITION: tl.constexpr,
    NEW: tl.constexpr,
    ROTATE: tl.constexpr,
    EXACT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_ROWS: tl.constexpr,
    ROUNDING: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program of `packed_attention.attend`: axis 0 numbers batch entries and KV heads, axis 1 parts of the tokens.

    states: words of keys, their scales, words of values, their scales. KEY, VALUE: see `packed_attention.constants`.
    SIZES: of a key, of a value, and of both as powers of two, that of a value first. HEADS: KV heads, query heads that
    share one, queries. ROWS: query rows, as a power of two; and those of keys and of values, times their blocks. new:
    see `packed_attention.Next`. exact, EXACT: of what the last program attends to; see `exact_tokens.py`.
    """
    batch, kv_head = (tl.program_id(0) // HEADS[0]).to(tl.int64), (tl.program_id(0) % HEADS[0]).to(tl.int64)
    states, strides = _states_of_head(states, strides, batch, kv_head)
    mask += batch * mask_strides[0]
    # fmt: off
    loaded, tokens, blocks, last, newest = begin(
        query, states, position, new, exact[7], mask, tokens, batch, kv_head, query_strides, strides, new_strides,
        mask_strides, KEY, SIZES, HEADS, ROWS, BLOCK, UP_TO_POSITION, NEW, ROTATE, EXACT, MASK, DEPENDENT, INTERPRETED,
    )
    row = tl.arange(0, ROWS[0])
    rows = (kv_head.to(tl.int32) * HEADS[1] + row % HEADS[1], row // HEADS[1], row < HEADS[1] * HEADS[2])
    if EXACT is not None and tl.program_id(1) == tl.num_programs(1) - 1:
        store_exact_partial(
            scratch, exact, exact_strides, batch, kv_head, mask, mask_strides, scale, last, newest,
            SIZES, HEADS, ROWS, VALUE[4][0], EXACT, MASK, MASK_OF_ROWS, INTERPRETED,
        )
    else:
        planes, scales = queries(loaded, scale, ROWS, KEY)
        running_max, denominator, acc = _attend_to_blocks(
            planes, states, strides, mask, mask_strides, rows, scales, tokens, blocks,
            KEY, VALUE, ROWS, BLOCK, SLICES, 0 if EXACT is None else EXACT[1], MASK, MASK_OF_ROWS, INTERPRETED,
        )
        _store_partial(scratch, running_max, denominator, acc, SIZES, ROWS, VALUE)
    # fmt: on
    if arrives_last(counters + tl.program_id(0), tl.num_programs(1)):
        total, y = combine_partials(scratch, SIZES[1], SIZES[2], ROWS[0], CHUNK)
        at, y = (batch * HEADS[0] * HEADS[1] + rows[0]) * HEADS[2] + rows[1], y * VALUE[4][0]
        store_rows(result, at, rows[2], total, y, SIZES[1], SIZES[2], ROUNDING, INTERPRETED)


@triton.jit
def _halves(x):
    """The first and the second half of slices, `[slices, ...]`."""
    HALF: tl.constexpr = x.shape[0] // 2
    if len(x.shape) == 2:
        pairs = tl.permute(tl.reshape(x, (2, HALF, x.shape[1])), (1, 2, 0))
    else:
        pairs = tl.permute(tl.reshape(x, (2, HALF, x.shape[1], x.shape[2])), (1, 2, 3, 0))
    return tl.split(pairs)


@triton.jit
def _store_partial(
    scratch, running_max, denominator, acc, SIZES: tl.constexpr, ROWS: tl.constexpr, VALUE: tl.constexpr
):
    """Store the partial result of a program for the last one to combine."""
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    row = program * ROWS[0] + tl.arange(0, ROWS[0])
    numerators, max_pointers, denominator_pointers = partial_pointers(scratch, row, SIZES[1], 1, ROWS[0])
    # Halves of the slices, in place of a reduction: that would move a few values at a time, with two barriers each.
    largest = running_max
    for _ in tl.static_range(4):
        if largest.shape[0] > 1:
            low, high = _halves(largest)
            largest = tl.maximum(low, high)
    full_max = tl.reshape(largest, (ROWS[0],))
    factors = tl.exp(running_max - full_max[None, :])
    sums, denominator = _own_blocks(acc, VALUE) * tl.expand_dims(factors, 2), denominator * factors
    for _ in tl.static_range(4):
        if sums.shape[0] > 1:
            low, high = _halves(sums)
            sums = low + high
            low, high = _halves(denominator)
            denominator = low + high
    sums = tl.reshape(sums, (ROWS[0], VALUE[1][1] * VALUE[0][4]))
    column = tl.arange(0, VALUE[1][1] * VALUE[0][4])
    element = element_of(column // VALUE[0][4], column % VALUE[0][4], VALUE)
    in_bounds = (element < SIZES[1]) & (column // VALUE[0][4] < VALUE[1][0])
    tl.store(numerators + element[None, :], sums, mask=in_bounds[None, :])
    tl.store(max_pointers, full_max)
    tl.store(denominator_pointers, tl.reshape(denominator, (ROWS[0],)))
