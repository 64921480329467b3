"""The product of expert_slices.py with the weight in registers: no K-step of it passes through shared memory.

    acc[slice, out, choice] += plane[slice, out, 128] @ x[slice, 128, choice]

A thread loads 16 bytes, eight words of a row, four threads a row. Those are the elements that it holds as the left
operand of mma.sync if column 8 t + w h + i of a plane, i < w, is taken as column 4 w h + w t + i of the product; x is
loaded in the same order. So loads, as many K-steps ahead as there are registers for, need neither a barrier nor the
previous kernel, whose result only x is: `load_ahead` comes before the wait for it, `multiply_held` after.

Rows of a program, `[SLICES * TILE_N]`: eight of a slice, eight of the next one, and so on, as mma.sync has them. With
two HALVES, the first eight rows of a slice and the second eight are the same outputs with different parts of K: of the
products, `[row, half]`, those count whose row is of that half.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton
import triton.language as tl

from mxcompile.kernels.triton.decode_planes import plane_values
from mxcompile.kernels.triton.planes_linear import concatenate_planes, multiply

_WIDTH: tl.constexpr = tl.constexpr(4 if triton.__version__.startswith(("3.6.", "3.7.")) else 2)
"""w above, how many adjacent columns of mma.sync's left operand Triton gives a thread: with another one, it would move
the words between threads, four instructions for each."""


@triton.jit
def slice_of_rows(TILE_N: tl.constexpr, SLICES: tl.constexpr):
    """The slice of each row, `[SLICES * TILE_N]`."""
    return tl.arange(0, SLICES * TILE_N) // 8 % SLICES


@triton.jit
def rows_of_slices(row, TILE_N: tl.constexpr, SLICES: tl.constexpr):
    """What each row of a slice has, `[TILE_N]`, for the rows of all slices."""
    rows = tl.reshape(row, (TILE_N // 8, 1, 8))
    return tl.reshape(tl.broadcast_to(rows, (TILE_N // 8, SLICES, 8)), (SLICES * TILE_N,))


@triton.jit
def _part_of_rows(PARTS: tl.constexpr, HALVES: tl.constexpr, TILE_N: tl.constexpr, SLICES: tl.constexpr):
    """The part of K of each row, `[SLICES * TILE_N]`, of `PARTS * HALVES`."""
    half = tl.arange(0, SLICES * TILE_N) // (8 * SLICES) % HALVES
    return slice_of_rows(TILE_N, SLICES) % PARTS * HALVES + half


@triton.jit
def offsets_of_rows(
    row,
    k_steps,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    SHAPE: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Where rows `[SLICES * TILE_N]` of an expert's weight begin: offsets of words and of scales from the expert's."""
    first = row // 64 * k_steps + _part_of_rows(PARTS, HALVES, TILE_N, SLICES)
    return first * (SHAPE[1] * 64 * 32) + row % 64 * 32, first * (SHAPE[0] // 4 * 64) + row % 64


@triton.jit
def sizes_of_experts(out, k_steps, SHAPE: tl.constexpr):
    """Words and scales of one expert."""
    k_steps = (out // 64).to(tl.int64) * k_steps
    return k_steps * (SHAPE[1] * 64 * 32), k_steps * (SHAPE[0] // 4 * 64)


@triton.jit
def load_words(pointers, mask, POLICY: tl.constexpr, MASKED: tl.constexpr):
    """A load that is masked if it must be."""
    if MASKED:
        values = tl.load(pointers, mask=tl.broadcast_to(mask, pointers.shape), other=0, eviction_policy=POLICY)
    else:
        values = tl.load(pointers, eviction_policy=POLICY)
    return values


@triton.jit
def load_scales(scales, offsets, mask, MASKED: tl.constexpr, WARPS: tl.constexpr):
    """Scales at offsets, `[rows]`. Triton loads what has fewer elements than threads where it is needed, without shared
    memory; so in two halves."""
    ROWS: tl.constexpr = offsets.shape[0]
    if ROWS < 32 * WARPS:
        result = load_words(scales + offsets, mask, "", MASKED)
    else:
        low, high = tl.split(tl.permute(tl.reshape(offsets, (2, ROWS // 2)), (1, 0)))
        low_mask, high_mask = tl.split(tl.permute(tl.reshape(mask, (2, ROWS // 2)), (1, 0)))
        both = tl.join(load_words(scales + low, low_mask, "", MASKED), load_words(scales + high, high_mask, "", MASKED))
        result = tl.reshape(tl.permute(both, (1, 0)), (ROWS,))
    return result


@triton.jit
def _load_k_step(
    words,
    scales,
    word,
    scale,
    stored,
    k_steps,
    step: tl.constexpr,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    SHAPE: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    MASKED: tl.constexpr,
    UNEVEN: tl.constexpr,
):
    """Words and scales of K-step `step` of each slice; those that the format lacks repeat others."""
    skipped: tl.constexpr = step * PARTS * HALVES
    mask = stored & (_part_of_rows(PARTS, HALVES, TILE_N, SLICES) + skipped < k_steps) if UNEVEN else stored
    # A constant that is added last is part of the load instruction.
    w = words + (word[:, None] + tl.arange(0, 32)[None, :]) + skipped * (SHAPE[1] * 64 * 32)
    s = scales + skipped * (SHAPE[0] // 4 * 64)
    w0 = load_words(w, mask[:, None], "evict_first", MASKED)
    w1 = load_words(w + 2048, mask[:, None], "evict_first", MASKED) if SHAPE[1] > 1 else w0
    w2 = load_words(w + 4096, mask[:, None], "evict_first", MASKED) if SHAPE[1] > 2 else w0
    s0 = load_scales(s, scale, mask, MASKED, SLICES)
    s1 = load_scales(s + 64, scale, mask, MASKED, SLICES) if SHAPE[0] > 4 else s0
    return w0, w1, w2, s0, s1


@triton.jit
def load_ahead(
    words,
    scales,
    word,
    scale,
    stored,
    k_steps,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    SOME: tl.constexpr,
    SHAPE: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    HELD: tl.constexpr,
    UNEVEN: tl.constexpr,
):
    """Words and scales of the first HELD K-steps of each slice, a tuple; slice s has K-steps `s % PARTS + i * PARTS`.

    word, scale: offsets of each row of the weight, `[SLICES * TILE_N]`; stored: whether it is to be read, if only SOME
    are.
    """
    held = ()
    for step in tl.static_range(HELD):
        held = held + _load_k_step(
            words, scales, word, scale, stored, k_steps, step, PARTS, HALVES, SHAPE, TILE_N, SLICES, SOME or UNEVEN,
            UNEVEN,
        )  # fmt: skip
    return held


@triton.jit
def decode_ahead(
    held,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    HELD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Values `[SLICES, TILE_N, 128]` of what `load_ahead` made, in the order of the product; two for each K-step, the
    second of which may repeat the first."""
    values = ()
    for step in tl.static_range(HELD):
        values = values + _values(held, step, SHAPE, FIELDS, ASSEMBLY, TILE_N, SLICES, INTERPRETED)
    return values


@triton.jit
def _values(
    held,
    step: tl.constexpr,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    v0 = _quad(held, step, 0, SHAPE, FIELDS, ASSEMBLY, TILE_N, SLICES, INTERPRETED)
    v1 = _quad(held, step, 1, SHAPE, FIELDS, ASSEMBLY, TILE_N, SLICES, INTERPRETED) if SHAPE[0] > 4 else v0
    return v0, v1


@triton.jit
def _quad(
    held,
    step: tl.constexpr,
    quad: tl.constexpr,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Four planes of K-step `step` of what is held."""
    w0, w1, w2 = held[5 * step], held[5 * step + 1], held[5 * step + 2]
    s0, s1 = held[5 * step + 3], held[5 * step + 4]
    values = concatenate_planes(
        plane_values(w0, w1, w2, s0, s1, 4 * quad, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
        plane_values(w0, w1, w2, s0, s1, 4 * quad + 1, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
        plane_values(w0, w1, w2, s0, s1, 4 * quad + 2, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
        plane_values(w0, w1, w2, s0, s1, 4 * quad + 3, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
    )
    values = tl.reshape(values, (TILE_N // 8, SLICES, 8, 4, 4, 8 // _WIDTH, _WIDTH))
    return tl.reshape(tl.permute(values, (1, 0, 2, 3, 5, 4, 6)), (SLICES, TILE_N, 128))


@triton.jit
def multiply_decoded(
    values,
    rows,
    inside,
    k_size,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    SHAPE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    HELD: tl.constexpr,
    PADDED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The products `[SLICES, TILE_N, TILE_M]` of each slice with what `decode_ahead` made; as `multiply_held`."""
    xs = ()
    for step in tl.static_range(HELD):
        xs = xs + load_x(rows, inside, k_size, step, PARTS, HALVES, SHAPE, SLICES, PADDED)
    total = tl.full((SLICES, TILE_N, TILE_M), 0.0, tl.float32)
    for step in tl.static_range(HELD):
        acc = tl.full((SLICES, TILE_N, TILE_M), 0.0, tl.float32)  # sums that do not wait for each other
        for quad in tl.static_range(SHAPE[0] // 4):
            acc = multiply(values[2 * step + quad], xs[2 * step + quad], acc, INTERPRETED)
        total += acc
    return total


@triton.jit
def multiply_held(
    held,
    rows,
    inside,
    words,
    scales,
    word,
    scale,
    stored,
    k_size,
    k_steps,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    SOME: tl.constexpr,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    HELD: tl.constexpr,
    STEPS: tl.constexpr,
    UNEVEN: tl.constexpr,
    PADDED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The products `[SLICES, TILE_N, TILE_M]` of each slice; as K-steps are used, those after the first HELD of all
    STEPS are loaded. rows, inside: as for `multiply_slices`; the rest as for `load_ahead`, which made `held`."""
    acc = tl.full((SLICES, TILE_N, TILE_M), 0.0, tl.float32)
    xs = ()
    for step in tl.static_range(HELD):
        xs = xs + load_x(rows, inside, k_size, step, PARTS, HALVES, SHAPE, SLICES, PADDED)
    for step in tl.static_range(STEPS):
        if step + HELD < STEPS:
            held = held + _load_k_step(
                words, scales, word, scale, stored, k_steps, step + HELD, PARTS, HALVES, SHAPE, TILE_N, SLICES,
                SOME or UNEVEN, UNEVEN,
            )  # fmt: skip
            xs = xs + load_x(rows, inside, k_size, step + HELD, PARTS, HALVES, SHAPE, SLICES, PADDED)
        acc = multiply_k_step(acc, held, xs, step, SHAPE, FIELDS, ASSEMBLY, TILE_N, SLICES, INTERPRETED)
    return acc


@triton.jit
def multiply_k_step(
    acc,
    held,
    xs,
    step: tl.constexpr,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """acc plus the product of K-step `step` of each slice, of those that are loaded."""
    for quad in tl.static_range(SHAPE[0] // 4):
        values = _quad(held, step, quad, SHAPE, FIELDS, ASSEMBLY, TILE_N, SLICES, INTERPRETED)
        acc = multiply(values, xs[2 * step + quad], acc, INTERPRETED)
    return acc


@triton.jit
def load_x(
    rows,
    inside,
    k_size,
    step: tl.constexpr,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    SHAPE: tl.constexpr,
    SLICES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The columns of K-step `step` of each slice in the order of the product, twice 128; the second may repeat them."""
    part = (tl.arange(0, SLICES) % PARTS * HALVES)[:, None, None] + tl.arange(0, HALVES)[None, None, :]
    column = tl.arange(0, 128)
    thread, run = column % (4 * _WIDTH) // _WIDTH, column % 32 // (4 * _WIDTH)
    column = column // 32 * 32 + thread * 8 + run * _WIDTH + column % _WIDTH
    column = tl.max_contiguous(tl.multiple_of(column, _WIDTH), _WIDTH)[None, :, None]
    k = (step * PARTS * HALVES + part) * (SHAPE[0] * 32) + column
    present = inside & (k < k_size) if PADDED else inside
    pointers = rows + k
    x0 = tl.load(pointers, mask=tl.broadcast_to(present, pointers.shape), other=0.0)
    x1 = x0
    if SHAPE[0] > 4:
        present = inside & (k + 128 < k_size) if PADDED else inside
        x1 = tl.load(pointers + 128, mask=tl.broadcast_to(present, pointers.shape), other=0.0)
    return x0, x1
