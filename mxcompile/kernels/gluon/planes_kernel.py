"""The kernel of gluon/planes_linear.py: the weight is the left operand, `acc[out, tokens]`, decoded in registers.

Plain Triton lets the two warpgroups of a program decode at the same time, while the tensor core idles. Here warps have
roles, and meet only at the barriers of some stages of 128 columns in shared memory:

* a producer warp brings 128 columns after 128 columns of x, words and scales by TMA. What lies outside of a tensor is
  zero: tokens beyond the last, columns beyond the last (of x; the weight's are stored as zeros), rows beyond the last
  tile of 64. A slab of 6 bits has 256 columns: each half comes with its own word and the one that both share;
* a consumer warpgroup, or two, multiplies its share of the tile's outputs: while a plane's product runs it decodes the
  next plane, that of the next 128 columns too, and while it waits, the other one's products run.

A tile's result goes through one stage (two, if it is that large) to memory by TMA. A program may take tile after tile
(`Config.persistent`): the producer then fetches the next tile's first columns while the consumers finish this one.

**Split K** as in triton/planes_linear.py: partial sums in float32 to memory, each thread's side by side, and the last
warpgroup to arrive at its share of a tile adds them in the order of the splits.

CUT holds what `gluon_planes.constants` says: tokens and outputs of a tile, consumers, stages, group, whether there is a
bias, parts of K.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton/elements.py: strict checking has nothing true to say about jit functions.

import triton.language as tl

from mxcompile.kernels.gluon.hopper import (
    NEW,
    fence_async_shared,
    fetch,
    from_lines,
    gl,
    in_lines,
    jit,
    mbarrier,
    next_stage,
    send_result,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mxcompile.kernels.triton.planes_linear import _place


@jit
def _values(w0, w1, s, plane: tl.constexpr, SHAPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """A plane of the slab that the words and scales belong to, `[n, 32]` in bfloat16."""
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
    """The stages for x, each as two of half the columns."""
    if NEW:
        view = xs.reinterpret(gl.bfloat16, [xs.shape[0] * 2, xs.shape[1], 64], xs.layout)
    else:
        view = xs._reinterpret(gl.bfloat16, [xs.shape[0] * 2, xs.shape[1], 64], xs.layout)
    return view


@jit
def _staged(ws, ss, stage, which, WORDS: tl.constexpr, CONSUMERS: tl.constexpr, LEFT: tl.constexpr):
    """A stage's words (the second is the first where there is one) and scales, of the rows of consumer `which`."""
    ROWS: tl.constexpr = ws.shape[1] * 64
    w0 = ws.index((stage * WORDS) * CONSUMERS + which).reshape([ROWS, 32]).load(LEFT)
    w1 = w0
    if WORDS > 1:
        w1 = ws.index((stage * WORDS + 1) * CONSUMERS + which).reshape([ROWS, 32]).load(LEFT)
    return w0, w1, ss.index(stage * CONSUMERS + which).reshape([ROWS]).load(gl.SliceLayout(1, LEFT))


@jit
def _part_of_k(unit, slabs, SPLIT: tl.constexpr):
    """Parts of a tile follow each other: the first slab of this one, and the first of the next."""
    part = unit % SPLIT
    return part * slabs // SPLIT, (part + 1) * slabs // SPLIT


@jit
def _produce(descriptors, buffers, bars, sizes, SHAPE: tl.constexpr, CUT: tl.constexpr):
    """One warp: brings 128 columns after 128 columns, tile after tile, wherever the consumers have left a stage."""
    x, words, scales = descriptors
    xs, ws, ss = buffers
    full, empty = bars
    m_size, n_size, slabs = sizes
    TILE_M: tl.constexpr = CUT[0]
    TILE_N: tl.constexpr = CUT[1]
    CONSUMERS: tl.constexpr = CUT[2]
    STAGES: tl.constexpr = CUT[3]
    SPLIT: tl.constexpr = CUT[6]
    WORDS: tl.constexpr = min(SHAPE[1], 2)
    HALVES: tl.constexpr = SHAPE[0] // 4
    PART: tl.constexpr = TILE_N // 64 // CONSUMERS
    BYTES: tl.constexpr = TILE_M * 256 + TILE_N * (64 * WORDS + 4)
    units = gl.cdiv(m_size, TILE_M) * gl.cdiv(n_size, TILE_N) * SPLIT
    stage = 0
    phase = 1
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        m_tile, n_tile = _place(unit // SPLIT, m_size, n_size, TILE_M, TILE_N, CUT[4])
        start, end = _part_of_k(unit, slabs, SPLIT)
        for slab in range(start, end):
            for half in gl.static_range(HALVES):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                fence_async_shared()
                mbarrier.expect(bar, BYTES)
                for which in gl.static_range(CONSUMERS):
                    first = n_tile * (TILE_N // 64) + which * PART
                    for w in gl.static_range(WORDS):  # of 6 bits the half's own, then the one that both share
                        word = slab * SHAPE[1] + (w if HALVES == 1 else half * (1 - w) + 2 * w)
                        fetch(words, [first, word, 0, 0], bar, ws.index((stage * WORDS + w) * CONSUMERS + which))
                    fetch(scales, [first, slab * HALVES + half, 0], bar, ss.index(stage * CONSUMERS + which))
                fetch(x, [m_tile * TILE_M, (slab * HALVES + half) * 128], bar, xs.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
        for _ in gl.static_range((TILE_N + 127) // 128):  # stages for the result
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.arrive(full.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)


@jit
def _multiply(values, columns, plane: tl.constexpr, acc):
    """Issues the product of a plane; `columns` `[tokens, 128]` of x."""
    return warpgroup_mma(values, columns.slice(32 * plane, 32, dim=1).permute((1, 0)), acc, is_async=True)


@jit
def _all_parts(acc, partial, counter, unit, which, MMA: tl.constexpr, CUT: tl.constexpr):
    """The sums of all parts of K if this warpgroup is the last one to come here with its own, and whether it is."""
    SPLIT: tl.constexpr = CUT[6]
    SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
    LINES: tl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    line = gl.arange(0, SIZE // 512, gl.SliceLayout(1, LINES)).expand_dims(1) * 512
    line += gl.arange(0, 512, gl.SliceLayout(0, LINES)).expand_dims(0)
    step = CUT[2] * SIZE
    gl.store(partial + (unit.to(gl.int64) * step + which * SIZE) + line, in_lines(acc, LINES))
    thread_barrier()
    arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLIT - 1:
        gl.store(counter, 0)
        place = partial + ((unit // SPLIT * SPLIT).to(gl.int64) * step + which * SIZE) + line
        lines = gl.load(place, cache_modifier=".cg")
        for _ in range(1, SPLIT):
            place += step
            lines += gl.load(place, cache_modifier=".cg")
        acc = from_lines(lines, acc.shape[0], MMA)
    return acc, arrived == SPLIT - 1


@jit
def _finish(acc, outputs, xs, bars, sizes, tensors, lift, unit, which, place, MMA: tl.constexpr, CUT: tl.constexpr):
    """Sums to results, through stages that the producer leaves for them; the next stage and its phase."""
    stage, phase = place
    full, empty = bars
    m_size, n_size, _ = sizes
    bias, partial, counters = tensors
    TILE_N: tl.constexpr = CUT[1]
    ROWS: tl.constexpr = TILE_N // CUT[2]
    tile = unit // CUT[6]
    m_tile, n_tile = _place(tile, m_size, n_size, CUT[0], TILE_N, CUT[4])
    m, first = m_tile * CUT[0], n_tile * TILE_N + which * ROWS
    complete = True
    if CUT[6] > 1:
        acc, complete = _all_parts(acc, partial, counters + (tile * CUT[2] + which), unit, which, MMA, CUT)
    acc = acc * lift
    if CUT[5]:
        n = first + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
        acc += gl.load(bias + n, mask=n < n_size, other=0.0).to(gl.float32).expand_dims(1)
    result = acc.to(gl.bfloat16)
    for i in gl.static_range((TILE_N + 127) // 128):
        mbarrier.wait(full.index(stage), phase)
        if complete:
            if ROWS == 64:
                _send(outputs, m, first, result, _halves(xs).index(stage * 2 + which))
            elif i == which:
                _send(outputs, m, first, result, xs.index(stage))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, CUT[3])
    return stage, phase


@jit
def _send(outputs, m, n, result, buffer):
    """A share of a tile to the tensor of the weight that it belongs to."""
    ys, starts = outputs
    for i in gl.static_range(len(ys)):
        if len(ys) == 1 or (n >= starts[i] and n < starts[i + 1]):
            send_result(ys[i], m, n - starts[i], result, buffer)


@jit
def _consume(
    outputs, buffers, bars, sizes, tensors, lift, which, SHAPE: tl.constexpr, ASSEMBLY: tl.constexpr, CUT: tl.constexpr
):
    """One warpgroup: its share of the tile's rows."""
    xs, ws, ss = buffers
    full, empty = bars
    m_size, n_size, slabs = sizes
    TILE_M: tl.constexpr = CUT[0]
    TILE_N: tl.constexpr = CUT[1]
    CONSUMERS: tl.constexpr = CUT[2]
    STAGES: tl.constexpr = CUT[3]
    SPLIT: tl.constexpr = CUT[6]
    WORDS: tl.constexpr = min(SHAPE[1], 2)
    HALVES: tl.constexpr = SHAPE[0] // 4
    ROWS: tl.constexpr = TILE_N // CONSUMERS
    MMA: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_M, 16])
    LEFT: tl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    units = gl.cdiv(m_size, TILE_M) * gl.cdiv(n_size, TILE_N) * SPLIT
    stage = 0
    phase = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        start, end = _part_of_k(unit, slabs, SPLIT)
        gl.assume(start < end)  # with a way around the loop, ptxas makes every wgmma wait for the one before it
        mbarrier.wait(full.index(stage), phase)
        w0, w1, s = _staged(ws, ss, stage, which, WORDS, CONSUMERS, LEFT)
        even = _values(w0, w1, s, 0, SHAPE, ASSEMBLY)
        acc = gl.zeros([ROWS, TILE_M], gl.float32, MMA)
        for slab in range(start, end):
            for half in gl.static_range(HALVES):
                columns = xs.index(stage)
                done = empty.index(stage)
                acc = _multiply(even, columns, 0, acc)
                odd = _values(w0, w1, s, 4 * half + 1, SHAPE, ASSEMBLY)
                acc = warpgroup_mma_wait(0, deps=[acc])
                acc = _multiply(odd, columns, 1, acc)
                even = _values(w0, w1, s, 4 * half + 2, SHAPE, ASSEMBLY)
                acc = warpgroup_mma_wait(0, deps=[acc])
                acc = _multiply(even, columns, 2, acc)
                odd = _values(w0, w1, s, 4 * half + 3, SHAPE, ASSEMBLY)
                stage, phase = next_stage(stage, phase, STAGES)
                mbarrier.wait(full.index(stage), phase, pred=half < HALVES - 1 or slab + 1 < end)
                # After the last slab these are not the tile's, and neither multiplied.
                w0, w1, s = _staged(ws, ss, stage, which, WORDS, CONSUMERS, LEFT)
                acc = warpgroup_mma_wait(0, deps=[acc])
                acc = _multiply(odd, columns, 3, acc)
                even = _values(w0, w1, s, 4 * ((half + 1) % HALVES), SHAPE, ASSEMBLY)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(done, count=1)
        place = (stage, phase)
        stage, phase = _finish(acc, outputs, xs, bars, sizes, tensors, lift, unit, which, place, MMA, CUT)


@jit(do_not_specialize=["lift", "m_size", "n_size", "slabs", "second", "third"])
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
    lift,
    m_size,
    n_size,
    slabs,
    second,
    third,
    SHAPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CUT: tl.constexpr,
):
    TILE_M: tl.constexpr = CUT[0]
    CONSUMERS: tl.constexpr = CUT[2]
    STAGES: tl.constexpr = CUT[3]
    PART: tl.constexpr = CUT[1] // 64 // CONSUMERS
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE_M, 128], x.layout)
    WORDS: tl.constexpr = min(SHAPE[1], 2)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES * WORDS * CONSUMERS, PART, 1, 64, 32], words.layout)
    ss = gl.allocate_shared_memory(gl.int32, [STAGES * CONSUMERS, PART, 1, 64], scales.layout)
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
    sizes = (m_size, n_size, slabs)
    tensors = (bias, partial, counters)
    ys = (y0,)
    if y2 is not None:
        ys = (y0, y1, y2)
    elif y1 is not None:
        ys = (y0, y1)
    outputs = (ys, (0, second, third, n_size))
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (outputs, buffers, bars, sizes, tensors, lift, 0, SHAPE, ASSEMBLY, CUT)),
                (_consume, (outputs, buffers, bars, sizes, tensors, lift, 1, SHAPE, ASSEMBLY, CUT)),
                (_produce, (descriptors, buffers, bars, sizes, SHAPE, CUT)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (outputs, buffers, bars, sizes, tensors, lift, 0, SHAPE, ASSEMBLY, CUT)),
                (_produce, (descriptors, buffers, bars, sizes, SHAPE, CUT)),
            ],
            [1],
            [24],
        )
