"""y = round(x) @ dequantize(w).T + bias for one token and a planar MXINT4 weight, where x is rounded to integers, too.

The same as held_planes.py, which decodes each weight to a bfloat16 times its scale: there instructions are the limit.
Here four weights in the bytes of a register take two instructions. `mma.m16n8k32` multiplies integers: 16 rows by 32
columns, which are a block. Its 8 columns of inputs are eight blocks, each with zeros in place of the others', so that
their sums stay apart: scales are multiplied with one sum in place of 32 elements. Sums of a block are exact.

All values are of a thread, `[threads]`. Thread 4 g + t of a warp holds of a weight rows g and g + 8 and, in each block,
columns 8 t to 8 t + 7, 16 bytes with those of four planes; of the input the same columns of block g; of the sums those
of blocks 2 t and 2 t + 1. A program computes 16 rows or more over all of K, which its warps divide into groups of eight
blocks, two K-steps.

Each program rounds the input, while its weights are on their way. What is rounded already stays as it is.
Programmatic dependent launch: see held_planes.py.
"""

# ruff: noqa: N803, N806, RUF005, SIM102, SIM300  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false
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

from mxcompile.formats import MXINT4, MXFormat, ScaleRule
from mxcompile.kernels.layout.planes import LANES, PlanarWeight
from mxcompile.kernels.triton.elements import starts_early
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.planes_linear import _epilogue, check_linears
from mxcompile.kernels.triton.reductions import plus

_GROUP: Final = 8 * LANES
_MOST_STEPS: Final = 8
_MOST_WARPS: Final = 16
_LOAD: tl.constexpr = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
_LOAD_ONCE: tl.constexpr = tl.constexpr(
    "{ .reg .b64 p; createpolicy.fractional.L2::evict_first.b64 p, 1.0; "
    "ld.global.L1::evict_first.L2::cache_hint.v4.b32 {$0, $1, $2, $3}, [$4], p; }"
)
_LOAD_HALF: tl.constexpr = tl.constexpr("ld.global.u16 $0, [$1];")
_MULTIPLY: tl.constexpr = tl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
    "{$10, $11, $12, $13};"
)
# Of 8 words of 4 bits each, 16 times the elements of four planes, four columns a register: 128 + 16 n without its sign
# bit flipped.
_UNPACK: tl.constexpr = tl.constexpr(
    "{ .reg .b32 r, s; "
    "prmt.b32 r, $8, $9, 0x6420; shl.b32 s, r, 4; "
    "lop3.b32 $0, s, 0xF0F0F0F0, 0x80808080, 0x6A; lop3.b32 $2, r, 0xF0F0F0F0, 0x80808080, 0x6A; "
    "prmt.b32 r, $8, $9, 0x7531; shl.b32 s, r, 4; "
    "lop3.b32 $4, s, 0xF0F0F0F0, 0x80808080, 0x6A; lop3.b32 $6, r, 0xF0F0F0F0, 0x80808080, 0x6A; "
    "prmt.b32 r, $10, $11, 0x6420; shl.b32 s, r, 4; "
    "lop3.b32 $1, s, 0xF0F0F0F0, 0x80808080, 0x6A; lop3.b32 $3, r, 0xF0F0F0F0, 0x80808080, 0x6A; "
    "prmt.b32 r, $10, $11, 0x7531; shl.b32 s, r, 4; "
    "lop3.b32 $5, s, 0xF0F0F0F0, 0x80808080, 0x6A; lop3.b32 $7, r, 0xF0F0F0F0, 0x80808080, 0x6A; }"
)
# The largest exponent of a block as bfloat16 stores it, of 8 values of each of four threads. 255: Inf or NaN.
_LARGEST_EXPONENT: tl.constexpr = tl.constexpr(
    "{ .reg .b32 a, b, c, d; "
    "and.b32 a, $1, 0x7FFF7FFF; and.b32 b, $2, 0x7FFF7FFF; and.b32 c, $3, 0x7FFF7FFF; and.b32 d, $4, 0x7FFF7FFF; "
    "max.u16x2 a, a, b; max.u16x2 c, c, d; max.u16x2 a, a, c; "
    "shfl.sync.bfly.b32 b, a, 1, 0x1f, 0xffffffff; max.u16x2 a, a, b; "
    "shfl.sync.bfly.b32 b, a, 2, 0x1f, 0xffffffff; max.u16x2 a, a, b; "
    "shr.u32 b, a, 16; and.b32 a, a, 0xFFFF; max.u32 a, a, b; shr.u32 $0, a, 7; }"
)
# Four values as integers, a byte each: clamped to +-$5, times $3 and $4 (two factors, as their product may be too large
# for a float), rounded to even by adding 1.5 * 2**23.
_ROUND_4: tl.constexpr = tl.constexpr(
    "{ .reg .b32 a, b, n; .reg .f32 e, f, g, h, m; xor.b32 n, $5, 0x80008000; mov.f32 m, 0f4B400000; "
    "min.bf16x2 a, $1, $5; max.bf16x2 a, a, n; min.bf16x2 b, $2, $5; max.bf16x2 b, b, n; "
    "shl.b32 n, a, 16; mov.b32 e, n; and.b32 n, a, 0xFFFF0000; mov.b32 f, n; "
    "shl.b32 n, b, 16; mov.b32 g, n; and.b32 n, b, 0xFFFF0000; mov.b32 h, n; "
    "mul.f32 e, e, $3; mul.f32 f, f, $3; mul.f32 g, g, $3; mul.f32 h, h, $3; "
    "fma.rn.f32 e, e, $4, m; fma.rn.f32 f, f, $4, m; fma.rn.f32 g, g, $4, m; fma.rn.f32 h, h, $4, m; "
    "mov.b32 a, e; mov.b32 b, f; prmt.b32 a, a, b, 0x0040; mov.b32 b, g; mov.b32 n, h; prmt.b32 b, b, n, 0x0040; "
    "prmt.b32 $0, a, b, 0x5410; }"
)
_FROM_LANE: tl.constexpr = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")
_EXACT: tl.constexpr = tl.constexpr(0x4B400000)
"""The bits of 1.5 * 2**23: added to an integer below 2**22, those of that float plus the integer."""


@dataclass(frozen=True)
class Config:
    """A program computes `out` outputs (16, 32 or 64) of one token; each of its `warps` has a part of K.

    held: groups of 256 columns of a warp loaded into registers ahead. registers: limit per thread, 0 for the compiler's
    choice.
    """

    out: int = 16
    warps: int = 8
    held: int = 4
    registers: int = 0
    dependent: bool = False


def supports(x: Tensor, fmt: MXFormat, rounding: tuple[MXFormat, ScaleRule]) -> str | None:
    """None if `linears` multiplies x, rounded as that says, by weights of a format, else the reason."""
    activation, rule = rounding
    if math.prod(x.shape[:-1]) != 1:
        return "integers are multiplied for one token"
    if fmt != MXINT4:
        return f"integers are multiplied for weights in {MXINT4}, not {fmt}"
    if not activation.is_integer or activation.block_size != LANES or activation.aligned or rule is not ScaleRule.FLOOR:
        return f"integers are multiplied for inputs that are rounded to integers, not to {activation} by {rule}"
    if x.dtype != torch.bfloat16 or x.shape[-1] % _GROUP:
        return f"integers are multiplied for bfloat16 inputs, a multiple of {_GROUP} of them"
    if not starts_early(x):
        return "integers are multiplied on GPUs of compute capability 9.0 or newer"
    return None


def for_columns(config: Config, size: int) -> Config:
    """The config for a weight of other columns: no more warps than groups, and no more than `_MOST_STEPS` groups a
    warp, each of which has instructions of its own; with more warps a thread has fewer registers."""
    groups = size // _GROUP
    if groups > _MOST_STEPS * config.warps:
        config = Config(min(config.out, 32), _MOST_WARPS, held=1)
    return replace(config, warps=min(config.warps, 1 << groups.bit_length() - 1))


def linears(
    x: Tensor,
    planes: PlanarWeight,
    outs: Sequence[int],
    biases: Sequence[Tensor | None],
    bits: int,
    config: Config,
) -> list[Tensor]:
    """`round(x) @ dequantize(w).T + bias` in one launch, for up to three weights, one after the other in `planes`.

    x: `[..., in]` of one token, bfloat16, which is rounded to MXINT of `bits` bits by the rule "floor". Either all
    weights have a bias or none. With several weights, `outs` are multiples of `config.out`.
    """
    check_linears(x, planes, outs, biases, config.out)
    ys = [torch.empty((*x.shape[:-1], out), dtype=x.dtype, device=x.device) for out in outs]
    launch(
        _integers_kernel,
        -(-planes.out // config.out),
        x.contiguous(),
        planes.words,
        planes.scales,
        tuple(x if bias is None else bias.contiguous() for bias in biases),
        tuple(ys),
        2.0 ** (planes.lift - 2 - bits),
        tuple(outs),
        planes.size // _GROUP,
        int(config.dependent and torch.cuda.is_current_stream_capturing()),
        HAS_BIAS=biases[0] is not None,
        INTERPRETED=not x.is_cuda,
        **constants(planes.size, bits, config),
        **options(config),
    )
    return ys


def constants(size: int, bits: int, config: Config) -> dict[str, Any]:
    """The constexpr arguments of the kernel that follow from sizes and config."""
    steps = -(-(size // _GROUP) // config.warps)
    return {
        "BITS": bits,
        "ROWS": config.out,
        "WARPS": config.warps,
        "STEPS": steps,
        "HELD": min(config.held, steps),
        "UNEVEN": size // _GROUP % config.warps != 0,
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


@triton.jit
def _load_4(address, ASSEMBLY: tl.constexpr):
    a, b, c, d = tl.inline_asm_elementwise(
        ASSEMBLY, "=r,=r,=r,=r,l", [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
    )
    return a, b, c, d


@triton.jit
def _load_half(address):
    return tl.inline_asm_elementwise(_LOAD_HALF, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _load_group(w, s, offset, ROWS: tl.constexpr):
    """Words and scales of one group: for each eight rows four words of two K-steps, and two scales."""
    w += offset * 8192
    s += offset * 512
    words, scales = (), ()
    for eight in tl.static_range(ROWS // 8):
        words = words + _load_4(w + eight * 512, _LOAD_ONCE) + _load_4(w + (4096 + eight * 512), _LOAD_ONCE)
        scales = scales + (_load_half(s + eight * 32),)
    return words + scales


@triton.jit
def _rounded(words, BITS: tl.constexpr):
    """A thread's 8 inputs as integers, and the scale of its block up to a constant; NaN if an input is not finite."""
    exponent = tl.inline_asm_elementwise(
        _LARGEST_EXPONENT, "=r,r,r,r,r", [words[0], words[1], words[2], words[3]], dtype=tl.int32, is_pure=False, pack=1
    )
    small = exponent < 64
    first = tl.where(small, 187 << 23, 127 << 23).to(tl.float32, bitcast=True)
    second = ((252 + BITS - tl.where(small, 60, 0) - exponent) << 23).to(tl.float32, bitcast=True)
    largest = ((exponent << 7) | (((1 << (BITS - 2)) - 1) << (9 - BITS))) * 0x10001
    integers = ()
    for half in tl.static_range(2):
        integers = integers + (
            tl.inline_asm_elementwise(
                _ROUND_4,
                "=r,r,r,f,f,r",
                [words[2 * half], words[2 * half + 1], first, second, largest],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            ),
        )
    scale = tl.where(exponent == 255, 0x7FC00000, tl.maximum(exponent << 23, 0x00400000))
    return integers[0], integers[1], scale


@triton.jit
def _unpack(words, FIRST: tl.constexpr):
    """16 times the elements of four planes, two registers each."""
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        _UNPACK,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r",
        [words[FIRST], words[FIRST + 1], words[FIRST + 2], words[FIRST + 3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return a, b, c, d, e, f, g, h


@triton.jit
def _multiply(a0, a1, a2, a3, b0, b1, sums):
    c0, c1, c2, c3 = tl.inline_asm_elementwise(
        _MULTIPLY,
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a0, a1, a2, a3, b0, b1, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return c0, c1, c2, c3


@triton.jit
def _from_lane(value, lane):
    return tl.inline_asm_elementwise(_FROM_LANE, "=r,r,r", [value, lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _sums_of_blocks(words, inputs, g, zero, HALF: tl.constexpr, ROWS: tl.constexpr):
    """16 times the sums of 16 rows, as bits of floats plus `_EXACT`: row g, blocks 2 t and 2 t + 1, then row g + 8."""
    sums = (zero + _EXACT, zero + _EXACT, zero + _EXACT, zero + _EXACT)
    for k_step in tl.static_range(2):
        low = _unpack(words, (2 * (2 * HALF) + k_step) * 4)
        high = _unpack(words, (2 * (2 * HALF + 1) + k_step) * 4)
        for plane in tl.static_range(4):
            own = g == 4 * k_step + plane
            b0, b1 = tl.where(own, inputs[0], 0), tl.where(own, inputs[1], 0)
            sums = _multiply(low[2 * plane], high[2 * plane], low[2 * plane + 1], high[2 * plane + 1], b0, b1, sums)
    return sums


@triton.jit
def _scaled(sums, FIRST: tl.constexpr, scales, inputs):
    """The sums of a row's two blocks, times both scales."""
    first = sums[FIRST].to(tl.float32, bitcast=True) - 12582912.0
    second = sums[FIRST + 1].to(tl.float32, bitcast=True) - 12582912.0
    low = ((scales << 23) & 0x7F800000).to(tl.float32, bitcast=True)
    high = ((scales << 15) & 0x7F800000).to(tl.float32, bitcast=True)
    return first * (low * inputs[0]) + second * (high * inputs[1])


@triton.jit(do_not_specialize=["unit", "early"])
def _integers_kernel(
    x,
    words,
    scales,
    biases,
    ys,
    unit,
    outs,
    groups,
    early,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    HELD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNEVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    g, t = lane // 4, lane % 4
    row = tl.program_id(0) * ROWS
    k_step = (row // 64).to(tl.int64) * (2 * groups)
    w = words.to(tl.int64) + k_step * 4096 + (row % 64 + g) * 64 + t * 16
    s = scales.to(tl.int64) + k_step * 256 + (row % 64 + g) * 4 + t % 2 * 2 + t // 2 * 256
    if DEPENDENT:
        if early == 0:
            gdc_wait()
    held = ()
    for step in tl.static_range(HELD):
        held = held + (_load_group(w, s, _group(warp, groups, step, WARPS, UNEVEN), ROWS),)
    if not INTERPRETED:
        gdc_wait()
    if DEPENDENT:
        gdc_launch_dependents()
    x_words = x.to(tl.int64) + lane * 16
    zero = thread * 0
    inputs = ()
    for step in tl.static_range(STEPS):
        inputs = inputs + (_load_4(x_words + _group(warp, groups, step, WARPS, UNEVEN) * 512, _LOAD),)
    acc = ()
    for _ in tl.static_range(ROWS // 8):
        acc = acc + (zero.to(tl.float32),)
    for step in tl.static_range(STEPS):
        if step + HELD < STEPS:
            held = held + (_load_group(w, s, _group(warp, groups, step + HELD, WARPS, UNEVEN), ROWS),)
        integers = _rounded(inputs[step], BITS)
        scale = integers[2]
        if UNEVEN:
            scale = tl.where(warp + step * WARPS < groups, scale, 0)
        pair = (
            _from_lane(scale, 8 * t).to(tl.float32, bitcast=True),
            _from_lane(scale, 8 * t + 4).to(tl.float32, bitcast=True),
        )
        added = ()
        for half in tl.static_range(ROWS // 16):
            sums = _sums_of_blocks(held[step], integers, g, zero, half, ROWS)
            for eight in tl.static_range(2):
                of_rows = held[step][8 * (ROWS // 8) + 2 * half + eight]
                added = added + (acc[2 * half + eight] + _scaled(sums, 2 * eight, of_rows, pair),)
        acc = added
    total = _total(acc, ROWS, WARPS)
    n = row + tl.arange(0, ROWS)
    m = tl.arange(0, 1)
    _epilogue(total, biases, ys, outs, row, n, m, (m == 0)[None, :], unit, HAS_BIAS, INTERPRETED)


@triton.jit
def _group(warp, groups, step: tl.constexpr, WARPS: tl.constexpr, UNEVEN: tl.constexpr):
    """The number of a warp's group; a warp without one reads the last one again."""
    group = warp + step * WARPS
    return tl.minimum(group, groups - 1) if UNEVEN else group


@triton.jit
def _total(acc, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Sums `[ROWS, 1]` of what threads and warps have, in a fixed order."""
    parts = acc
    for level in tl.static_range(1, 4):
        if ROWS // 8 >= 2**level:
            parts = _joined(parts)
    parts = tl.reshape(parts[0], (WARPS, 8, 4, ROWS // 8))
    total = tl.reduce(tl.reduce(parts, 2, plus), 0, plus)
    return tl.reshape(tl.trans(total), (ROWS, 1))


@triton.jit
def _joined(parts):
    """The first half of some tensors, each joined with one of the second half."""
    HALF: tl.constexpr = len(parts) // 2
    joined = ()
    for i in tl.static_range(HALF):
        joined = joined + (tl.join(parts[i], parts[HALF + i]),)
    return joined
