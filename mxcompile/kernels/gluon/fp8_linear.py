"""y = x @ dequantize(w).T + bias where x and w are e4m3 numbers times powers of two: Gluon, Hopper (sm_90) only.

As in gluon/planes_linear.py a producer warp brings slabs by TMA and two warpgroups multiply, each 64 of a tile's 128
outputs, with the weight as the left operand; but the weight is decoded to e4m3 (gluon/decode_to_e4m3.py), x is e4m3
with one power of two a token (triton/align.py), and the tensor core works at twice its rate for bfloat16. The powers
are applied to the sums.

**Sums.** Hopper sums products of 8 bits with about 14 bits behind the largest. What that loses grows with the number of
columns, so no more are summed so than `fp8.columns_at_once` says; these sums are added in float32 in memory, since
registers cannot hold two sets. benchmarks/results/notes.md has the errors measured.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton/elements.py: strict checking has nothing true to say about jit functions. Host code is fully typed.

from dataclasses import dataclass
from functools import cache
from typing import Any, Final, cast

import torch
import triton.language as tl
from torch import Tensor

from mxcompile.formats import MXFormat
from mxcompile.kernels.gluon import decode_to_e4m3
from mxcompile.kernels.gluon.hopper import (
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
from mxcompile.kernels.layout import e4m3_products
from mxcompile.kernels.layout.planes import Planes
from mxcompile.kernels.triton.elements import capability, multiprocessors, unsupported_device
from mxcompile.kernels.triton.planes_linear import _place

_CONSUMERS: Final = 2
_ROWS: Final = 64
_UNROLL = tl.constexpr(4)


@dataclass(frozen=True)
class Config:
    """How a product is cut: `rows` tokens x 128 outputs a program, `stages` slabs on their way, `group` tiles of tokens
    side by side for the same outputs (for L2)."""

    rows: int = 256
    stages: int = 5
    group: int = 2


def supports(x: Tensor, fmt: MXFormat) -> str | None:
    """None if `linear` can serve bfloat16 tokens like x, or the reason why not; scales are the caller's to ask for."""
    if x.dtype != torch.bfloat16:
        return f"the result is bfloat16, the activation is {str(x.dtype).removeprefix('torch.')}"
    if reason := unsupported_device(x) or NO_GLUON:
        return reason
    if e4m3_products.largest_span(fmt) is None:
        return f"{fmt.name} weights are not decoded to e4m3"
    if x.shape[-1] % 16:
        return f"a weight of {x.shape[-1]} columns: a multiple of 16 is served"
    if capability(x.device) != (9, 0):
        return "the kernel needs compute capability 9.0"
    return None


def linear(
    x: Tensor, powers: Tensor, planes: Planes, bias: Tensor | None, activation: MXFormat, config: Config | None = None
) -> Tensor:
    """`(x * powers[:, None]) @ dequantize(planes).T + bias`: x `[tokens, in]` e4m3, powers `[tokens]` float32.

    Returns `[tokens, out]` bfloat16. For what `supports` has no objection to, and planes with a `top`; activation: the
    format that x was rounded to, by which its sums are cut.
    """
    config = config or Config()
    rows, slabs = len(x), planes.words.shape[1]
    pitch = -(-planes.out // 8) * 8  # TMA wants rows at multiples of 16 bytes
    y = torch.empty((rows, pitch), dtype=torch.bfloat16, device=x.device)
    if not y.numel():
        return y[:, : planes.out]
    programs = min(-(-rows // config.rows) * -(-planes.out // (_ROWS * _CONSUMERS)), multiprocessors(x.device))
    pieces = -(-planes.size // e4m3_products.columns_at_once(activation, planes.size))
    kernel = cast(Any, _fp8_kernel)
    scratch = programs * _CONSUMERS * _ROWS * config.rows if pieces > 1 else 1
    tensors = {
        "x": x,
        "words": planes.words.view(planes.words.shape[0], -1, 64, 32),
        "scales": planes.scales.view(-1, slabs, 64),
        "y": y[:, : planes.out],
    }
    with torch.cuda.device(x.device):
        kernel[(programs,)](
            *(TensorDescriptor.from_tensor(t, *block(name, config)) for name, t in tensors.items()),
            y if bias is None else bias.contiguous(),
            powers,
            torch.empty(scratch, dtype=torch.float32, device=x.device),
            *decode_to_e4m3.offsets(planes.fmt, planes.top),
            2.0 ** decode_to_e4m3.power(planes.fmt, planes.top, planes.lift),
            rows,
            planes.out,
            slabs,
            pieces,
            **constants(planes.fmt, config, pieces > 1, bias is not None),
            **options(),
        )
    return y if pitch == planes.out else y[:, : planes.out].contiguous()


@cache
def block(name: str, config: Config) -> tuple[list[int], Any]:
    """What TMA moves at once of a tensor that the kernel takes, and its layout in shared memory."""
    shape, dtype = {
        "x": ([config.rows, 128], gl.float8e4nv),
        "words": ([1, 1, 64, 32], gl.int16),
        "scales": ([1, 1, 64], gl.int32),
        "y": ([config.rows, _ROWS], gl.bfloat16),
    }[name]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, dtype)


@cache
def constants(fmt: MXFormat, config: Config, in_pieces: bool, has_bias: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    cut = (config.rows, config.stages, config.group, in_pieces, has_bias)
    return {"ASSEMBLY": decode_to_e4m3.assembly(fmt), "STEPS": decode_to_e4m3.steps(fmt), "CUT": cut}


def options() -> dict[str, Any]:
    """What the compiler is told: three warpgroups, one of which is the producer's, share all registers."""
    return {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}


@jit
def _slab(ws, ss, stage, which, LEFT: tl.constexpr):
    """A slab's words and scales, of the 64 outputs of consumer `which`."""
    w = ws.index(stage * 2 + which).reshape([64, 32]).load(LEFT)
    return w, ss.index(stage * 2 + which).reshape([64]).load(gl.SliceLayout(1, LEFT))


@jit
def _values(w, s, offsets, plane: tl.constexpr, ASSEMBLY: tl.constexpr, STEPS: tl.constexpr):
    """A plane of a slab, `[64, 32]` in e4m3."""
    byte = (s >> (8 * plane)) & 0xFF
    first = byte * STEPS[0] + offsets[0]
    second = byte * STEPS[1] + offsets[1]
    return gl.inline_asm_elementwise(
        ASSEMBLY[plane],
        "=r,r,r,r,r,r,r,r,r,r,r",
        [w, first.expand_dims(1).broadcast_to(w.shape), second.expand_dims(1).broadcast_to(w.shape)],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@jit
def _multiply(values, columns, plane: tl.constexpr, acc):
    """Issues the product of a plane; `columns` `[tokens, 128]` of x."""
    return warpgroup_mma(values, columns.slice(32 * plane, 32, dim=1).permute((1, 0)), acc, is_async=True)


@jit
def _add(place, acc, first, LINES: tl.constexpr):
    """Adds sums `[64, tokens]` to those in memory."""
    lines = in_lines(acc, LINES)
    if first:
        gl.store(place, lines)
    else:  # without reading: registers hold one set of sums
        gl.atomic_add(place, lines, sem="relaxed", scope="cta")


@jit
def _produce(descriptors, buffers, bars, sizes, CUT: tl.constexpr):
    """One warp: brings slab after slab, tile after tile, wherever the consumers have left a stage."""
    x, words, scales = descriptors
    xs, ws, ss, _results = buffers
    full, empty = bars
    m_size, n_size, slabs, groups = sizes
    TILE_M: tl.constexpr = CUT[0]
    STAGES: tl.constexpr = CUT[1]
    tiles = gl.cdiv(m_size, TILE_M) * gl.cdiv(n_size, 128)
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m_tile, n_tile = _place(tile, m_size, n_size, TILE_M, 128, CUT[2])
        for slab in range(groups * _UNROLL):
            inside = gl.minimum(slab, slabs - 1)  # beyond, x is zeros
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            fence_async_shared()
            mbarrier.expect(bar, TILE_M * 128 + 128 * 68)
            for which in gl.static_range(2):
                fetch(words, [n_tile * 2 + which, inside, 0, 0], bar, ws.index(stage * 2 + which))
                fetch(scales, [n_tile * 2 + which, inside, 0], bar, ss.index(stage * 2 + which))
            fetch(x, [m_tile * TILE_M, slab * 128], bar, xs.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        for _ in gl.static_range(2):  # stages for the result, one a consumer
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.arrive(full.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)


@jit
def _consume(  # noqa: PLR0915  (a software pipeline is one list of steps)
    buffers, bars, sizes, tensors, numbers, which, ASSEMBLY: tl.constexpr, STEPS: tl.constexpr, CUT: tl.constexpr
):
    """One warpgroup: 64 of the tile's outputs. A plane is decoded while the product of the one before runs, and that of
    the next slab too, but for every fourth: ptxas lets no product run on from one turn of a loop into the next."""
    xs, ws, ss, results = buffers
    full, empty = bars
    m_size, n_size, _, groups = sizes
    y, bias, powers, scratch = tensors
    offsets, power, pieces = numbers
    TILE_M: tl.constexpr = CUT[0]
    STAGES: tl.constexpr = CUT[1]
    IN_PIECES: tl.constexpr = CUT[3]
    MMA: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_M, 32])
    LEFT: tl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    out = gl.arange(0, 64, gl.SliceLayout(1, MMA))
    tokens = gl.arange(0, TILE_M, gl.SliceLayout(0, MMA))
    LINES: tl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    line = gl.arange(0, TILE_M // 8, gl.SliceLayout(1, LINES)).expand_dims(1) * 512
    scratch += (gl.program_id(0) * 2 + which) * (64 * TILE_M)
    place = scratch + (line + gl.arange(0, 512, gl.SliceLayout(0, LINES)).expand_dims(0))
    tiles = gl.cdiv(m_size, TILE_M) * gl.cdiv(n_size, 128)
    count = pieces if IN_PIECES else 1
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([64, TILE_M], gl.float32, MMA)
        for piece in range(count):
            first = piece * groups // count
            last = (piece + 1) * groups // count
            gl.assume(first < last)  # with a way around the loop, ptxas makes every wgmma wait for the one before it
            acc = gl.zeros([64, TILE_M], gl.float32, MMA)
            for _ in range(first, last):
                mbarrier.wait(full.index(stage), phase)
                w, s = _slab(ws, ss, stage, which, LEFT)
                acc = _multiply(_values(w, s, offsets, 0, ASSEMBLY, STEPS), xs.index(stage), 0, acc)
                for slab in gl.static_range(_UNROLL):
                    columns = xs.index(stage)
                    done = empty.index(stage)
                    acc = _multiply(_values(w, s, offsets, 1, ASSEMBLY, STEPS), columns, 1, acc)
                    acc = _multiply(_values(w, s, offsets, 2, ASSEMBLY, STEPS), columns, 2, acc)
                    acc = _multiply(_values(w, s, offsets, 3, ASSEMBLY, STEPS), columns, 3, acc)
                    stage, phase = next_stage(stage, phase, STAGES)
                    if slab < _UNROLL - 1:
                        mbarrier.wait(full.index(stage), phase)
                        w, s = _slab(ws, ss, stage, which, LEFT)
                        acc = _multiply(_values(w, s, offsets, 0, ASSEMBLY, STEPS), xs.index(stage), 0, acc)
                        acc = warpgroup_mma_wait(1, deps=[acc])
                    else:
                        acc = warpgroup_mma_wait(0, deps=[acc])
                    mbarrier.arrive(done, count=1)
            if IN_PIECES:
                _add(place, acc, piece == 0, LINES)
        if IN_PIECES:
            acc = from_lines(gl.load(place), 64, MMA)  # each thread reads what it has written
        m_tile, n_tile = _place(tile, m_size, n_size, TILE_M, 128, CUT[2])
        m = m_tile * TILE_M
        n = n_tile * 128 + which * 64
        scale = gl.load(powers + m + tokens, mask=m + tokens < m_size, other=0.0) * power
        acc = acc * scale.expand_dims(0)
        if CUT[4]:
            acc += gl.load(bias + n + out, mask=n + out < n_size, other=0.0).to(gl.float32).expand_dims(1)
        result = acc.to(gl.bfloat16)
        for i in gl.static_range(2):
            mbarrier.wait(full.index(stage), phase)
            if i == which:
                send_result(y, m, n, result, results.index(stage))
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)


@jit(do_not_specialize=["first_offset", "second_offset", "power", "m_size", "n_size", "slabs", "pieces"])
def _fp8_kernel(
    x,
    words,
    scales,
    y,
    bias,
    powers,
    scratch,
    first_offset,
    second_offset,
    power,
    m_size,
    n_size,
    slabs,
    pieces,
    ASSEMBLY: tl.constexpr,
    STEPS: tl.constexpr,
    CUT: tl.constexpr,
):
    TILE_M: tl.constexpr = CUT[0]
    STAGES: tl.constexpr = CUT[1]
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE_M, 128], x.layout)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES * 2, 1, 1, 64, 32], words.layout)
    ss = gl.allocate_shared_memory(gl.int32, [STAGES * 2, 1, 1, 64], scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    thread_barrier()
    if NEW:  # the stages for x as room for results: half as many columns of twice the size
        results = xs.reinterpret(gl.bfloat16, [STAGES, TILE_M, 64], y.layout)
    else:
        results = xs._reinterpret(gl.bfloat16, [STAGES, TILE_M, 64], y.layout)  # pyright: ignore[reportAttributeAccessIssue]
    buffers = (xs, ws, ss, results)
    bars = (full, empty)
    sizes = (m_size, n_size, slabs, gl.cdiv(slabs, _UNROLL))
    tensors = (y, bias, powers, scratch)
    numbers = ((first_offset, second_offset), power, pieces)
    gl.warp_specialize(
        [
            (_consume, (buffers, bars, sizes, tensors, numbers, 0, ASSEMBLY, STEPS, CUT)),
            (_consume, (buffers, bars, sizes, tensors, numbers, 1, ASSEMBLY, STEPS, CUT)),
            (_produce, ((x, words, scales), buffers, bars, sizes, CUT)),
        ],
        [4, 1],
        [240, 24],
    )
