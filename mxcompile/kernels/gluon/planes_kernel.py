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
weight and bias it is multiplied with, and holds `block_tokens[m_tile]` tokens; `used`, a number in memory, is that of
tiles. `words` and `scales` then have the experts one after the other, and `n_size` is the number of outputs of one.

**With a gate** (grouped mode only; tiles of 256 outputs) a consumer's share is 64 gates and the values that belong to
them, and y0 is what gated_epilogue.py makes of them. Where gates and values are halves of the weight's rows (`PAIRED`),
words and scales are viewed with a dimension of 2 in front.

CONFIG is the tuple of `planes_linear.constants`: tokens and outputs of a tile, consumers, stages, group, whether there
is a bias, split.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton.language as tl

from mxcompile.kernels.gluon.hopper import fence_async_shared, fetch, gl, jit, mbarrier, next_stage, thread_barrier
from mxcompile.kernels.gluon.planes_tile import k_range, multiply_tile
from mxcompile.kernels.triton.planes_linear import _tile_position


@jit
def _first_position(n_size, CONFIG: tl.constexpr):
    """Token and output tile of a program's first work item in grouped mode, where all output tiles of a token tile
    follow each other."""
    n_tiles = gl.cdiv(n_size, CONFIG[1])
    return gl.program_id(0) // n_tiles, gl.program_id(0) % n_tiles


@jit
def _next_position(m_tile, n_tile, n_size, CONFIG: tl.constexpr):
    """The same of the next work item; no division by anything that changes."""
    n_tiles = gl.cdiv(n_size, CONFIG[1])
    m_tile += gl.num_programs(0) // n_tiles
    n_tile += gl.num_programs(0) % n_tiles
    beyond = n_tile >= n_tiles
    return gl.where(beyond, m_tile + 1, m_tile), gl.where(beyond, n_tile - n_tiles, n_tile)


@jit
def _fetch_words(words, tile, word, bar, into, PAIRED: tl.constexpr):
    """Load a word of a consumer's tiles, which begin at `tile`."""
    if PAIRED:
        fetch(words, [0, tile, word, 0, 0], bar, into)
    else:
        fetch(words, [tile, word, 0, 0], bar, into)


@jit
def _fetch_scales(scales, tile, step, bar, into, PAIRED: tl.constexpr):
    """Load the scales of 128 columns of a consumer's tiles, which begin at `tile`."""
    if PAIRED:
        fetch(scales, [0, tile, step, 0], bar, into)
    else:
        fetch(scales, [tile, step, 0], bar, into)


@jit
def _produce(
    descriptors, buffers, bars, sizes, blocks, SHAPE: tl.constexpr, CONFIG: tl.constexpr, PAIRED: tl.constexpr
):
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
    grouped_m, grouped_n = _first_position(n_size, CONFIG)
    for work_item in range(gl.program_id(0), work_items, gl.num_programs(0)):
        if blocks[0] is None:
            m_tile, n_tile = _tile_position(work_item // SPLIT, m_size, n_size, TILE_M, TILE_N, CONFIG[4])
            first_tile = n_tile * (TILE_N // 64)
        else:
            m_tile = grouped_m
            n_tile = grouped_n
            first_tile = n_tile * (CONSUMERS if PAIRED else TILE_N // 64) + gl.load(blocks[0] + m_tile) * (n_size // 64)
            grouped_m, grouped_n = _next_position(m_tile, n_tile, n_size, CONFIG)
        start, end = k_range(work_item, k_steps, SPLIT)
        for k_step in range(start, end):
            for half in gl.static_range(HALVES):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                fence_async_shared()
                mbarrier.expect(bar, BYTES)
                for consumer in gl.static_range(CONSUMERS):
                    first = first_tile + consumer * (1 if PAIRED else TILES)
                    for w in gl.static_range(WORDS):  # 6 bits: the word of this half, then the shared one
                        word = k_step * SHAPE[1] + (w if HALVES == 1 else half * (1 - w) + 2 * w)
                        _fetch_words(
                            words, first, word, bar, ws.index((stage * WORDS + w) * CONSUMERS + consumer), PAIRED
                        )
                    _fetch_scales(
                        scales, first, k_step * HALVES + half, bar, ss.index(stage * CONSUMERS + consumer), PAIRED
                    )
                fetch(x, [m_tile * TILE_M, (k_step * HALVES + half) * 128], bar, xs.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
        for _ in gl.static_range((TILE_N + 127) // 128):  # stages for the result
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.arrive(full.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)


@jit
def _consume(
    outputs,
    buffers,
    bars,
    sizes,
    tensors,
    blocks,
    lift,
    consumer,
    SHAPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONFIG: tl.constexpr,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """A consumer warpgroup: multiplies its share of the tile's outputs.

    In grouped mode a tile with few tokens is multiplied as one of half or a quarter of the size. Which one, and with
    which expert, is loaded one tile ahead.
    """
    TILE_M: tl.constexpr = CONFIG[0]
    QUARTER: tl.constexpr = max(TILE_M // 4, 16)
    HALF: tl.constexpr = max(TILE_M // 2, 16)
    work_items = gl.cdiv(sizes[0], TILE_M) * gl.cdiv(sizes[1], CONFIG[1]) * CONFIG[6]
    share = (outputs, buffers, bars, sizes, tensors, lift, consumer)
    stage = 0
    phase = 0
    if blocks[0] is None:
        for item in range(gl.program_id(0), work_items, gl.num_programs(0)):
            stage, phase = multiply_tile(
                share, item, None, 0, (stage, phase), TILE_M, SHAPE, ASSEMBLY, CONFIG, GATE, INTERLEAVED, ROUNDING
            )
    else:
        last = gl.maximum(sizes[0] // TILE_M - 1, 0)
        next_m, next_n = _first_position(sizes[1], CONFIG)
        next_expert = gl.load(blocks[0] + gl.minimum(next_m, last))
        next_tokens = gl.load(blocks[1] + gl.minimum(next_m, last))
        for item in range(gl.program_id(0), work_items, gl.num_programs(0)):
            at = (next_m, next_n)
            expert = next_expert
            tokens = next_tokens
            next_m, next_n = _next_position(next_m, next_n, sizes[1], CONFIG)
            next_expert = gl.load(blocks[0] + gl.minimum(next_m, last))
            next_tokens = gl.load(blocks[1] + gl.minimum(next_m, last))
            if tokens <= QUARTER:
                stage, phase = multiply_tile(
                    share, item, at, expert, (stage, phase), QUARTER, SHAPE, ASSEMBLY, CONFIG, GATE, INTERLEAVED,
                    ROUNDING,
                )  # fmt: skip
            elif tokens <= HALF:
                stage, phase = multiply_tile(
                    share, item, at, expert, (stage, phase), HALF, SHAPE, ASSEMBLY, CONFIG, GATE, INTERLEAVED, ROUNDING
                )
            else:
                stage, phase = multiply_tile(
                    share, item, at, expert, (stage, phase), TILE_M, SHAPE, ASSEMBLY, CONFIG, GATE, INTERLEAVED,
                    ROUNDING,
                )  # fmt: skip


@jit
def _allocate_stages(x, words, scales, WORDS: tl.constexpr, CONFIG: tl.constexpr, PAIRED: tl.constexpr):
    """Shared memory for x, words and scales of all stages."""
    CONSUMERS: tl.constexpr = CONFIG[2]
    STAGES: tl.constexpr = CONFIG[3]
    TILES: tl.constexpr = CONFIG[1] // 64 // CONSUMERS
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, CONFIG[0], 128], x.layout)
    if PAIRED:
        ws = gl.allocate_shared_memory(gl.int16, [STAGES * WORDS * CONSUMERS, TILES, 1, 1, 64, 32], words.layout)
        ss = gl.allocate_shared_memory(gl.int32, [STAGES * CONSUMERS, TILES, 1, 1, 64], scales.layout)
    else:
        ws = gl.allocate_shared_memory(gl.int16, [STAGES * WORDS * CONSUMERS, TILES, 1, 64, 32], words.layout)
        ss = gl.allocate_shared_memory(gl.int32, [STAGES * CONSUMERS, TILES, 1, 64], scales.layout)
    return xs, ws, ss


@jit
def _allocate_barriers(CONFIG: tl.constexpr):
    """Barriers of full and of empty stages."""
    STAGES: tl.constexpr = CONFIG[3]
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONFIG[2])
    fence_async_shared()
    thread_barrier()
    return full, empty


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
    block_tokens,
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
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    CONSUMERS: tl.constexpr = CONFIG[2]
    PAIRED: tl.constexpr = GATE is not None and not INTERLEAVED
    buffers = _allocate_stages(x, words, scales, min(SHAPE[1], 2), CONFIG, PAIRED)
    bars = _allocate_barriers(CONFIG)
    descriptors = (x, words, scales)
    blocks = (block_experts, block_tokens)
    if block_experts is not None:
        m_size = gl.load(used) * CONFIG[0]
    sizes = (m_size, n_size, k_steps)
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
                (_consume, (
                    outputs, buffers, bars, sizes, tensors, blocks, lift, 0, SHAPE, ASSEMBLY, CONFIG, GATE, INTERLEAVED,
                    ROUNDING,
                )),
                (_consume, (
                    outputs, buffers, bars, sizes, tensors, blocks, lift, 1, SHAPE, ASSEMBLY, CONFIG, GATE, INTERLEAVED,
                    ROUNDING,
                )),
                (_produce, (descriptors, buffers, bars, sizes, blocks, SHAPE, CONFIG, PAIRED)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    outputs, buffers, bars, sizes, tensors, blocks, lift, 0, SHAPE, ASSEMBLY, CONFIG, GATE, INTERLEAVED,
                    ROUNDING,
                )),
                (_produce, (descriptors, buffers, bars, sizes, blocks, SHAPE, CONFIG, PAIRED)),
            ],
            [1],
            [24],
        )  # fmt: skip
