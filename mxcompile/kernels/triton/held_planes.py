"""y = x @ dequantize(w).T + bias for a planar weight and a few tokens: no split-K, weights in registers.

The same as planes_linear.py where memory is the limit. A program computes 16 to 64 outputs over all of K, which its
warps divide (held_slices.py): so many programs run that they fill the multiprocessors evenly, none needs a
semaphore, and each has its first K-steps on the way before its first barrier. Partial sums of the warps meet in shared
memory and are added in a fixed order.

**Programmatic dependent launch** (`Config.dependent`, compute capability 9.0): in a CUDA graph, whose kernels write no
weights, these are loaded before the previous kernel has ended. A program lets the next kernel start after its own wait:
before it, a queue of kernels that wait would take up the multiprocessors. Without dependent launch there is no wait;
it keeps ptxas from moving loads of weights behind instructions that need the first of them.
"""

# ruff: noqa: N803, N806, SIM102  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxcompile.errors import MXCompileError
from mxcompile.kernels.layout.planes import PlanarWeight, plane_layout
from mxcompile.kernels.triton.decode_planes import layout_constants
from mxcompile.kernels.triton.elements import starts_early
from mxcompile.kernels.triton.held_slices import (
    load_scales,
    load_words,
    load_x,
    multiply_k_step,
    rows_of_slices,
    slice_of_rows,
)
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.planes_linear import _epilogue, check_linears
from mxcompile.kernels.triton.reductions import plus

_MOST_STEPS: Final = 16
_MOST_WARPS: Final = 16


@dataclass(frozen=True)
class Config:
    """A program computes `rows` tokens x `out` outputs (16, 32 or 64); each of its `warps` has a part of K.

    held: K-steps of a warp loaded into registers ahead. registers: limit per thread, 0 for the compiler's choice.
    """

    rows: int = 1
    out: int = 16
    warps: int = 8
    held: int = 4
    registers: int = 0
    dependent: bool = False


def for_k_steps(config: Config, k_steps: int) -> Config:
    """The config for a weight of other columns: no more warps than K-steps, and no more than `_MOST_STEPS` K-steps a
    warp, each of which has instructions of its own."""
    warps = config.warps
    while warps > k_steps:
        warps //= 2
    while k_steps > _MOST_STEPS * warps and warps < _MOST_WARPS:
        warps *= 2
    return replace(config, warps=warps)


def linear(x: Tensor, planes: PlanarWeight, bias: Tensor | None, config: Config) -> Tensor:
    """`x @ dequantize(planes).T + bias`, accumulated in float32, rounded once: x `[..., in]`, y `[..., out]`."""
    return linears(x, planes, [planes.out], [bias], config)[0]


def linears(
    x: Tensor, planes: PlanarWeight, outs: Sequence[int], biases: Sequence[Tensor | None], config: Config
) -> list[Tensor]:
    """`linear` in one launch for up to three weights, stored one after the other in `planes`, with `outs` rows each.

    Either all have a bias or none. With several weights, `outs` are multiples of `config.out`.
    """
    check_linears(x, planes, outs, biases, config.out)
    ys = [torch.empty((*x.shape[:-1], out), dtype=x.dtype, device=x.device) for out in outs]
    x = x.reshape(math.prod(x.shape[:-1]), planes.size)
    if x.shape[0] == 0:
        return ys
    x = x if x.stride(1) == 1 else x.contiguous()
    launch(
        _held_kernel,
        (-(-planes.out // config.out), -(-x.shape[0] // config.rows)),
        x,
        planes.words,
        planes.scales,
        tuple(x if bias is None else bias.contiguous() for bias in biases),
        tuple(ys),
        2.0**planes.lift,
        x.shape[0],
        tuple(outs),
        planes.size,
        planes.words.shape[1],
        x.stride(0),
        int(config.dependent and x.is_cuda and torch.cuda.is_current_stream_capturing()),
        HAS_BIAS=biases[0] is not None,
        ORDERED=starts_early(x),
        INTERPRETED=not x.is_cuda,
        **constants(planes, config),
        **options(config),
    )
    return ys


def constants(planes: PlanarWeight, config: Config) -> dict[str, Any]:
    """The constexpr arguments of the kernel that follow from weight and config."""
    k_steps = planes.words.shape[1]
    if config.warps > k_steps:
        raise MXCompileError(f"{k_steps} K-steps cannot be divided among {config.warps} warps")
    steps = -(-k_steps // config.warps)
    uneven = k_steps % config.warps != 0
    return {
        **layout_constants(planes.fmt),
        "TILE_M": config.rows,
        "TILE_N": config.out,
        "SLICES": config.warps,
        "HELD": min(config.held, steps),
        "STEPS": steps,
        "UNEVEN": uneven,
        "PADDED": uneven or planes.size % plane_layout(planes.fmt).columns != 0,
        "DEPENDENT": config.dependent,
    }


def options(config: Config) -> dict[str, Any]:
    """Compiler options."""
    return {
        "num_warps": config.warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
        **({"launch_pdl": True} if config.dependent else {}),
        **({"maxnreg": config.registers} if config.registers else {}),
    }


@triton.jit(do_not_specialize=["m_size", "lift", "early"])
def _held_kernel(
    x,
    words,
    scales,
    biases,
    ys,
    lift,
    m_size,
    outs,
    k_size,
    k_steps,
    x_stride,
    early,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    HELD: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNEVEN: tl.constexpr,
    PADDED: tl.constexpr,
    ORDERED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0) * TILE_N
    n = row + tl.arange(0, TILE_N)
    position = rows_of_slices(row % 64 + tl.arange(0, TILE_N), TILE_N, SLICES)
    part = slice_of_rows(TILE_N, SLICES)
    first = (row // 64).to(tl.int64) * k_steps
    w = words + first * (SHAPE[1] * 64 * 32) + (part * (SHAPE[1] * 64 * 32) + position * 32)[:, None]
    w += tl.arange(0, 32)[None, :]
    s = scales + first * (SHAPE[0] // 4 * 64)
    if DEPENDENT:
        if early == 0:
            gdc_wait()
    held = ()
    for step in tl.static_range(HELD):
        held = held + _load_k_step(w, s, position, part, k_steps, step, SHAPE, SLICES, UNEVEN)
    if ORDERED:
        gdc_wait()
    if DEPENDENT:
        gdc_launch_dependents()
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    m_inside = m < m_size
    rows = (x + m.to(tl.int64) * x_stride)[None, None, :]
    inside = m_inside[None, None, :]
    AHEAD: tl.constexpr = STEPS if TILE_M == 1 else HELD
    xs = ()
    for step in tl.static_range(AHEAD):
        xs = xs + load_x(rows, inside, k_size, step, SLICES, 1, SHAPE, SLICES, PADDED)
    acc = tl.full((SLICES, TILE_N, TILE_M), 0.0, tl.float32)
    for step in tl.static_range(STEPS):
        if step + HELD < STEPS:
            held = held + _load_k_step(w, s, position, part, k_steps, step + HELD, SHAPE, SLICES, UNEVEN)
        if step + AHEAD < STEPS:
            xs = xs + load_x(rows, inside, k_size, step + AHEAD, SLICES, 1, SHAPE, SLICES, PADDED)
        acc = multiply_k_step(acc, held, xs, step, SHAPE, FIELDS, ASSEMBLY, TILE_N, SLICES, INTERPRETED)
    total = tl.reduce(acc, 0, plus)
    _epilogue(total, biases, ys, outs, row, n, m, m_inside[None, :], lift, HAS_BIAS, INTERPRETED)


@triton.jit
def _load_k_step(
    w,
    s,
    position,
    part,
    k_steps,
    step: tl.constexpr,
    SHAPE: tl.constexpr,
    SLICES: tl.constexpr,
    UNEVEN: tl.constexpr,
):
    """Words and scales of K-step `step` of each slice; those that the format lacks repeat others."""
    WORDS: tl.constexpr = SHAPE[1]
    QUADS: tl.constexpr = SHAPE[0] // 4
    mask = part + step * SLICES < k_steps
    offsets = part * (QUADS * 64) + position
    w += step * (SLICES * WORDS * 64 * 32)
    s += step * (SLICES * QUADS * 64)
    w0 = load_words(w, mask[:, None], "evict_first", UNEVEN)
    w1 = load_words(w + 2048, mask[:, None], "evict_first", UNEVEN) if WORDS > 1 else w0
    w2 = load_words(w + 4096, mask[:, None], "evict_first", UNEVEN) if WORDS > 2 else w0
    s0 = load_scales(s, offsets, mask, UNEVEN, SLICES)
    s1 = load_scales(s + 64, offsets, mask, UNEVEN, SLICES) if QUADS > 1 else s0
    return w0, w1, w2, s0, s1
