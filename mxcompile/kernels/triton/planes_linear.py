"""y = x @ dequantize(w).T + bias for a planar weight (planes.py), decoded in registers.

One kernel from decode to prefill: the weight is the left operand, `acc[out, tokens] += plane[out, 32] @ x.T[32, :]`
(or four planes at a time). Its rows fill the fixed dimension of the tensor core however few the tokens are, and on
Hopper wgmma reads it from registers. A `Config` holds the tile sizes.

With 4 or 8 warps and at least 64 rows per warpgroup Triton uses wgmma; else mma.sync, which needs neither descriptors
nor waits and takes 8 tokens. Joined planes form one chain of wgmma. A K-step ends with a wait for it: Triton would let
it run while the next K-step is decoded, into registers that it still reads.

**Split-K** without atomic adds: each program stores its partial sums. The last program to arrive at a tile, found with
a counter (semaphore) per tile, adds them in the order of the splits, casts, and resets the counter to zero. So results
are bit-identical on repeat, and nothing needs clearing between calls. Calls that may run concurrently must not share
counters.

**Programmatic dependent launch** (`Config.dependent`, compute capability 9.0): the kernel may start while the previous
one in the stream still runs. It prefetches weights into L2, waits, and only then lets the next kernel start: a queue of
kernels that wait would take up the multiprocessors.

The interpreter supports neither inline PTX nor bfloat16 matmuls: there the bit fields (planes.py) are decoded with
integer operations and the same values are multiplied as float32.
"""

# ruff: noqa: N803, N806, SIM108  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat
from mxcompile.kernels.layout.planes import PlanarWeight, plane_layout
from mxcompile.kernels.triton.decode_planes import layout_constants, plane_values
from mxcompile.kernels.triton.elements import arrives_last, narrow, unsupported_device, widen
from mxcompile.kernels.triton.launches import launch

MAX_WEIGHTS: Final = 3


@dataclass(frozen=True)
class Config:
    """Tile config: a program computes `rows` tokens x `out` outputs; K is divided into `split` parts (split-K).

    group: number of token tiles scheduled together for the same outputs (L2 reuse). joined: one dot over 128 columns
    instead of one per plane. registers: limit per thread, 0 for the compiler's choice. prefetch: K-steps prefetched
    into L2 before a program waits for the previous kernel, with `dependent` launch only.
    """

    rows: int
    out: int
    split: int = 1
    warps: int = 4
    stages: int = 4
    joined: bool = True
    group: int = 8
    registers: int = 0
    dependent: bool = False
    prefetch: int = 0


def supports(x: Tensor) -> str | None:
    """None if `linear` supports x, else the reason."""
    if x.dtype != torch.bfloat16:
        return f"planes are decoded to bfloat16, the activation is {str(x.dtype).removeprefix('torch.')}"
    return unsupported_device(x)


def linear(
    x: Tensor, planes: PlanarWeight, bias: Tensor | None, config: Config, counters: Tensor | None = None
) -> Tensor:
    """`x @ dequantize(planes).T + bias`, accumulated in float32, rounded once: x `[..., in]`, y `[..., out]`.

    counters: at least `counters_needed(...)` int32 zeros for split-K, which leaves them zero; allocated if None.
    """
    return linears(x, planes, [planes.out], [bias], config, counters)[0]


def linears(
    x: Tensor,
    planes: PlanarWeight,
    outs: Sequence[int],
    biases: Sequence[Tensor | None],
    config: Config,
    counters: Tensor | None = None,
) -> list[Tensor]:
    """`linear` in one launch for up to three weights, stored one after the other in `planes`, with `outs` rows each.

    Either all have a bias or none. With several weights, `outs` are multiples of `config.out`. See `linear`.
    """
    check_linears(x, planes, outs, biases, config.out)
    ys = [torch.empty((*x.shape[:-1], out), dtype=x.dtype, device=x.device) for out in outs]
    x = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), planes.size)
    rows, k_steps = x.shape[0], planes.words.shape[1]
    if rows == 0:
        return ys
    x = x if x.stride(1) == 1 else x.contiguous()
    tiles, split = counters_needed(rows, planes, config), min(config.split, k_steps)
    partial = ys[0]
    if split > 1:
        partial = torch.empty((split, rows, planes.out), dtype=torch.float32, device=x.device)
        counters = torch.zeros(tiles, dtype=torch.int32, device=x.device) if counters is None else counters
    launch(
        _planes_kernel,
        tiles * split,
        x,
        planes.words,
        planes.scales,
        tuple([x if bias is None else bias.contiguous() for bias in biases]),
        tuple(ys),
        partial,
        ys[0] if counters is None else counters,
        2.0**planes.lift,
        rows,
        tuple(outs),
        planes.size,
        k_steps,
        x.stride(0),
        INTERPRETED=not x.is_cuda,
        **_constants(planes.fmt, planes.size, split, biases[0] is not None, config),
    )
    return ys


@lru_cache(maxsize=4096)
def _constants(fmt: MXFormat, size: int, split: int, has_bias: bool, config: Config) -> dict[str, Any]:
    """The constexpr arguments of the kernel except for INTERPRETED, and compiler options."""
    return {
        "HAS_BIAS": has_bias,
        "PADDED": size % plane_layout(fmt).columns != 0,
        **constants(fmt, replace(config, split=split)),
        **options(config),
    }


def check_linears(
    x: Tensor, planes: PlanarWeight, outs: Sequence[int], biases: Sequence[Tensor | None], tile: int
) -> None:
    """Shapes that disagree would make the kernel read or write out of bounds."""
    if x.shape[-1] != planes.size or sum(outs) != planes.out or len(outs) != len(biases):
        raise MXCompileError(f"a linear of {planes.size} inputs and {planes.out} outputs cannot take {tuple(x.shape)}")
    for out, bias in zip(outs, biases, strict=True):
        if bias is not None and bias.shape != (out,):
            raise MXCompileError(f"a linear of {out} outputs cannot take a bias of shape {tuple(bias.shape)}")
    several = len(outs) > 1
    if len(outs) > MAX_WEIGHTS or len({bias is None for bias in biases}) > 1:
        raise MXCompileError(f"one launch takes up to {MAX_WEIGHTS} weights, all with a bias or all without")
    if several and any(out % tile for out in outs):
        raise MXCompileError(f"weights of {list(outs)} outputs are not divisible into tiles of {tile}")


def counters_needed(rows: int, planes: PlanarWeight, config: Config) -> int:
    """Number of output tiles; with split-K each needs a counter."""
    return -(-rows // config.rows) * -(-planes.out // config.out)


def constants(fmt: MXFormat, config: Config) -> dict[str, Any]:
    """The constexpr arguments of the kernel that follow from format and config."""
    return {
        **layout_constants(fmt),
        "TILE_M": config.rows,
        "TILE_N": config.out,
        "SPLIT": config.split,
        "GROUP": config.group,
        "JOINED": config.joined,
        "DEPENDENT": config.dependent,
        "PREFETCH": config.prefetch,
        "WGMMA": config.warps % 4 == 0 and config.out >= 16 * config.warps,
        "POLICY": "evict_first" if config.rows <= 64 else "",
    }


def options(config: Config) -> dict[str, Any]:
    """Compiler options."""
    return {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
        **({"launch_pdl": True} if config.dependent else {}),
        **({"maxnreg": config.registers} if config.registers else {}),
    }


@triton.jit
def concatenate_planes(a, b, c, d):
    """Four `[n, 32]` as one `[n, 128]`; as tensor-core operands no data moves between registers."""
    quad = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(tl.permute(quad, (0, 3, 2, 1)), (a.shape[0], 128))


@triton.jit
def multiply(values, tokens, acc, INTERPRETED: tl.constexpr):
    """`acc + values @ tokens`; the interpreter has float32 values."""
    if INTERPRETED:
        result = tl.dot(values, widen(tokens), acc, input_precision="ieee")
    else:
        result = tl.dot(values, tokens, acc)
    return result


@triton.jit
def _wait_for_wgmma(acc, WGMMA: tl.constexpr):
    """acc. Triton waits for wgmma before an instruction that uses its result, even one that does nothing."""
    if WGMMA:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def _tile_position(tile, m_size, n_size, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr):
    """Token and output tile of a program: `GROUP` token tiles for the same outputs, then the next outputs."""
    m_tiles = (m_size + TILE_M - 1) // TILE_M
    n_tiles = (n_size + TILE_N - 1) // TILE_N
    first = tile // (GROUP * n_tiles) * GROUP
    group = tl.minimum(m_tiles - first, GROUP)
    in_group = tile % (GROUP * n_tiles)
    return first + in_group % group, in_group // group


@triton.jit
def _weight_pointers(words, scales, n, n_size, k_steps, first, PLANES: tl.constexpr, WORDS: tl.constexpr):
    """Pointers to K-step `first` of rows `n`; rows beyond the last tile of 64 are clamped to its last row."""
    row = tl.minimum(n, (n_size + 63) // 64 * 64 - 1)
    k_step = (row // 64).to(tl.int64) * k_steps + first
    w = words + (k_step * (WORDS * 64 * 32) + row % 64 * 32)[:, None] + tl.arange(0, 32)[None, :]
    return w, scales + k_step * (PLANES // 4 * 64) + row % 64


@triton.jit
def _prefetch(words, row, n_size, k_steps, first, TILE_N: tl.constexpr, WORDS: tl.constexpr, K_STEPS: tl.constexpr):
    """Prefetch the first K-steps of the tiles from `row` on into L2, in lines of 128 bytes."""
    for i in tl.static_range((TILE_N + 63) // 64 * WORDS):
        tile = tl.minimum(row // 64 + i // WORDS, (n_size - 1) // 64)
        line = first * (WORDS * 32) + i % WORDS * (K_STEPS * 32) + tl.arange(0, K_STEPS * 32)
        line = tl.minimum(line, k_steps * (WORDS * 32) - 1)
        pointers = words + tile.to(tl.int64) * k_steps * (WORDS * 64 * 32) + line * 64
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _wait_for_previous_kernel(
    words, row, n_size, k_steps, first, TILE_N: tl.constexpr, WORDS: tl.constexpr, PREFETCH: tl.constexpr
):
    if PREFETCH > 0:
        _prefetch(words, row, n_size, k_steps, first, TILE_N, WORDS, PREFETCH)
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def _accumulate_k_step(
    acc,
    w,
    s,
    rows,
    column,
    k_size,
    m_inside,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    JOINED: tl.constexpr,
    PADDED: tl.constexpr,
    POLICY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Accumulate the K-step that begins at `column`, multiplied with x at `rows`."""
    PLANES: tl.constexpr = SHAPE[0]
    WORDS: tl.constexpr = SHAPE[1]
    w0 = tl.load(w, eviction_policy=POLICY)  # pyright: ignore[reportArgumentType]
    w1 = tl.load(w + 2048, eviction_policy=POLICY) if WORDS > 1 else w0  # pyright: ignore[reportArgumentType]
    w2 = tl.load(w + 4096, eviction_policy=POLICY) if WORDS > 2 else w0  # pyright: ignore[reportArgumentType]
    s0 = tl.load(s)
    s1 = tl.load(s + 64) if PLANES > 4 else s0
    if JOINED:
        for quad in tl.static_range(PLANES // 4):
            values = concatenate_planes(
                plane_values(w0, w1, w2, s0, s1, 4 * quad, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
                plane_values(w0, w1, w2, s0, s1, 4 * quad + 1, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
                plane_values(w0, w1, w2, s0, s1, 4 * quad + 2, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
                plane_values(w0, w1, w2, s0, s1, 4 * quad + 3, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
            )
            k = column + quad * 128 + tl.arange(0, 128)
            inside = m_inside & (k[:, None] < k_size) if PADDED else m_inside
            tokens = tl.load(rows + k[:, None], mask=inside, other=0.0)
            acc = multiply(values, tokens, acc, INTERPRETED)
    else:
        for plane in tl.static_range(PLANES):
            values = plane_values(w0, w1, w2, s0, s1, plane, SHAPE, FIELDS, ASSEMBLY, INTERPRETED)
            k = column + plane * 32 + tl.arange(0, 32)
            inside = m_inside & (k[:, None] < k_size) if PADDED else m_inside
            tokens = tl.load(rows + k[:, None], mask=inside, other=0.0)
            acc = multiply(values, tokens, acc, INTERPRETED)
    return acc


@triton.jit(do_not_specialize=["m_size", "lift"])
def _planes_kernel(
    x,
    words,
    scales,
    biases,
    ys,
    partial,
    counters,
    lift,
    m_size,
    outs,
    k_size,
    k_steps,
    x_stride,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    JOINED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    WGMMA: tl.constexpr,
    POLICY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    PLANES: tl.constexpr = SHAPE[0]
    WORDS: tl.constexpr = SHAPE[1]
    n_size = outs[0]
    for i in tl.static_range(1, len(outs)):
        n_size += outs[i]
    split = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // SPLIT
    m_tile, n_tile = _tile_position(tile, m_size, n_size, TILE_M, TILE_N, GROUP)
    m = m_tile * TILE_M + tl.arange(0, TILE_M)
    row = n_tile * TILE_N
    n = row + tl.arange(0, TILE_N)
    m_inside = m[None, :] < m_size
    first = split * k_steps // SPLIT
    count = (split + 1) * k_steps // SPLIT - first
    tl.assume(count > 0)  # if the loop could be skipped, ptxas would serialize all wgmma
    w, s = _weight_pointers(words, scales, n, n_size, k_steps, first, PLANES, WORDS)
    if DEPENDENT:
        _wait_for_previous_kernel(words, row, n_size, k_steps, first, TILE_N, WORDS, PREFETCH)
    rows = x + m[None, :].to(tl.int64) * x_stride
    acc = tl.full((TILE_N, TILE_M), 0.0, tl.float32)
    for k_step in range(count):
        column = (first + k_step) * (PLANES * 32)
        acc = _accumulate_k_step(
            acc, w, s, rows, column, k_size, m_inside, SHAPE, FIELDS, ASSEMBLY, JOINED, PADDED, POLICY, INTERPRETED
        )
        acc = _wait_for_wgmma(acc, WGMMA and not INTERPRETED)
        w += WORDS * 64 * 32
        s += PLANES // 4 * 64
    if SPLIT > 1:
        output_size = m_size.to(tl.int64) * n_size
        offsets = m[None, :].to(tl.int64) * n_size + n[:, None]
        inside = m_inside & (n[:, None] < n_size)
        tl.store(partial + split * output_size + offsets, acc, mask=inside)
        if arrives_last(counters + tile, SPLIT):
            acc = tl.full((TILE_N, TILE_M), 0.0, tl.float32)
            for other in tl.static_range(SPLIT):
                acc += tl.load(partial + other * output_size + offsets, mask=inside, other=0.0, cache_modifier=".cg")
            _epilogue(acc, biases, ys, outs, row, n, m, m_inside, lift, HAS_BIAS, INTERPRETED)
    else:
        _epilogue(acc, biases, ys, outs, row, n, m, m_inside, lift, HAS_BIAS, INTERPRETED)


@triton.jit
def _epilogue(acc, biases, ys, outs, row, n, m, m_inside, lift, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Scale, add the bias, round once, and store to the output of the weight that the tile belongs to."""
    acc = acc * lift
    if len(outs) == 1:
        _store(acc, biases[0], ys[0], n, outs[0], m, m_inside, HAS_BIAS, INTERPRETED)
    else:
        start = row * 0
        for i in tl.static_range(len(outs)):
            if (row >= start) & (row < start + outs[i]):
                _store(acc, biases[i], ys[i], n - start, outs[i], m, m_inside, HAS_BIAS, INTERPRETED)
            start += outs[i]


@triton.jit
def _store(acc, bias, y, n, n_size, m, m_inside, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr):
    if HAS_BIAS:
        acc += widen(tl.load(bias + n, mask=n < n_size, other=0.0))[:, None]
    result = narrow(acc, y.dtype.element_ty) if INTERPRETED else acc.to(y.dtype.element_ty)
    offsets = m[None, :].to(tl.int64) * n_size + n[:, None]
    tl.store(y + offsets, result, mask=m_inside & (n[:, None] < n_size))
