"""What a program of `packed_attention_kernel.py` does first: it waits for the previous kernel, loads queries, and, if
the last block is its own, writes the new token before it reads the block.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxcompile.kernels.triton.attention.append_packed import append_state
from mxcompile.kernels.triton.attention.exact_tokens import count_newest
from mxcompile.kernels.triton.attention.one_token_kernel import prefetch
from mxcompile.kernels.triton.attention.packed_queries import load_queries


@triton.jit
def _blocks_of_program(tokens, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """The blocks of packed tokens that are this program's: as many as others have, or fewer at the end."""
    parts = tl.num_programs(1) if EXACT is None else tl.num_programs(1) - 1
    blocks = (tokens + BLOCK - 1) // BLOCK
    share = (blocks + parts - 1) // parts
    return tl.program_id(1) * share, tl.minimum(tl.program_id(1) * share + share, blocks)


@triton.jit
def _up_to(position, tokens):
    """How many tokens there are up to a position, which may be outside."""
    return tl.minimum(tokens, tl.maximum(position.to(tl.int32), 0) + 1)


@triton.jit
def _wait_for_previous_kernel(
    states, strides, mask, mask_strides, first, tokens, BLOCK: tl.constexpr, MASK: tl.constexpr
):
    """Prefetch the first two blocks into L2, of which the previous kernel writes one token at most, and wait for it."""
    token = tl.minimum(first + tl.arange(0, 2 * BLOCK), tokens - 1).to(tl.int64)
    for part in tl.static_range(4):
        prefetch(states[part] + token * strides[part])
    if MASK != "":
        prefetch(mask + token * mask_strides[3])
    gdc_wait()


@triton.jit
def _bytes(pointer):
    return pointer.to(tl.int64).to(tl.pointer_type(tl.uint8))


@triton.jit
def _append(new, rotation, states, strides, place, tokens, NEW: tl.constexpr, ROTATE: tl.constexpr):
    """Round the new token's key and value, and write them to their place; nothing where that is outside. new: pointers
    to those of a head."""
    inside = ((place + tl.arange(0, 1) >= 0) & (place + tl.arange(0, 1) < tokens))[:, None]
    keys, key_scales = _bytes(states[0] + place * strides[0]), _bytes(states[1] + place * strides[1])
    values, value_scales = _bytes(states[2] + place * strides[2]), _bytes(states[3] + place * strides[3])
    KEY: tl.constexpr = tl.constexpr(NEW[0])
    VALUE: tl.constexpr = tl.constexpr(NEW[1])
    append_state(new[0], rotation, keys, key_scales, inside, KEY, ROTATE)
    append_state(new[1], rotation, values, value_scales, inside, VALUE, False)
    tl.debug_barrier()  # the writes are read below


@triton.jit
def begin(
    query,
    states,
    position,
    new,
    held,
    mask,
    tokens,
    batch,
    kv_head,
    query_strides,
    strides,
    new_strides,
    mask_strides,
    KEY: tl.constexpr,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UP_TO_POSITION: tl.constexpr,
    NEW: tl.constexpr,
    ROTATE: tl.constexpr,
    EXACT: tl.constexpr,
    MASK: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Wait for the previous kernel, load the queries, and write the new token. Returns the queries; how many tokens are
    read as they are packed; the blocks of them that are this program's; the last token, and how many before it are
    exact."""
    room, newest = tokens, 0
    if DEPENDENT:
        gdc_launch_dependents()
        # The previous kernel may write the position: what is prefetched may be a token late.
        tokens = _up_to(tl.load(position), room) if UP_TO_POSITION else room
        first = _blocks_of_program(tokens, BLOCK, EXACT)[0] * BLOCK
        _wait_for_previous_kernel(states, strides, mask, mask_strides, first, room, BLOCK, MASK)
    place = tl.load(position) if UP_TO_POSITION else room - 1
    query += batch * query_strides[0] + kv_head * HEADS[1] * query_strides[1]
    rotation = (new[2] + batch * new_strides[4], new[3] + batch * new_strides[5])
    loaded = load_queries(query, query_strides, rotation, SIZES, HEADS, ROWS, KEY, ROTATE, INTERPRETED)
    tokens = _up_to(place, room) if UP_TO_POSITION else room
    last = tokens - 1
    if EXACT is not None:
        newest = count_newest(held, last, EXACT)
        tokens = last - newest if EXACT[0] > 0 else tokens
    blocks = _blocks_of_program(tokens, BLOCK, EXACT)
    if NEW is not None and (blocks[0] * BLOCK <= last) & (blocks[1] * BLOCK > last):
        token = (
            new[0] + batch * new_strides[0] + kv_head * new_strides[1],
            new[1] + batch * new_strides[2] + kv_head * new_strides[3],
        )
        _append(token, rotation, states, strides, place.to(tl.int64), room, NEW, ROTATE)
    return loaded, tokens, blocks, last, newest
