"""The kernel of gluon/planes_linear.py: the weight is the left operand, `acc[out, tokens]`, decoded in registers.

In plain Triton the two warpgroups of a program decode at the same time, while the tensor core idles. Here warps are
specialized and synchronize only at the barriers of a few stages of 128 columns in shared memory:

* a producer warp loads x, words and scales by TMA, 128 columns at a time. Out-of-bounds loads give zeros: tokens beyond
  the last, columns of x beyond the last (those of the weight are stored as zeros), rows beyond the last tile of 64. A
  K-step of a 6-bit format has 256 columns: each half is loaded with its own word and the word that both share;
* one or two consumer warpgroups multiply their share of the tile's outputs. While the wgmma of a plane runs, a consumer
  decodes the next plane, also across stages; while it waits, the wgmma of the other consumer runs.

The result of a tile is stored by TMA through one stage (or two, if it needs them). A persistent program
(`Config.persistent`) processes tile after tile: the producer loads the first columns of the next tile while the
consumers finish the current one.

**Split-K** as in triton/planes_linear.py: partial sums are stored in float32, coalesced, and the last warpgroup to
arrive at its share of a tile adds them in the order of the splits.

**Grouped mode** (gluon/grouped_planes.py): every tile of tokens belongs to one expert, `block_experts[m_tile]`, whose
weight and bias it is multiplied with; `used` tiles, a number in memory, hold tokens. `words` and `scales` then have the
experts one after the other, and `n_size` is the number of outputs of one.

CONFIG is the tuple of `planes_linear.constants`: tokens and outputs of a tile, consumers, stages, group, whether there
is a bias, split.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton.language as tl

from mxcompile.kernels.gluon.hopper import (
    HAS_REINTERPRET,
    fence_async_shared,
    fetch,
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
from mxcompile.kernels.triton.planes_linear import _tile_position


@jit
def _values(w0, w1, s, plane: tl.constexpr, SHAPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """One plane of a K-step from its words and scales, `[n, 32]` in bfloat16."""
    PLANES: tl.constexpr = SHAPE[0]
    word = w1 if SHAPE[1] == 2 and 2 * plane >= PLANES else w0
    pair = ((s >> (8 * (plane % 4))) & 0xFF) * 0x00800080
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
def _k_range(work_item, k_steps, SPLIT: tl.constexpr):
    """First and end K-step of a work item; the splits of a tile are consecutive work items."""
    part = work_item % SPLIT
    return part * k_steps // SPLIT, (part + 1) * k_steps // SPLIT


@jit
def _expert(block_experts, m_tile):
    """The expert that a tile of tokens belongs to; 0 where there is one weight."""
    expert = 0
    if block_experts is not None:
        expert = gl.load(block_experts + m_tile)
    return expert


@jit
def _produce(descriptors, buffers, bars, sizes, block_experts, SHAPE: tl.constexpr, CONFIG: tl.constexpr):
    """The producer warp: loads 128 columns at a time, tile after tile, into every stage that the consumers release."""
    x, words, scales = descriptors
    xs, ws, ss = buffers
    full, empty = bars
    m_size, n_size, k_steps = sizes
    TILE_M: tl.constexpr = CONFIG[0]
    TILE_N: tl.constexpr = CONFIG[1]
    CONSUMERS: tl.constexpr = CONFIG[2]
    STAGES: tl.constexpr = CONFIG[3]
    SPLIT: tl.constexpr = CONFIG[6]
    WORDS: tl.constexpr = min(SHAPE[1], 2)
    HALVES: tl.constexpr = SHAPE[0] // 4
    TILES: tl.constexpr = TILE_N // 64 // CONSUMERS
    BYTES: tl.constexpr = TILE_M * 256 + TILE_N * (64 * WORDS + 4)
    work_items = gl.cdiv(m_size, TILE_M) * gl.cdiv(n_size, TILE_N) * SPLIT
    stage = 0
    phase = 1
    for work_item in range(gl.program_id(0), work_items, gl.num_programs(0)):
        m_tile, n_tile = _tile_position(work_item // SPLIT, m_size, n_size, TILE_M, TILE_N, CONFIG[4])
        first_tile = n_tile * (TILE_N // 64) + _expert(block_experts, m_tile) * (n_size // 64)
        start, end = _k_range(work_item, k_steps, SPLIT)
        for k_step in range(start, end):
            for half in gl.static_range(HALVES):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                fence_async_shared()
                mbarrier.expect(bar, BYTES)
                for consumer in gl.static_range(CONSUMERS):
                    first = first_tile + consumer * TILES
                    for w in gl.static_range(WORDS):  # 6 bits: the word of this half, then the shared one
                        word = k_step * SHAPE[1] + (w if HALVES == 1 else half * (1 - w) + 2 * w)
                        fetch(words, [first, word, 0, 0], bar, ws.index((stage * WORDS + w) * CONSUMERS + consumer))
                    fetch(scales, [first, k_step * HALVES + half, 0], bar, ss.index(stage * CONSUMERS + consumer))
                fetch(x, [m_tile * TILE_M, (k_step * HALVES + half) * 128], bar, xs.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
        for _ in gl.static_range((TILE_N + 127) // 128):  # stages for the result
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.arrive(full.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)


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
    consumer,
    pipeline_state,
    MMA: tl.constexpr,
    CONFIG: tl.constexpr,
):
    """Scale, add the bias, store through stages that the producer left free. Returns the next stage and its phase."""
    stage, phase = pipeline_state
    full, empty = bars
    m_size, n_size, _ = sizes
    bias, partial, counters, block_experts = tensors
    TILE_N: tl.constexpr = CONFIG[1]
    ROWS: tl.constexpr = TILE_N // CONFIG[2]
    tile = work_item // CONFIG[6]
    m_tile, n_tile = _tile_position(tile, m_size, n_size, CONFIG[0], TILE_N, CONFIG[4])
    m, first = m_tile * CONFIG[0], n_tile * TILE_N + consumer * ROWS
    complete = True
    if CONFIG[6] > 1:
        acc, complete = _reduce_split_k(
            acc, partial, counters + (tile * CONFIG[2] + consumer), work_item, consumer, MMA, CONFIG
        )
    acc = acc * lift
    if CONFIG[5]:
        n = first + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
        bias += _expert(block_experts, m_tile) * n_size
        acc += gl.load(bias + n, mask=n < n_size, other=0.0).to(gl.float32).expand_dims(1)
    result = acc.to(gl.bfloat16)
    for i in gl.static_range((TILE_N + 127) // 128):
        mbarrier.wait(full.index(stage), phase)
        if complete:
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
def _consume(
    outputs,
    buffers,
    bars,
    sizes,
    tensors,
    lift,
    consumer,
    SHAPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONFIG: tl.constexpr,
):
    """A consumer warpgroup: multiplies its share of the tile's outputs."""
    xs, ws, ss = buffers
    full, empty = bars
    m_size, n_size, k_steps = sizes
    TILE_M: tl.constexpr = CONFIG[0]
    TILE_N: tl.constexpr = CONFIG[1]
    CONSUMERS: tl.constexpr = CONFIG[2]
    STAGES: tl.constexpr = CONFIG[3]
    SPLIT: tl.constexpr = CONFIG[6]
    WORDS: tl.constexpr = min(SHAPE[1], 2)
    HALVES: tl.constexpr = SHAPE[0] // 4
    ROWS: tl.constexpr = TILE_N // CONSUMERS
    MMA: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_M, 16])
    OPERAND_A: tl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    work_items = gl.cdiv(m_size, TILE_M) * gl.cdiv(n_size, TILE_N) * SPLIT
    stage = 0
    phase = 0
    for work_item in range(gl.program_id(0), work_items, gl.num_programs(0)):
        start, end = _k_range(work_item, k_steps, SPLIT)
        gl.assume(start < end)  # if the loop could be skipped, ptxas would serialize all wgmma
        mbarrier.wait(full.index(stage), phase)
        w0, w1, s = _load_stage(ws, ss, stage, consumer, WORDS, CONSUMERS, OPERAND_A)
        even = _values(w0, w1, s, 0, SHAPE, ASSEMBLY)
        acc = gl.zeros([ROWS, TILE_M], gl.float32, MMA)
        for k_step in range(start, end):
            for half in gl.static_range(HALVES):
                columns = xs.index(stage)
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
        pipeline_state = (stage, phase)
        stage, phase = _epilogue(
            acc, outputs, xs, bars, sizes, tensors, lift, work_item, consumer, pipeline_state, MMA, CONFIG
        )


@jit(do_not_specialize=["lift", "m_size", "n_size", "k_steps", "second", "third"])
def _planes_kernel(
    x,
    words,
    scales,
    y0,
    y1,
    y2,
    bias,
    partial,
    counters,
    block_experts,
    used,
    lift,
    m_size,
    n_size,
    k_steps,
    second,
    third,
    SHAPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONFIG: tl.constexpr,
):
    TILE_M: tl.constexpr = CONFIG[0]
    CONSUMERS: tl.constexpr = CONFIG[2]
    STAGES: tl.constexpr = CONFIG[3]
    TILES: tl.constexpr = CONFIG[1] // 64 // CONSUMERS
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE_M, 128], x.layout)
    WORDS: tl.constexpr = min(SHAPE[1], 2)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES * WORDS * CONSUMERS, TILES, 1, 64, 32], words.layout)
    ss = gl.allocate_shared_memory(gl.int32, [STAGES * CONSUMERS, TILES, 1, 64], scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    thread_barrier()
    descriptors = (x, words, scales)
    buffers = (xs, ws, ss)
    bars = (full, empty)
    if block_experts is not None:
        m_size = gl.load(used) * TILE_M
    sizes = (m_size, n_size, k_steps)
    tensors = (bias, partial, counters, block_experts)
    ys = (y0,)
    if y2 is not None:
        ys = (y0, y1, y2)
    elif y1 is not None:
        ys = (y0, y1)
    outputs = (ys, (0, second, third, n_size))
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (outputs, buffers, bars, sizes, tensors, lift, 0, SHAPE, ASSEMBLY, CONFIG)),
                (_consume, (outputs, buffers, bars, sizes, tensors, lift, 1, SHAPE, ASSEMBLY, CONFIG)),
                (_produce, (descriptors, buffers, bars, sizes, block_experts, SHAPE, CONFIG)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (outputs, buffers, bars, sizes, tensors, lift, 0, SHAPE, ASSEMBLY, CONFIG)),
                (_produce, (descriptors, buffers, bars, sizes, block_experts, SHAPE, CONFIG)),
            ],
            [1],
            [24],
        )
