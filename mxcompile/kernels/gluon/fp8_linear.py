"""FP8 linear: y = x @ dequantize(w).T + bias, with x and w e4m3 numbers times powers of two. Gluon, Hopper only.

As in gluon/planes_linear.py, a producer warp loads K-steps by TMA and two consumer warpgroups multiply, each 64 of a
tile's 128 outputs, with the weight as the left operand. Here the weight is decoded to e4m3 (gluon/decode_to_e4m3.py)
and x is e4m3 with one power of two per token (triton/align.py), so the FP8 tensor cores run at twice the bfloat16 rate.
The powers are applied to the accumulator.

**Accumulation.** Hopper accumulates FP8 products with about 14 bits below the largest. The error grows with the number
of columns, so at most `fp8_eligibility.columns_per_accumulation` columns are accumulated at a time. These partial sums
are added in float32 in memory, since registers cannot hold two sets. docs/kernels.md has measured errors.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mxcompile.formats import MXFormat
from mxcompile.kernels.gluon import decode_to_e4m3
from mxcompile.kernels.gluon.hopper import (
    GLUON_UNAVAILABLE,
    HAS_REINTERPRET,
    TensorDescriptor,
    contiguous,
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
from mxcompile.kernels.layout import fp8_eligibility
from mxcompile.kernels.layout.planes import LANES, TILE, PlanarWeight, plane_layout
from mxcompile.kernels.triton.elements import capability, multiprocessors, unsupported_device
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.planes_linear import _tile_position

_CONSUMERS: Final = 2
_OUT_PER_CONSUMER: Final = 64
_UNROLL = tl.constexpr(4)


@dataclass(frozen=True)
class Config:
    """Tile config: `rows` tokens x 128 outputs per program, `stages` K-steps in flight, `group` token tiles scheduled
    together for the same outputs (L2 reuse)."""

    rows: int = 256
    stages: int = 5
    group: int = 2


_DEFAULT_CONFIG: Final = Config()


def supports(x: Tensor, fmt: MXFormat) -> str | None:
    """None if `linear` supports bfloat16 tokens like x, else the reason; the caller checks the weight's scales."""
    if x.dtype != torch.bfloat16:
        return f"the result is bfloat16, the activation is {str(x.dtype).removeprefix('torch.')}"
    if reason := unsupported_device(x) or GLUON_UNAVAILABLE:
        return reason
    if fp8_eligibility.largest_span(fmt) is None:
        return f"{fmt.name} weights are not decoded to e4m3"
    if x.shape[-1] % 16:
        return f"the FP8 kernel needs a multiple of 16 columns, not {x.shape[-1]}"
    if capability(x.device) != (9, 0):
        return "the FP8 kernel needs compute capability 9.0"
    return None


def linear(
    x: Tensor,
    powers: Tensor,
    planes: PlanarWeight,
    bias: Tensor | None,
    activation: MXFormat,
    config: Config | None = None,
) -> Tensor:
    """`(x * powers[:, None]) @ dequantize(planes).T + bias`: x `[tokens, in]` e4m3, powers `[tokens]` float32.

    Returns `[tokens, out]` bfloat16. Only for calls that `supports` accepts and planes with a `top`. activation: the
    format that x was quantized to, which decides how many columns are accumulated at a time.
    """
    config = config or _DEFAULT_CONFIG
    shape = (len(x), planes.size, planes.out)
    plan = _plan(planes.fmt, activation, *shape, planes.lift, planes.top, bias is not None, config)
    device, out = x.device, planes.out
    y = torch.empty((shape[0], plan.pitch), dtype=torch.bfloat16, device=device)
    if not y.numel():
        return y[:, :out]
    programs = min(plan.tiles, multiprocessors(device))
    launch(
        _fp8_kernel,
        programs,
        TensorDescriptor(x, x.shape, x.stride(), *block("x", config)),
        TensorDescriptor(planes.words, *plan.words),
        TensorDescriptor(planes.scales, *plan.scales),
        TensorDescriptor(y, *plan.output),
        y if bias is None else bias.contiguous(),
        powers,
        torch.empty(max(1, programs * plan.partial_sums), dtype=torch.float32, device=device),
        *plan.scalars,
        **plan.constants,
    )
    return y if plan.pitch == out else y[:, :out].contiguous()


class _Plan(NamedTuple):
    """What a launch needs besides tensors. pitch: of the rows of the output. partial_sums: of a program.

    words, scales, output: arguments of descriptors.
    """

    pitch: int
    tiles: int
    partial_sums: int
    words: tuple[Any, ...]
    scales: tuple[Any, ...]
    output: tuple[Any, ...]
    scalars: tuple[Any, ...]
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    fmt: MXFormat,
    activation: MXFormat,
    rows: int,
    size: int,
    out: int,
    lift: int,
    top: int,
    has_bias: bool,
    config: Config,
) -> _Plan:
    """Computed once per shape: in Python it takes longer than the launch."""
    k_steps, out_tiles = -(-size // plane_layout(fmt).columns), -(-out // TILE)
    pitch = -(-out // 8) * 8  # TMA needs row strides that are multiples of 16 bytes
    k_chunks = -(-size // fp8_eligibility.columns_per_accumulation(activation, size))
    return _Plan(
        pitch,
        -(-rows // config.rows) * -(-out // (_OUT_PER_CONSUMER * _CONSUMERS)),
        _CONSUMERS * _OUT_PER_CONSUMER * config.rows if k_chunks > 1 else 0,
        (*contiguous(out_tiles, k_steps, TILE, LANES), *block("words", config)),
        (*contiguous(out_tiles, k_steps, TILE), *block("scales", config)),
        ([rows, out], [pitch, 1], *block("y", config)),
        (
            *decode_to_e4m3.offsets(fmt, top),
            2.0 ** decode_to_e4m3.power(fmt, top, lift),
            rows,
            out,
            k_steps,
            k_chunks,
        ),
        {**constants(fmt, config, k_chunks > 1, has_bias), **options()},
    )


@cache
def block(name: str, config: Config) -> tuple[list[int], Any]:
    """TMA block shape of a tensor argument, and its layout in shared memory."""
    shape, dtype = {
        "x": ([config.rows, 128], gl.float8e4nv),
        "words": ([1, 1, 64, 32], gl.int16),
        "scales": ([1, 1, 64], gl.int32),
        "y": ([config.rows, _OUT_PER_CONSUMER], gl.bfloat16),
    }[name]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, dtype)


@cache
def constants(fmt: MXFormat, config: Config, k_chunked: bool, has_bias: bool) -> dict[str, Any]:
    """The constexpr arguments of the kernel."""
    kernel_config = (config.rows, config.stages, config.group, k_chunked, has_bias)
    return {"ASSEMBLY": decode_to_e4m3.assembly(fmt), "STEPS": decode_to_e4m3.steps(fmt), "CONFIG": kernel_config}


def options() -> dict[str, Any]:
    """Compiler options: three warpgroups, one of them the producer, share all registers."""
    return {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}


@jit
def _load_k_step(ws, ss, stage, consumer, OPERAND_A: tl.constexpr):
    """Words and scales of a K-step, for the 64 outputs of `consumer`."""
    w = ws.index(stage * 2 + consumer).reshape([64, 32]).load(OPERAND_A)
    return w, ss.index(stage * 2 + consumer).reshape([64]).load(gl.SliceLayout(1, OPERAND_A))


@jit
def _values(w, s, offsets, plane: tl.constexpr, ASSEMBLY: tl.constexpr, STEPS: tl.constexpr):
    """One plane of a K-step, `[64, 32]` in e4m3."""
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
    """Issue the wgmma of a plane; `columns`: `[tokens, 128]` of x."""
    return warpgroup_mma(values, columns.slice(32 * plane, 32, dim=1).permute((1, 0)), acc, is_async=True)


@jit
def _accumulate_in_memory(pointers, acc, first, COALESCED: tl.constexpr):
    """Add the accumulator `[64, tokens]` to the partial sums in memory."""
    accumulators = to_coalesced(acc, COALESCED)
    if first:
        gl.store(pointers, accumulators)
    else:  # without loading: registers hold one set of partial sums
        gl.atomic_add(pointers, accumulators, sem="relaxed", scope="cta")


@jit
def _produce(descriptors, buffers, bars, sizes, CONFIG: tl.constexpr):
    """The producer warp: loads K-step after K-step, tile after tile, into every stage that the consumers release."""
    x, words, scales = descriptors
    xs, ws, ss, _results = buffers
    full, empty = bars
    m_size, n_size, k_steps, unrolled_steps = sizes
    TILE_M: tl.constexpr = CONFIG[0]
    STAGES: tl.constexpr = CONFIG[1]
    tiles = gl.cdiv(m_size, TILE_M) * gl.cdiv(n_size, 128)
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m_tile, n_tile = _tile_position(tile, m_size, n_size, TILE_M, 128, CONFIG[2])
        for k_step in range(unrolled_steps * _UNROLL):
            inside = gl.minimum(k_step, k_steps - 1)  # beyond, x is zeros
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            fence_async_shared()
            mbarrier.expect(bar, TILE_M * 128 + 128 * 68)
            for consumer in gl.static_range(2):
                fetch(words, [n_tile * 2 + consumer, inside, 0, 0], bar, ws.index(stage * 2 + consumer))
                fetch(scales, [n_tile * 2 + consumer, inside, 0], bar, ss.index(stage * 2 + consumer))
            fetch(x, [m_tile * TILE_M, k_step * 128], bar, xs.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        for _ in gl.static_range(2):  # stages for the result, one per consumer
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.arrive(full.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)


@jit
def _consume(  # noqa: PLR0915  (a software pipeline is one sequence of steps)
    buffers, bars, sizes, tensors, scalars, consumer, ASSEMBLY: tl.constexpr, STEPS: tl.constexpr, CONFIG: tl.constexpr
):
    """A consumer warpgroup: 64 of the tile's outputs. Each plane is decoded while the wgmma of the previous one runs,
    also across K-steps, except for every fourth: ptxas does not let a wgmma run across loop iterations."""
    xs, ws, ss, results = buffers
    full, empty = bars
    m_size, n_size, _, unrolled_steps = sizes
    y, bias, powers, scratch = tensors
    offsets, power, k_chunks = scalars
    TILE_M: tl.constexpr = CONFIG[0]
    STAGES: tl.constexpr = CONFIG[1]
    K_CHUNKED: tl.constexpr = CONFIG[3]
    MMA: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_M, 32])
    OPERAND_A: tl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    out = gl.arange(0, 64, gl.SliceLayout(1, MMA))
    tokens = gl.arange(0, TILE_M, gl.SliceLayout(0, MMA))
    COALESCED: tl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    thread_offsets = gl.arange(0, TILE_M // 8, gl.SliceLayout(1, COALESCED)).expand_dims(1) * 512
    scratch += (gl.program_id(0) * 2 + consumer) * (64 * TILE_M)
    pointers = scratch + (thread_offsets + gl.arange(0, 512, gl.SliceLayout(0, COALESCED)).expand_dims(0))
    tiles = gl.cdiv(m_size, TILE_M) * gl.cdiv(n_size, 128)
    count = k_chunks if K_CHUNKED else 1
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([64, TILE_M], gl.float32, MMA)
        for k_chunk in range(count):
            first = k_chunk * unrolled_steps // count
            last = (k_chunk + 1) * unrolled_steps // count
            gl.assume(first < last)  # if the loop could be skipped, ptxas would serialize all wgmma
            acc = gl.zeros([64, TILE_M], gl.float32, MMA)
            for _ in range(first, last):
                mbarrier.wait(full.index(stage), phase)
                w, s = _load_k_step(ws, ss, stage, consumer, OPERAND_A)
                acc = _multiply(_values(w, s, offsets, 0, ASSEMBLY, STEPS), xs.index(stage), 0, acc)
                for k_step in gl.static_range(_UNROLL):
                    columns = xs.index(stage)
                    release = empty.index(stage)
                    acc = _multiply(_values(w, s, offsets, 1, ASSEMBLY, STEPS), columns, 1, acc)
                    acc = _multiply(_values(w, s, offsets, 2, ASSEMBLY, STEPS), columns, 2, acc)
                    acc = _multiply(_values(w, s, offsets, 3, ASSEMBLY, STEPS), columns, 3, acc)
                    stage, phase = next_stage(stage, phase, STAGES)
                    if k_step < _UNROLL - 1:
                        mbarrier.wait(full.index(stage), phase)
                        w, s = _load_k_step(ws, ss, stage, consumer, OPERAND_A)
                        acc = _multiply(_values(w, s, offsets, 0, ASSEMBLY, STEPS), xs.index(stage), 0, acc)
                        acc = warpgroup_mma_wait(1, deps=[acc])
                    else:
                        acc = warpgroup_mma_wait(0, deps=[acc])
                    mbarrier.arrive(release, count=1)
            if K_CHUNKED:
                _accumulate_in_memory(pointers, acc, k_chunk == 0, COALESCED)
        if K_CHUNKED:
            acc = from_coalesced(gl.load(pointers), 64, MMA)  # each thread reads its own values
        m_tile, n_tile = _tile_position(tile, m_size, n_size, TILE_M, 128, CONFIG[2])
        m = m_tile * TILE_M
        n = n_tile * 128 + consumer * 64
        scale = gl.load(powers + m + tokens, mask=m + tokens < m_size, other=0.0) * power
        acc = acc * scale.expand_dims(0)
        if CONFIG[4]:
            acc += gl.load(bias + n + out, mask=n + out < n_size, other=0.0).to(gl.float32).expand_dims(1)
        result = acc.to(gl.bfloat16)
        for i in gl.static_range(2):
            mbarrier.wait(full.index(stage), phase)
            if i == consumer:
                store_tile(y, m, n, result, results.index(stage))
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)


@jit(do_not_specialize=["first_offset", "second_offset", "power", "m_size", "n_size", "k_steps", "k_chunks"])
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
    k_steps,
    k_chunks,
    ASSEMBLY: tl.constexpr,
    STEPS: tl.constexpr,
    CONFIG: tl.constexpr,
):
    TILE_M: tl.constexpr = CONFIG[0]
    STAGES: tl.constexpr = CONFIG[1]
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
    if HAS_REINTERPRET:  # reuse the x stages for results: half as many columns of twice the size
        results = xs.reinterpret(gl.bfloat16, [STAGES, TILE_M, 64], y.layout)
    else:
        results = xs._reinterpret(gl.bfloat16, [STAGES, TILE_M, 64], y.layout)  # pyright: ignore[reportAttributeAccessIssue]
    buffers = (xs, ws, ss, results)
    bars = (full, empty)
    sizes = (m_size, n_size, k_steps, gl.cdiv(k_steps, _UNROLL))
    tensors = (y, bias, powers, scratch)
    scalars = ((first_offset, second_offset), power, k_chunks)
    gl.warp_specialize(
        [
            (_consume, (buffers, bars, sizes, tensors, scalars, 0, ASSEMBLY, STEPS, CONFIG)),
            (_consume, (buffers, bars, sizes, tensors, scalars, 1, ASSEMBLY, STEPS, CONFIG)),
            (_produce, ((x, words, scales), buffers, bars, sizes, CONFIG)),
        ],
        [4, 1],
        [240, 24],
    )
