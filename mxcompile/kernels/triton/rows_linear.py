"""y[..., out] = x[..., in] @ dequantize(elements, scales).T + bias, with the weight decoded inside the matmul.

Reads the row-major layout of packing.py: elements `[out, blocks * block_bytes]` and scales `[out, blocks]`, both uint8.

The weight is the *left* operand of the dot, `acc[out, tokens] = w[out, in] @ x.T[in, tokens]`: then the long
side of a decode-time matmul fills the fixed dimension of the tensor core. The order of K inside a dot does not matter,
so a step of the loop takes `COLUMNS` lanes of one part (see triton/elements.py) and reads x at the matching columns.
There is no split-K, so results are bit-identical on repeat.

This is the generic kernel: correct for every format and shape, not tuned, row-major weights only.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, why_no_kernel
from mxcompile.kernels.triton.elements import (
    decode,
    element_constants,
    element_offsets,
    load_codes,
    narrow,
    parts,
    scale_value,
    unsupported_device,
    unsupported_dtype,
    widen,
)
from mxcompile.kernels.triton.launches import launch


def supports(x: Tensor, fmt: MXFormat) -> str | None:
    """None if `linear` supports x, else the reason. Every format of `FORMATS` is supported."""
    return why_no_kernel(fmt) or unsupported_dtype(x.dtype) or unsupported_device(x)


def linear(x: Tensor, elements: Tensor, scales: Tensor, bias: Tensor | None, fmt: MXFormat) -> Tensor:
    """`x @ dequantize(elements, scales).T + bias`, accumulated in float32 and rounded once to x's dtype.

    x `[..., in]` (bfloat16, float16 or float32, any strides), elements uint8 `[out, blocks * block_bytes]`,
    scales uint8 `[out, blocks]` (255 makes its output column NaN), bias `[out]`; gives `[..., out]` in x's dtype.
    The weight is rounded to x's dtype before the matmul, as in reference.linear.
    """
    _check_shapes(x, elements, scales, bias, fmt)
    rows, size, out = math.prod(x.shape[:-1]), x.shape[-1], scales.shape[0]
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = x.reshape(rows, size)
    tile = _tile(rows, x.dtype, fmt)
    launch(
        _linear_kernel,
        -(-rows // tile.rows) * -(-out // tile.out),
        x,
        elements.contiguous(),
        scales.contiguous(),
        x if bias is None else bias.contiguous(),
        y,
        rows,
        out,
        size,
        fmt.blocks(size),
        *x.stride(),
        **element_constants(fmt),
        TILE_M=tile.rows,
        TILE_N=tile.out,
        COLUMNS=tile.columns,
        HAS_BIAS=bias is not None,
        PADDED=size % fmt.block_size != 0,
        # The interpreter runs on numpy, which has no bfloat16: there the same values are multiplied as float32.
        DOT_FLOAT32=not x.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return y


@dataclass(frozen=True)
class _Tile:
    """Tile sizes of a program: `rows` x `out` outputs, `columns` lanes of a part per K-step."""

    rows: int
    out: int
    columns: int
    warps: int
    stages: int


def _tile(rows: int, dtype: torch.dtype, fmt: MXFormat) -> _Tile:
    """Reasonable, untuned sizes. float32 runs on CUDA cores with both operands in registers, hence small tiles."""
    if dtype == torch.float32:
        return _Tile(rows=16 if rows <= 16 else 32, out=64, columns=16, warps=4, stages=2)
    columns = 64 if parts(fmt) < 4 else 32
    if rows <= 64:
        return _Tile(rows=max(16, triton.next_power_of_2(rows)), out=64, columns=columns, warps=4, stages=3)
    return _Tile(rows=128, out=128, columns=columns, warps=8, stages=3)


def _check_shapes(x: Tensor, elements: Tensor, scales: Tensor, bias: Tensor | None, fmt: MXFormat) -> None:
    """Shapes that disagree would make the kernel read out of bounds."""
    out, blocks = scales.shape[0], fmt.blocks(x.shape[-1])
    checks: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("scales", scales, (out, blocks)),
        ("elements", elements, (out, blocks * fmt.block_bytes)),
    ]
    if bias is not None:
        checks.append(("bias", bias, (out,)))
    for name, tensor, shape in checks:
        if tensor.shape != shape:
            actual = tuple(tensor.shape)
            raise MXCompileError(f"{fmt} linear over {x.shape[-1]} inputs: {name} must be {shape}, not {actual}")


@triton.jit
def _lane_scales(rows, first, n_inside, blocks, TILE_N: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Scales of the blocks from `first` on as float32 `[TILE_N, COLUMNS]`; each byte is read once."""
    COUNT: tl.constexpr = COLUMNS // WIDTH if COLUMNS > WIDTH else 1  # pyright: ignore[reportAssignmentType]
    block = (first + tl.arange(0, COUNT))[None, :]
    scales = tl.load(rows + block, mask=n_inside & (block < blocks), other=0)
    lanes = tl.broadcast_to(scales[:, :, None], (TILE_N, COUNT, COLUMNS // COUNT))
    return scale_value(tl.reshape(lanes, (TILE_N, COLUMNS)))


@triton.jit(do_not_specialize=["m_size"])
def _linear_kernel(
    x,
    elements,
    scales,
    bias,
    y,
    m_size,
    n_size,
    k_size,
    blocks,
    x_stride_m,
    x_stride_k,
    BITS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MAX_CODE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PADDED: tl.constexpr,
    DOT_FLOAT32: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK // PARTS
    m_tiles = (m_size + TILE_M - 1) // TILE_M
    n = (tl.program_id(0) // m_tiles) * TILE_N + tl.arange(0, TILE_N)
    m = (tl.program_id(0) % m_tiles) * TILE_M + tl.arange(0, TILE_M)
    element_rows = elements + n[:, None].to(tl.int64) * (blocks * (BLOCK * BITS // 8))
    scale_rows = scales + n[:, None].to(tl.int64) * blocks
    x_rows = x + m[None, :].to(tl.int64) * x_stride_m
    n_inside = n[:, None] < n_size
    m_inside = m[None, :] < m_size
    acc = tl.full((TILE_N, TILE_M), 0.0, tl.float32)
    for start in range(0, blocks * WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        block = column // WIDTH
        lane = column % WIDTH
        inside = n_inside & (block[None, :] < blocks)
        pointers = element_rows + element_offsets(column, BITS, WIDTH)[None, :]
        scale = _lane_scales(scale_rows, start // WIDTH, n_inside, blocks, TILE_N, COLUMNS, WIDTH)
        for part in tl.static_range(PARTS):
            codes = load_codes(pointers, inside, part, BITS, WIDTH)
            w = decode(codes, BITS, EXPONENT_BITS, MANTISSA_BITS, EMIN, MAX_CODE) * scale
            k = block * BLOCK + part * WIDTH + lane
            if PADDED:
                w = tl.where(k[None, :] < k_size, w, 0.0)
            k_inside = k[:, None] < k_size
            xt = tl.load(x_rows + k[:, None].to(tl.int64) * x_stride_k, mask=k_inside & m_inside, other=0.0)
            if DOT_FLOAT32:
                acc = tl.dot(widen(narrow(w, xt.dtype)), widen(xt), acc, input_precision="ieee")
            else:
                acc = tl.dot(w.to(xt.dtype), xt, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += widen(tl.load(bias + n, mask=n < n_size, other=0.0))[:, None]
    y_pointers = y + m[None, :].to(tl.int64) * n_size + n[:, None]
    tl.store(y_pointers, narrow(acc, y.dtype.element_ty), mask=n_inside & m_inside)
