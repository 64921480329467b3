"""A consumer's share of one tile in gluon/planes_kernel.py: the loop over K, decoding weights, and the epilogue.

While the wgmma of a plane runs, the next plane is decoded, also across stages. The accumulators are scaled, summed over
split-K if it is used, and stored by TMA through stages that the producer left free, after the gate of an expert
(gated_epilogue.py) if there is one.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton.language as tl

from mxcompile.kernels.gluon.gated_epilogue import channel_rows, store_gated
from mxcompile.kernels.gluon.hopper import (
    HAS_REINTERPRET,
    first_tokens,
    from_coalesced,
    gl,
    jit,
    mbarrier,
    next_stage,
    store_tile,
    thread_barrier,
    to_coalesced,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mxcompile.kernels.triton.decode_planes import scale_pairs
from mxcompile.kernels.triton.planes_linear import _tile_position


@jit
def _values(w0, w1, s, plane: tl.constexpr, SHAPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """One plane of a K-step from its words and scales, `[n, 32]` in bfloat16."""
    PLANES: tl.constexpr = SHAPE[0]
    word = w1 if SHAPE[1] == 2 and 2 * plane >= PLANES else w0
    pair = scale_pairs(s, plane)
    addend = pair
    if SHAPE[3] != 0:
        addend = gl.inline_asm_elementwise(ASSEMBLY[PLANES], "=r,r", [pair], dtype=gl.int32, is_pure=True, pack=1)
    return gl.inline_asm_elementwise(
        ASSEMBLY[plane],
        "=r,r,r,r,r,r,r",
        [word, w1, pair.expand_dims(1).broadcast_to(word.shape), addend.expand_dims(1).broadcast_to(word.shape)],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@jit
def _halves(xs):
    """The x stages, each viewed as two of half the columns."""
    if HAS_REINTERPRET:
        view = xs.reinterpret(gl.bfloat16, [xs.shape[0] * 2, xs.shape[1], 64], xs.layout)
    else:
        view = xs._reinterpret(gl.bfloat16, [xs.shape[0] * 2, xs.shape[1], 64], xs.layout)
    return view


@jit
def _load_stage(ws, ss, stage, consumer, WORDS: tl.constexpr, CONSUMERS: tl.constexpr, OPERAND_A: tl.constexpr):
    """Words (the second is the first if there is only one) and scales of a stage, for the rows of `consumer`."""
    ROWS: tl.constexpr = ws.shape[1] * 64
    w0 = ws.index((stage * WORDS) * CONSUMERS + consumer).reshape([ROWS, 32]).load(OPERAND_A)
    w1 = w0
    if WORDS > 1:
        w1 = ws.index((stage * WORDS + 1) * CONSUMERS + consumer).reshape([ROWS, 32]).load(OPERAND_A)
    return w0, w1, ss.index(stage * CONSUMERS + consumer).reshape([ROWS]).load(gl.SliceLayout(1, OPERAND_A))


@jit
def k_range(work_item, k_steps, SPLIT: tl.constexpr):
    """First and end K-step of a work item; the splits of a tile are consecutive work items."""
    part = work_item % SPLIT
    return part * k_steps // SPLIT, (part + 1) * k_steps // SPLIT


@jit
def _multiply(values, columns, plane: tl.constexpr, acc):
    """Issue the wgmma of a plane; `columns`: `[tokens, 128]` of x."""
    return warpgroup_mma(values, columns.slice(32 * plane, 32, dim=1).permute((1, 0)), acc, is_async=True)


@jit
def _reduce_split_k(acc, partial, counter, work_item, consumer, MMA: tl.constexpr, CONFIG: tl.constexpr):
    """Store this warpgroup's partial sums; returns the total over all splits and True if it is the last to arrive."""
    SPLIT: tl.constexpr = CONFIG[6]
    SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
    COALESCED: tl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    offsets = gl.arange(0, SIZE // 512, gl.SliceLayout(1, COALESCED)).expand_dims(1) * 512
    offsets += gl.arange(0, 512, gl.SliceLayout(0, COALESCED)).expand_dims(0)
    step = CONFIG[2] * SIZE
    gl.store(partial + (work_item.to(gl.int64) * step + consumer * SIZE) + offsets, to_coalesced(acc, COALESCED))
    thread_barrier()
    arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLIT - 1:
        gl.store(counter, 0)
        pointers = partial + ((work_item // SPLIT * SPLIT).to(gl.int64) * step + consumer * SIZE) + offsets
        accumulators = gl.load(pointers, cache_modifier=".cg")
        for _ in range(1, SPLIT):
            pointers += step
            accumulators += gl.load(pointers, cache_modifier=".cg")
        acc = from_coalesced(accumulators, acc.shape[0], MMA)
    return acc, arrived == SPLIT - 1


@jit
def _epilogue(
    acc,
    outputs,
    xs,
    bars,
    sizes,
    tensors,
    lift,
    work_item,
    position,
    expert,
    consumer,
    pipeline_state,
    MMA: tl.constexpr,
    CONFIG: tl.constexpr,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Scale, add the bias, store through stages that the producer left free. Returns the next stage and its phase."""
    stage, phase = pipeline_state
    full, empty = bars
    m_size, n_size, _ = sizes
    bias, partial, counters = tensors
    TILE_N: tl.constexpr = CONFIG[1]
    ROWS: tl.constexpr = TILE_N // CONFIG[2]
    tile = work_item // CONFIG[6]
    if position is None:
        m_tile, n_tile = _tile_position(tile, m_size, n_size, CONFIG[0], TILE_N, CONFIG[4])
    else:
        m_tile, n_tile = position
    m, first = m_tile * CONFIG[0], n_tile * TILE_N + consumer * ROWS
    complete = True
    if CONFIG[6] > 1:
        acc, complete = _reduce_split_k(
            acc, partial, counters + (tile * CONFIG[2] + consumer), work_item, consumer, MMA, CONFIG
        )
    acc = acc * lift
    if CONFIG[5]:
        n = first + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
        inside = n < n_size
        if GATE is not None:
            n, inside = channel_rows(first // 2, ROWS, n_size, gl.SliceLayout(1, MMA), INTERLEAVED)
        acc += gl.load(bias + expert * n_size + n, mask=inside, other=0.0).to(gl.float32).expand_dims(1)
    result = acc.to(gl.bfloat16)
    for i in gl.static_range((TILE_N + 127) // 128):
        mbarrier.wait(full.index(stage), phase)
        if GATE is not None:
            if i == consumer:
                lower = _halves(xs).index(stage * 2)
                upper = _halves(xs).index(stage * 2 + 1)
                h = outputs[0][0]
                store_gated(h, m, first // 2, result, xs.index(stage), lower, upper, GATE, INTERLEAVED, ROUNDING)
        elif complete:
            if ROWS == 64:
                _store_share(outputs, m, first, result, _halves(xs).index(stage * 2 + consumer))
            elif i == consumer:
                _store_share(outputs, m, first, result, xs.index(stage))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, CONFIG[3])
    return stage, phase


@jit
def _store_share(outputs, m, n, result, buffer):
    """Store a consumer's share of a tile to the output of the weight that it belongs to."""
    ys, starts = outputs
    for i in gl.static_range(len(ys)):
        if len(ys) == 1 or (n >= starts[i] and n < starts[i + 1]):
            store_tile(ys[i], m, n - starts[i], result, buffer)


@jit
def multiply_tile(
    share,
    work_item,
    position,
    expert,
    pipeline_state,
    WIDTH: tl.constexpr,
    SHAPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONFIG: tl.constexpr,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """A consumer's share of a work item, for WIDTH tokens of the tile; returns the next stage and its phase."""
    outputs, buffers, bars, sizes, tensors, lift, consumer = share
    stage, phase = pipeline_state
    xs, ws, ss = buffers
    full, empty = bars
    CONSUMERS: tl.constexpr = CONFIG[2]
    STAGES: tl.constexpr = CONFIG[3]
    WORDS: tl.constexpr = min(SHAPE[1], 2)
    HALVES: tl.constexpr = SHAPE[0] // 4
    MMA: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    OPERAND_A: tl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    start, end = k_range(work_item, sizes[2], CONFIG[6])
    gl.assume(start < end)  # if the loop could be skipped, ptxas would serialize all wgmma
    mbarrier.wait(full.index(stage), phase)
    w0, w1, s = _load_stage(ws, ss, stage, consumer, WORDS, CONSUMERS, OPERAND_A)
    even = _values(w0, w1, s, 0, SHAPE, ASSEMBLY)
    acc = gl.zeros([CONFIG[1] // CONSUMERS, WIDTH], gl.float32, MMA)
    for k_step in range(start, end):
        for half in gl.static_range(HALVES):
            columns = first_tokens(xs.index(stage), WIDTH)
            release = empty.index(stage)
            acc = _multiply(even, columns, 0, acc)
            odd = _values(w0, w1, s, 4 * half + 1, SHAPE, ASSEMBLY)
            acc = warpgroup_mma_wait(0, deps=[acc])
            acc = _multiply(odd, columns, 1, acc)
            even = _values(w0, w1, s, 4 * half + 2, SHAPE, ASSEMBLY)
            acc = warpgroup_mma_wait(0, deps=[acc])
            acc = _multiply(even, columns, 2, acc)
            odd = _values(w0, w1, s, 4 * half + 3, SHAPE, ASSEMBLY)
            stage, phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase, pred=half < HALVES - 1 or k_step + 1 < end)
            # After the last K-step this loads another tile's data, which is not multiplied.
            w0, w1, s = _load_stage(ws, ss, stage, consumer, WORDS, CONSUMERS, OPERAND_A)
            acc = warpgroup_mma_wait(0, deps=[acc])
            acc = _multiply(odd, columns, 3, acc)
            even = _values(w0, w1, s, 4 * ((half + 1) % HALVES), SHAPE, ASSEMBLY)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(release, count=1)
    return _epilogue(
        acc, outputs, xs, bars, sizes, tensors, lift, work_item, position, expert, consumer, (stage, phase), MMA,
        CONFIG, GATE, INTERLEAVED, ROUNDING,
    )  # fmt: skip
