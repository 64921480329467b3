"""y = x @ dequantize(w).T + bias for a weight in planes (planes.py), for many tokens: Gluon, Hopper (sm_90) only.

The same product as triton_planes.py's, and the weight is the left operand there as here: `acc[out, tokens]`, decoded in
registers. Plain Triton lets the two warpgroups of a program decode at the same time, while the tensor core idles. Here
warps have roles, and meet only at the barriers of `stages` slabs in shared memory:

* a producer warp brings 128 columns after 128 columns of x, words and scales by TMA. What lies outside of a tensor is
  zero: tokens beyond the last, columns beyond the last (of x; the weight's are stored as zeros), rows beyond the last
  tile of 64. A slab of 6 bits has 256 columns: each half comes with its own word and the one that both share;
* a consumer warpgroup, or two, multiplies its share of the tile's outputs: while a plane's product runs it decodes the
  next plane, that of the next 128 columns too, and while it waits, the other one's products run.

A tile's result goes through one stage (two, if it is that large) to memory by TMA. A program may take tile after tile
(`Config.persistent`): the producer then fetches the next tile's first columns while the consumers finish this one.

**Split K** as in triton_planes.py: partial sums in float32 to memory, each thread's side by side, and the last
warpgroup to arrive at its share of a tile adds them in the order of the splits.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton_elements.py: strict checking has nothing true to say about jit functions. Host code is fully typed.

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
import triton.language as tl
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat
from mxcompile.kernels.gluon_hopper import (
    NEW,
    NO_GLUON,
    TensorDescriptor,
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
from mxcompile.kernels.planes import Planes
from mxcompile.kernels.triton_decode import layout_constants
from mxcompile.kernels.triton_elements import capability, multiprocessors, unsupported_device
from mxcompile.kernels.triton_planes import MOST_WEIGHTS, _place


@dataclass(frozen=True)
class Config:
    """How a product is cut: `rows` tokens x `out` outputs (64, 128 or 256) a program, K in `split` parts.

    stages: how many times 128 columns are on their way. group: how many tiles of tokens run side by side for the same
    outputs (for L2). persistent: as many programs as the GPU can run at once, each of which takes tile after tile.
    """

    rows: int = 256
    out: int = 128
    stages: int = 3
    group: int = 8
    persistent: bool = True
    split: int = 1

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 1 if self.out == 64 else 2


def supports(x: Tensor) -> str | None:
    """None if `linear` can serve `x`, or the reason why not."""
    if x.dtype != torch.bfloat16:
        return f"planes are decoded to bfloat16, the activation is {str(x.dtype).removeprefix('torch.')}"
    if reason := unsupported_device(x) or NO_GLUON:
        return reason
    if (found := capability(x.device)) != (9, 0):
        return f"the Gluon kernel needs compute capability 9.0, this GPU has {found[0]}.{found[1]}"
    if x.shape[-1] % 8 or any(stride % 8 for stride in x.stride()[:-1]) or x.data_ptr() % 16:
        return "the Gluon kernel needs an activation whose rows begin at multiples of 16 bytes"
    return None


def linear(x: Tensor, planes: Planes, bias: Tensor | None, config: Config, counters: Tensor | None = None) -> Tensor:
    """`x @ dequantize(w).T + bias`, summed in float32 and rounded once: x `[..., in]`, y `[..., out]`.

    For what `supports` has no objection to. counters: as for `linear` in triton_planes.py.
    """
    return linears(x, planes, [planes.out], bias, config, counters)[0]


def linears(
    x: Tensor,
    planes: Planes,
    outs: Sequence[int],
    bias: Tensor | None,
    config: Config,
    counters: Tensor | None = None,
) -> list[Tensor]:
    """`linear` in one launch for up to three weights that lie behind each other in `planes`: `outs` rows of it each.

    `outs` of several are multiples of `config.out`. bias: of all of them, `[planes.out]`. See `linear` for the rest.
    """
    _check(x, planes, outs, bias, config)
    rows, slabs = math.prod(x.shape[:-1]), planes.words.shape[1]
    # TMA wants rows at multiples of 16 bytes.
    wide = [torch.empty((rows, -(-out // 8) * 8), dtype=x.dtype, device=x.device) for out in outs]
    ys = [y[:, :out] for y, out in zip(wide, outs, strict=True)]
    if rows:
        flat, config = x.reshape(rows, planes.size), replace(config, split=min(config.split, slabs))
        tiles = -(-rows // config.rows) * -(-planes.out // config.out)
        units = programs = tiles * config.split
        if config.persistent:
            programs = min(units, multiprocessors(x.device) * (3 - config.consumers))
        partial = wide[0]
        if config.split > 1:
            partial = torch.empty(units * config.rows * config.out, dtype=torch.float32, device=x.device)
            if counters is None:
                counters = torch.zeros(counters_needed(rows, planes, config), dtype=torch.int32, device=x.device)
        tensors = [
            ("x", flat if flat.stride(1) == 1 and flat.stride(0) >= planes.size else flat.contiguous()),
            ("words", planes.words.view(planes.words.shape[0], -1, 64, 32)),
            ("scales", planes.scales.view(planes.words.shape[0], -1, 64)),
            *(("y", y) for y in ys),
        ]
        described = [TensorDescriptor.from_tensor(t, *block(name, config)) for name, t in tensors]
        with torch.cuda.device(x.device):
            cast(Any, _planes_kernel)[(programs,)](
                *described,
                *[None] * (MOST_WEIGHTS - len(outs)),
                wide[0] if bias is None else bias.contiguous(),
                partial,
                wide[0] if counters is None else counters,
                2.0**planes.lift,
                rows,
                planes.out,
                slabs,
                *(sum(outs[:i]) for i in range(1, MOST_WEIGHTS)),
                **constants(planes.fmt, config, bias is not None),
                **options(config),
            )
    return [y.contiguous().view(*x.shape[:-1], y.shape[1]) for y in ys]


def _check(x: Tensor, planes: Planes, outs: Sequence[int], bias: Tensor | None, config: Config) -> None:
    """Shapes that disagree would make the kernel write out of bounds."""
    unlike = x.shape[-1] != planes.size or (bias is not None and bias.shape != (planes.out,))
    if unlike or sum(outs) != planes.out:
        raise MXCompileError(f"a linear of {planes.size} inputs and {planes.out} outputs cannot take {tuple(x.shape)}")
    if len(outs) > MOST_WEIGHTS or (len(outs) > 1 and any(out % config.out for out in outs)):
        raise MXCompileError(f"weights of {list(outs)} outputs are not cut by tiles of {config.out}")


def counters_needed(rows: int, planes: Planes, config: Config) -> int:
    """Warpgroups' shares of the output, each of which needs a counter if K is split."""
    return -(-rows // config.rows) * -(-planes.out // config.out) * config.consumers


@cache
def block(name: str, config: Config) -> tuple[list[int], Any]:
    """What TMA moves at once of a tensor that the kernel takes, and its layout in shared memory."""
    part = config.out // config.consumers
    shape, dtype = {
        "x": ([config.rows, 128], gl.bfloat16),
        "words": ([part // 64, 1, 64, 32], gl.int16),
        "scales": ([part // 64, 1, 64], gl.int32),
        "y": ([config.rows, part], gl.bfloat16),
    }[name]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, dtype)


@cache
def constants(fmt: MXFormat, config: Config, has_bias: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    layout = layout_constants(fmt)
    cut = (config.rows, config.out, config.consumers, config.stages, config.group, has_bias, config.split)
    return {"SHAPE": layout["SHAPE"], "ASSEMBLY": layout["ASSEMBLY"], "CUT": cut}


def options(config: Config) -> dict[str, Any]:
    """What the compiler is told: three warpgroups (one is the producer's) share all registers, two half of them."""
    return {"num_warps": 4, "maxnreg": 168 if config.consumers == 2 else 128, "enable_fp_fusion": True}


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
                    for w in gl.static_range(WORDS):
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
