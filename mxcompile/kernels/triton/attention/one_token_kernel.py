"""The kernel of single-token attention: `one_token.py` launches it and says what it computes.

The keys of a head group are split among programs. Each loads the queries again in every turn of its loop over blocks of
keys, so that these loads overlap with the first of the keys. The denominators of a block's keys are added up after the
loop. A new token is attended to by the last program, which also writes its key and value to the cache; what the cache
held in its place is masked.
"""

# ruff: noqa: N803, N806, RUF005  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxcompile.kernels.triton.elements import arrives_last, narrow, widen
from mxcompile.kernels.triton.quantize import rounded_rows
from mxcompile.kernels.triton.reductions import maximum, plus

FLOAT32_LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
FLOAT32_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def multiply(a, b, acc, INTERPRETED: tl.constexpr):
    """`a @ b + acc`; the interpreter multiplies bfloat16 as float32."""
    if INTERPRETED:
        result = tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    else:
        result = tl.dot(a, b, acc, input_precision="ieee")
    return result


@triton.jit
def _load_rows(pointer, index, stride, inside, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Rows `index` as `[rows, LANES]`; zero where not `inside` and beyond `SIZE`."""
    lane = tl.arange(0, LANES)
    in_bounds = inside[:, None] if SIZE == LANES else inside[:, None] & (lane < SIZE)[None, :]
    return tl.load(pointer + index.to(tl.int64)[:, None] * stride + lane[None, :], mask=in_bounds, other=0.0)


@triton.jit
def load_rotated(
    pointer,
    index,
    stride,
    inside,
    rotation,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Rows `index`, with RoPE if `ROTATE`: x * cos + [-x[half:], x[:half]] * sin, in float32, rounded once."""
    x = _load_rows(pointer, index, stride, inside, SIZE, LANES)
    if ROTATE:
        lane = tl.arange(0, LANES)
        partner = tl.where(lane < SIZE // 2, lane + SIZE // 2, lane - SIZE // 2)
        in_bounds = inside[:, None] & (lane < SIZE)[None, :]
        other = tl.load(pointer + index.to(tl.int64)[:, None] * stride + partner[None, :], mask=in_bounds, other=0.0)
        cos = widen(tl.load(rotation[0] + lane, mask=lane < SIZE, other=0.0))[None, :]
        sin = widen(tl.load(rotation[1] + lane, mask=lane < SIZE, other=0.0))[None, :]
        sin = tl.where((lane < SIZE // 2)[None, :], -sin, sin)
        turned = widen(x) * cos + widen(other) * sin
        x = narrow(turned, x.dtype) if INTERPRETED else turned.to(x.dtype)
    return x


@triton.jit
def _wait_for_previous_kernel(cache, strides, first, keys, BLOCK: tl.constexpr, SIZES: tl.constexpr):
    """Prefetch the first keys and values into L2, which the previous kernel does not write, and wait for it."""
    gdc_launch_dependents()
    k = tl.minimum(first + tl.arange(0, BLOCK), keys - 1).to(tl.int64)[:, None]
    prefetch(cache[0] + k * strides[1] + tl.arange(0, (SIZES[2] + 63) // 64)[None, :] * 64)
    prefetch(cache[1] + k * strides[2] + tl.arange(0, (SIZES[3] + 63) // 64)[None, :] * 64)
    gdc_wait()


@triton.jit
def prefetch(pointers):
    """Prefetch the cache lines of addresses into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load_mask(mask, head, k, in_bounds, inside, strides, MASK: tl.constexpr, MASK_OF_HEADS: tl.constexpr):
    """The mask of keys `[rows or 1, keys]`; anything if there is none."""
    values = k[None, :]
    if MASK != "":
        if MASK_OF_HEADS:
            offsets = head[:, None] * strides[1] + (k.to(tl.int64) * strides[2])[None, :]
            values = tl.load(mask + offsets, mask=in_bounds[:, None] & inside[None, :], other=0)
        else:
            values = tl.load(mask + k.to(tl.int64) * strides[2], mask=inside, other=0)[None, :]
    return values


@triton.jit
def _masked(scores, mask_values, inside, MASK: tl.constexpr):
    """Apply the mask to scores `[rows, keys]`; -inf where a key is not `inside`."""
    if MASK == "bool":
        scores = tl.where(mask_values != 0, scores, float("-inf"))
    elif MASK == "float":
        scores += widen(mask_values)
    return tl.where(inside[None, :], scores, float("-inf"))


@triton.jit
def _softmax_step(scores, values, running_max, denominators, acc, INTERPRETED: tl.constexpr):
    """Update the running maximum, the denominators of each key of a block, and the weighted sum of values with another
    block of keys."""
    new_max = tl.maximum(running_max, tl.reduce(scores, 1, maximum))
    exponentials = tl.exp(scores - new_max[:, None])
    rescale = tl.exp(running_max - new_max)
    denominators = denominators * rescale[:, None] + exponentials
    rounded = narrow(exponentials, values.dtype) if INTERPRETED else exponentials.to(values.dtype)
    return new_max, denominators, multiply(rounded, values, acc * rescale[:, None], INTERPRETED)


@triton.jit
def _softmax_step_of_one(scores, value, running_max, denominator, acc, INTERPRETED: tl.constexpr):
    """The same with one key: scores `[rows, 1]` and its value `[1, VLANES]`."""
    new_max = tl.maximum(running_max, tl.reduce(scores, 1, maximum))
    exponentials = tl.exp(scores - new_max[:, None])
    rescale = tl.exp(running_max - new_max)
    denominator = denominator * rescale + tl.reduce(exponentials, 1, plus)
    rounded = narrow(exponentials, value.dtype) if INTERPRETED else exponentials.to(value.dtype)
    return new_max, denominator, acc * rescale[:, None] + widen(rounded) * widen(value)


@triton.jit
def _store_row(pointer, row, inside, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Store a row `[1, LANES]`."""
    lane = tl.arange(0, LANES)
    tl.store(pointer + lane[None, :], row, mask=inside[:, None] & (lane < SIZE)[None, :])


@triton.jit
def _attend_to_cache(
    query,
    cache,
    strides,
    rotation,
    mask,
    heads,
    scale,
    place,
    keys,
    blocks,
    SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_HEADS: tl.constexpr,
    APPEND: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Maximum scores, denominators and weighted sums of values over blocks `blocks[0]` to `blocks[1]` of the keys.

    strides: those of queries, keys and values from row to row, and those of the mask. heads: their numbers, and which
    exist.
    """
    running_max = tl.full((16,), FLOAT32_LOWEST, tl.float32)
    denominators = tl.full((16, BLOCK), 0.0, tl.float32)
    acc = tl.full((16, SIZES[3]), 0.0, tl.float32)
    k = blocks[0] * BLOCK + tl.arange(0, BLOCK)
    next_mask = _load_mask(mask, heads[0], k, heads[1], k < keys, strides[3], MASK, MASK_OF_HEADS)
    for block in range(blocks[0], blocks[1]):
        k = block * BLOCK + tl.arange(0, BLOCK)
        inside = k < keys
        # Not copied ahead as keys and values are, so a block ahead in registers.
        mask_values = next_mask
        next_mask = _load_mask(mask, heads[0], k + BLOCK, heads[1], k + BLOCK < keys, strides[3], MASK, MASK_OF_HEADS)
        # Loop-invariant, but hidden from the compiler: the load overlaps with that of the keys instead of preceding it.
        pointer = query + (block >> 30) * 16
        q = load_rotated(pointer, heads[0], strides[0], heads[1], rotation, SIZES[0], SIZES[2], ROTATE, INTERPRETED)
        key_block = _load_rows(cache[0], k, strides[1], inside, SIZES[0], SIZES[2])
        value_block = _load_rows(cache[1], k, strides[2], inside, SIZES[1], SIZES[3])
        scores = multiply(q, tl.trans(key_block), tl.full((16, BLOCK), 0.0, tl.float32), INTERPRETED) * scale
        if APPEND:
            inside &= k != place
        scores = _masked(scores, mask_values, inside, MASK)
        running_max, denominators, acc = _softmax_step(scores, value_block, running_max, denominators, acc, INTERPRETED)
    return running_max, tl.reduce(denominators, 1, plus), acc


@triton.jit
def _attend_to_new(
    query,
    cache,
    new,
    strides,
    rotation,
    mask,
    heads,
    scale,
    place,
    keys,
    partial,
    SIZES: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write the new key, rotated, and the new value to the cache at `place`, and attend to them; otherwise as above."""
    one = tl.arange(0, 1)
    q = load_rotated(query, heads[0], strides[0], heads[1], rotation, SIZES[0], SIZES[2], ROTATE, INTERPRETED)
    k = load_rotated(new[0], one, 0, one == 0, rotation, SIZES[0], SIZES[2], ROTATE, INTERPRETED)
    v = _load_rows(new[1], one, 0, one == 0, SIZES[1], SIZES[3])
    inside = (place + one >= 0) & (place + one < keys)
    _store_row(cache[0] + place * strides[1], k, inside, SIZES[0], SIZES[2])
    _store_row(cache[1] + place * strides[2], v, inside, SIZES[1], SIZES[3])
    scores = tl.expand_dims(tl.reduce(widen(q) * widen(k), 1, plus), 1) * scale
    mask_values = _load_mask(mask, heads[0], place + one, heads[1], inside, strides[3], MASK, MASK_OF_HEADS)
    scores = _masked(scores, mask_values, inside, MASK)
    return _softmax_step_of_one(scores, v, partial[0], partial[1], partial[2], INTERPRETED)


@triton.jit(do_not_specialize=["scale", "keys", "blocks_per_split"])
def attend_kernel(
    query,
    cache,
    new,
    rotation,
    position,
    mask,
    result,
    scratch,
    counters,
    scale,
    keys,
    blocks_per_split,
    query_strides,
    cache_strides,
    new_strides,
    mask_strides,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_HEADS: tl.constexpr,
    APPEND: tl.constexpr,
    ROTATE: tl.constexpr,
    ROUNDING: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program of `attention.attend`: axis 0 numbers batch entries and head groups, axis 1 parts of the keys.

    SIZES: of a key and of a value, and both as powers of two. HEADS: KV heads, and query heads that share one.
    """
    PARTS: tl.constexpr = (HEADS[1] + 15) // 16
    split = tl.program_id(1)
    batch = (tl.program_id(0) // (PARTS * HEADS[0])).to(tl.int64)
    kv_head = (tl.program_id(0) // PARTS % HEADS[0]).to(tl.int64)
    row = tl.program_id(0) % PARTS * 16 + tl.arange(0, 16)
    heads = ((kv_head * HEADS[1] + row).to(tl.int32), row < HEADS[1])
    query += batch * query_strides[0]
    mask += batch * mask_strides[0]
    cache = (
        cache[0] + batch * cache_strides[0] + kv_head * cache_strides[1],
        cache[1] + batch * cache_strides[3] + kv_head * cache_strides[4],
    )
    rotation = (rotation[0] + batch * new_strides[4], rotation[1] + batch * new_strides[5])
    strides = (query_strides[1], cache_strides[2], cache_strides[5], mask_strides)
    if DEPENDENT:
        _wait_for_previous_kernel(cache, strides, split * blocks_per_split * BLOCK, keys, BLOCK, SIZES)
    place = tl.load(position).to(tl.int64) if APPEND else tl.full((), -1, tl.int64)
    blocks = (split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, (keys + BLOCK - 1) // BLOCK))
    # fmt: off
    running_max, denominator, acc = _attend_to_cache(
        query, cache, strides, rotation, mask, heads, scale, place, keys, blocks,
        SIZES, BLOCK, MASK, MASK_OF_HEADS, APPEND, ROTATE, INTERPRETED,
    )
    if APPEND and split == tl.num_programs(1) - 1:
        new_key = new[0] + batch * new_strides[0] + kv_head * new_strides[1]
        new_value = new[1] + batch * new_strides[2] + kv_head * new_strides[3]
        running_max, denominator, acc = _attend_to_new(
            query, cache, (new_key, new_value), strides, rotation, mask, heads, scale, place, keys,
            (running_max, denominator, acc), SIZES, MASK, MASK_OF_HEADS, ROTATE, INTERPRETED,
        )
    _finish(
        result, scratch, counters, batch * HEADS[0] + kv_head, (running_max, denominator, acc),
        SIZES, HEADS, ROWS, CHUNK, SPLIT, ROUNDING, INTERPRETED,
    )
    # fmt: on


@triton.jit
def _finish(
    result,
    scratch,
    counters,
    group,
    partial,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    ROUNDING: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Store the result, or a partial one for the last program of a head group to combine. group: of query heads."""
    first = tl.program_id(0) % ((HEADS[1] + 15) // 16) * 16
    if SPLIT:
        _store_partial(scratch, partial[0], partial[1], partial[2], SIZES[1], SIZES[3], ROWS)
        if arrives_last(counters + tl.program_id(0), tl.num_programs(1)):
            full_denominator, full_acc = combine_partials(scratch, SIZES[1], SIZES[3], ROWS, CHUNK)
            row = first + tl.arange(0, ROWS)
            inside = row < HEADS[1]
            head = group * HEADS[1] + row
            store_rows(result, head, inside, full_denominator, full_acc, SIZES[1], SIZES[3], ROUNDING, INTERPRETED)
    else:
        row = first + tl.arange(0, 16)
        head = group * HEADS[1] + row
        store_rows(result, head, row < HEADS[1], partial[1], partial[2], SIZES[1], SIZES[3], ROUNDING, INTERPRETED)


@triton.jit
def partial_pointers(scratch, row, VSIZE: tl.constexpr, VLANES: tl.constexpr, ROWS: tl.constexpr):
    """Scratch pointers to the weighted sums, maximum scores and denominators of rows, numbered across all programs."""
    rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * ROWS
    numerator_pointers = scratch + tl.expand_dims(row * VSIZE, -1) + tl.arange(0, VLANES)
    return numerator_pointers, scratch + rows * VSIZE + row, scratch + rows * (VSIZE + 1) + row


@triton.jit
def _store_partial(
    scratch, running_max, denominator, acc, VSIZE: tl.constexpr, VLANES: tl.constexpr, ROWS: tl.constexpr
):
    """Store the partial result of a program for the last one to combine."""
    row = tl.arange(0, 16)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    numerator_pointers, max_pointers, denominator_pointers = partial_pointers(
        scratch, program * ROWS + row, VSIZE, VLANES, ROWS
    )
    tl.store(numerator_pointers, acc, mask=(row < ROWS)[:, None] & (tl.arange(0, VLANES) < VSIZE)[None, :])
    tl.store(max_pointers, running_max, mask=row < ROWS)
    tl.store(denominator_pointers, denominator, mask=row < ROWS)


@triton.jit
def combine_partials(scratch, VSIZE: tl.constexpr, VLANES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Denominators and weighted sums of `ROWS` rows over all programs of a head group, in the order of the keys.

    No load of a chunk waits for another, none has a mask that differs between parts, addresses differ by constants, and
    nothing moves between threads: a load under a condition stays behind the arithmetic of the part before. So the
    last chunk reads up to `CHUNK - 1` parts too many, for which the scratch must have room.
    """
    splits = tl.num_programs(1)
    row = tl.arange(0, ROWS)
    first = tl.program_id(0).to(tl.int64) * splits * ROWS + row
    numerators, maxima, denominators = partial_pointers(scratch, first, VSIZE, VLANES, ROWS)
    running_max = tl.full((ROWS,), FLOAT32_LOWEST, tl.float32)
    denominator = tl.full((ROWS,), 0.0, tl.float32)
    acc = tl.full((ROWS, VLANES), 0.0, tl.float32)
    for begin in range(0, splits, CHUNK):
        parts, sums, part_maxima, new_max = (), (), (), running_max
        for i in tl.static_range(CHUNK):
            pointers = numerators + i * ROWS * VSIZE
            if VSIZE == VLANES:
                parts = parts + (tl.load(pointers, cache_modifier=".cg"),)
            else:
                inside = (tl.arange(0, VLANES) < VSIZE)[None, :]
                parts = parts + (tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg"),)
            sums = sums + (tl.load(denominators + i * ROWS, cache_modifier=".cg"),)
            part_max = tl.load(maxima + i * ROWS, cache_modifier=".cg")
            part_max = tl.where(begin + i < splits, part_max, float("-inf"))
            part_maxima = part_maxima + (part_max,)
            new_max = tl.maximum(new_max, part_max)
        rescale = tl.exp(running_max - new_max)
        denominator, acc, running_max = denominator * rescale, acc * rescale[:, None], new_max
        for i in tl.static_range(CHUNK):
            weight = tl.exp(part_maxima[i] - new_max)
            denominator += tl.where(begin + i < splits, sums[i], 0.0) * weight
            acc += tl.where(begin + i < splits, parts[i], 0.0) * weight[:, None]
        numerators += CHUNK * ROWS * VSIZE
        maxima += CHUNK * ROWS
        denominators += CHUNK * ROWS
    return denominator, acc


@triton.jit
def store_rows(
    result,
    head,
    in_bounds,
    denominator,
    acc,
    VSIZE: tl.constexpr,
    VLANES: tl.constexpr,
    ROUNDING: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Divide by the denominator, round to the result's dtype, then as `ROUNDING` says, store; heads are numbered across
    the batch."""
    lane = tl.arange(0, VLANES)
    y = acc / tl.maximum(denominator, FLOAT32_TINY)[:, None]
    if INTERPRETED or ROUNDING is not None:
        y = narrow(y, result.dtype.element_ty)
    if ROUNDING is not None:
        y = narrow(rounded_rows(widen(y), ROUNDING), result.dtype.element_ty)
    tl.store(
        result + head[:, None] * VSIZE + lane[None, :],
        y.to(result.dtype.element_ty),
        mask=in_bounds[:, None] & (lane < VSIZE)[None, :],
    )
