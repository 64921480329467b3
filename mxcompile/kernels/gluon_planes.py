"""y = x @ dequantize(w).T + bias for a weight in planes (planes.py), for many tokens: Gluon, Hopper (sm_90) only.

The same product as triton_planes.py's, and the weight is the left operand there as here: `acc[out, tokens]`, decoded in
registers. Plain Triton lets the two warpgroups of a program decode at the same time, while the tensor core idles. Here
warps have roles, and meet only at the barriers of `stages` slabs in shared memory:

* a producer warp brings slab after slab of x, words and scales by TMA. What lies outside of a tensor is zero: tokens
  beyond the last, columns beyond the last (of x; the weight's are stored as zeros), rows beyond the last tile of 64;
* a consumer warpgroup, or two, multiplies its share of the tile's outputs: while a plane's product runs it decodes the
  next plane, that of the next slab too, and while it waits, the other one's products run.

A tile's result goes through one stage (two, if it is that large) to memory by TMA. A program may take tile after tile
(`Config.persistent`): the producer then fetches the next tile's first slabs while the consumers finish this one.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton_elements.py: strict checking has nothing true to say about jit functions. Host code is fully typed.

import math
from dataclasses import dataclass
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
    gl,
    jit,
    mbarrier,
    next_stage,
    send_result,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mxcompile.kernels.planes import Planes, plane_layout
from mxcompile.kernels.triton_decode import layout_constants
from mxcompile.kernels.triton_elements import capability, multiprocessors, unsupported_device
from mxcompile.kernels.triton_planes import _place


@dataclass(frozen=True)
class Config:
    """How a product is cut: `rows` tokens x `out` outputs (64, 128 or 256) a program, `stages` slabs on their way.

    group: how many tiles of tokens run side by side for the same outputs (for L2). persistent: as many programs as the
    GPU can run at once, each of which takes tile after tile.
    """

    rows: int = 256
    out: int = 128
    stages: int = 3
    group: int = 8
    persistent: bool = True

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 1 if self.out == 64 else 2


def supports(x: Tensor, planes: Planes) -> str | None:
    """None if `linear` can serve `x` and `planes`, or the reason why not."""
    if x.dtype != torch.bfloat16:
        return f"planes are decoded to bfloat16, the activation is {str(x.dtype).removeprefix('torch.')}"
    if reason := unsupported_device(x) or NO_GLUON:
        return reason
    if (found := capability(x.device)) != (9, 0):
        return f"the Gluon kernel needs compute capability 9.0, this GPU has {found[0]}.{found[1]}"
    if plane_layout(planes.fmt).planes != 4:
        return f"the Gluon kernel takes slabs of 128 columns, {planes.fmt.name} has {plane_layout(planes.fmt).columns}"
    if x.shape[-1] % 8 or any(stride % 8 for stride in x.stride()[:-1]) or x.data_ptr() % 16:
        return "the Gluon kernel needs an activation whose rows begin at multiples of 16 bytes"
    return None


def linear(x: Tensor, planes: Planes, bias: Tensor | None, config: Config) -> Tensor:
    """`x @ dequantize(planes).T + bias`, summed in float32 and rounded once: x `[..., in]`, y `[..., out]`.

    For what `supports` has no objection to.
    """
    if x.shape[-1] != planes.size or (bias is not None and bias.shape != (planes.out,)):
        raise MXCompileError(f"a linear of {planes.size} inputs and {planes.out} outputs cannot take {tuple(x.shape)}")
    rows = math.prod(x.shape[:-1])
    pitch = -(-planes.out // 8) * 8  # TMA wants rows at multiples of 16 bytes
    y = torch.empty((rows, pitch), dtype=x.dtype, device=x.device)
    if y.numel():
        flat = x.reshape(rows, planes.size)
        tiles = -(-rows // config.rows) * -(-planes.out // config.out)
        if config.persistent:
            tiles = min(tiles, multiprocessors(x.device) * (3 - config.consumers))
        slabs, kernel = planes.words.shape[1], cast(Any, _planes_kernel)
        tensors = {
            "x": flat if flat.stride(1) == 1 and flat.stride(0) >= planes.size else flat.contiguous(),
            "words": planes.words.view(planes.words.shape[0], -1, 64, 32),
            "scales": planes.scales.view(-1, slabs, 64),
            "y": y[:, : planes.out],
        }
        with torch.cuda.device(x.device):
            kernel[(tiles,)](
                *(TensorDescriptor.from_tensor(t, *block(name, config)) for name, t in tensors.items()),
                y if bias is None else bias.contiguous(),
                2.0**planes.lift,
                rows,
                planes.out,
                slabs,
                **constants(planes.fmt, config, bias is not None),
                **options(config),
            )
    y = y[:, : planes.out] if pitch == planes.out else y[:, : planes.out].contiguous()
    return y.view(*x.shape[:-1], planes.out)


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
    cut = (config.rows, config.out, config.consumers, config.stages, config.group, has_bias)
    return {"SHAPE": layout["SHAPE"], "ASSEMBLY": layout["ASSEMBLY"], "CUT": cut}


def options(config: Config) -> dict[str, Any]:
    """What the compiler is told: three warpgroups (one is the producer's) share all registers, two half of them."""
    return {"num_warps": 4, "maxnreg": 168 if config.consumers == 2 else 128, "enable_fp_fusion": True}


@jit
def _values(w0, w1, s, plane: tl.constexpr, SHAPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    PLANES: tl.constexpr = SHAPE[0]
    word = w0 if 2 * plane < PLANES or SHAPE[1] == 1 else w1
    pair = ((s >> (8 * plane)) & 0xFF) * 0x00800080
    addend = pair
    if SHAPE[3] != 0:
        addend = gl.inline_asm_elementwise(ASSEMBLY[PLANES], "=r,r", [pair], dtype=gl.int32, is_pure=True, pack=1)
    return gl.inline_asm_elementwise(
        ASSEMBLY[plane],
        "=r,r,r,r,r,r,r",
        [word, word, pair.expand_dims(1).broadcast_to(word.shape), addend.expand_dims(1).broadcast_to(word.shape)],
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
def _slab_words(ws, ss, stage, which, WORDS: tl.constexpr, CONSUMERS: tl.constexpr, LEFT: tl.constexpr):
    """A slab's words (the second is the first where there is one) and scales, of the rows of consumer `which`."""
    ROWS: tl.constexpr = ws.shape[1] * 64
    w0 = ws.index((stage * WORDS) * CONSUMERS + which).reshape([ROWS, 32]).load(LEFT)
    w1 = w0
    if WORDS > 1:
        w1 = ws.index((stage * WORDS + 1) * CONSUMERS + which).reshape([ROWS, 32]).load(LEFT)
    return w0, w1, ss.index(stage * CONSUMERS + which).reshape([ROWS]).load(gl.SliceLayout(1, LEFT))


@jit
def _produce(descriptors, buffers, bars, sizes, SHAPE: tl.constexpr, CUT: tl.constexpr):
    """One warp: brings slab after slab, tile after tile, wherever the consumers have left a stage."""
    x, words, scales = descriptors
    xs, ws, ss = buffers
    full, empty = bars
    m_size, n_size, slabs = sizes
    TILE_M: tl.constexpr = CUT[0]
    TILE_N: tl.constexpr = CUT[1]
    CONSUMERS: tl.constexpr = CUT[2]
    STAGES: tl.constexpr = CUT[3]
    WORDS: tl.constexpr = SHAPE[1]
    PART: tl.constexpr = TILE_N // 64 // CONSUMERS
    BYTES: tl.constexpr = TILE_M * 256 + TILE_N * (64 * WORDS + 4)
    tiles = gl.cdiv(m_size, TILE_M) * gl.cdiv(n_size, TILE_N)
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m_tile, n_tile = _place(tile, m_size, n_size, TILE_M, TILE_N, CUT[4])
        for slab in range(slabs):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            fence_async_shared()
            mbarrier.expect(bar, BYTES)
            for which in gl.static_range(CONSUMERS):
                first = n_tile * (TILE_N // 64) + which * PART
                for w in gl.static_range(WORDS):
                    at = (stage * WORDS + w) * CONSUMERS + which
                    fetch(words, [first, slab * WORDS + w, 0, 0], bar, ws.index(at))
                fetch(scales, [first, slab, 0], bar, ss.index(stage * CONSUMERS + which))
            fetch(x, [m_tile * TILE_M, slab * 128], bar, xs.index(stage))
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
def _consume(  # noqa: PLR0915  (a software pipeline is one list of steps)
    y, buffers, bars, sizes, bias, lift, which, SHAPE: tl.constexpr, ASSEMBLY: tl.constexpr, CUT: tl.constexpr
):
    """One warpgroup: its share of the tile's rows."""
    xs, ws, ss = buffers
    full, empty = bars
    m_size, n_size, slabs = sizes
    TILE_M: tl.constexpr = CUT[0]
    TILE_N: tl.constexpr = CUT[1]
    CONSUMERS: tl.constexpr = CUT[2]
    STAGES: tl.constexpr = CUT[3]
    WORDS: tl.constexpr = SHAPE[1]
    ROWS: tl.constexpr = TILE_N // CONSUMERS
    MMA: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_M, 16])
    LEFT: tl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    tiles = gl.cdiv(m_size, TILE_M) * gl.cdiv(n_size, TILE_N)
    stage = 0
    phase = 0
    gl.assume(slabs > 0)  # with a way around the loop, ptxas makes every wgmma wait for the one before it
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        mbarrier.wait(full.index(stage), phase)
        w0, w1, s = _slab_words(ws, ss, stage, which, WORDS, CONSUMERS, LEFT)
        even = _values(w0, w1, s, 0, SHAPE, ASSEMBLY)
        acc = gl.zeros([ROWS, TILE_M], gl.float32, MMA)
        for slab in range(slabs):
            columns = xs.index(stage)
            done = empty.index(stage)
            acc = _multiply(even, columns, 0, acc)
            odd = _values(w0, w1, s, 1, SHAPE, ASSEMBLY)
            acc = warpgroup_mma_wait(0, deps=[acc])
            acc = _multiply(odd, columns, 1, acc)
            even = _values(w0, w1, s, 2, SHAPE, ASSEMBLY)
            acc = warpgroup_mma_wait(0, deps=[acc])
            acc = _multiply(even, columns, 2, acc)
            odd = _values(w0, w1, s, 3, SHAPE, ASSEMBLY)
            stage, phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase, pred=slab + 1 < slabs)
            # After the last slab these are not the tile's, and neither multiplied.
            w0, w1, s = _slab_words(ws, ss, stage, which, WORDS, CONSUMERS, LEFT)
            acc = warpgroup_mma_wait(0, deps=[acc])
            acc = _multiply(odd, columns, 3, acc)
            even = _values(w0, w1, s, 0, SHAPE, ASSEMBLY)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(done, count=1)
        m_tile, n_tile = _place(tile, m_size, n_size, TILE_M, TILE_N, CUT[4])
        first = n_tile * TILE_N + which * ROWS
        acc = acc * lift
        if CUT[5]:
            n = first + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
            acc += gl.load(bias + n, mask=n < n_size, other=0.0).to(gl.float32).expand_dims(1)
        result = acc.to(gl.bfloat16)
        for i in gl.static_range((TILE_N + 127) // 128):
            mbarrier.wait(full.index(stage), phase)
            if ROWS == 64:
                send_result(y, m_tile * TILE_M, first, result, _halves(xs).index(stage * 2 + which))
            elif i == which:
                send_result(y, m_tile * TILE_M, first, result, xs.index(stage))
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)


@jit(do_not_specialize=["lift", "m_size", "n_size", "slabs"])
def _planes_kernel(
    x,
    words,
    scales,
    y,
    bias,
    lift,
    m_size,
    n_size,
    slabs,
    SHAPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CUT: tl.constexpr,
):
    TILE_M: tl.constexpr = CUT[0]
    CONSUMERS: tl.constexpr = CUT[2]
    STAGES: tl.constexpr = CUT[3]
    PART: tl.constexpr = CUT[1] // 64 // CONSUMERS
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE_M, 128], x.layout)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES * SHAPE[1] * CONSUMERS, PART, 1, 64, 32], words.layout)
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
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (y, buffers, bars, sizes, bias, lift, 0, SHAPE, ASSEMBLY, CUT)),
                (_consume, (y, buffers, bars, sizes, bias, lift, 1, SHAPE, ASSEMBLY, CUT)),
                (_produce, (descriptors, buffers, bars, sizes, SHAPE, CUT)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (y, buffers, bars, sizes, bias, lift, 0, SHAPE, ASSEMBLY, CUT)),
                (_produce, (descriptors, buffers, bars, sizes, SHAPE, CUT)),
            ],
            [1],
            [24],
        )
