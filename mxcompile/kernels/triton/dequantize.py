"""Dequantize a planar weight (planes.py) to bfloat16, for matmuls that run in cuBLAS."""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.kernels.layout.planes import PlanarWeight
from mxcompile.kernels.triton.decode_planes import layout_constants, plane_values
from mxcompile.kernels.triton.elements import narrow
from mxcompile.kernels.triton.launches import launch


def dequantize(planes: PlanarWeight, out: Tensor | None = None, k_steps: int = 2, warps: int = 4) -> Tensor:
    """The weight's values `[out, size]` in bfloat16, into `out` if given; a program decodes `k_steps` of one tile."""
    shape = (planes.out, planes.size)
    y = torch.empty(shape, dtype=torch.bfloat16, device=planes.words.device) if out is None else out
    if y.shape != shape or y.dtype != torch.bfloat16 or y.stride(1) != 1:
        raise MXCompileError(f"a planar weight of shape {shape} cannot be dequantized into {y.dtype} {tuple(y.shape)}")
    groups = -(-planes.words.shape[1] // k_steps)
    launch(
        _dequantize_kernel,
        planes.words.shape[0] * groups,
        planes.words,
        planes.scales,
        y,
        2.0**planes.lift,
        planes.out,
        planes.size,
        planes.words.shape[1],
        y.stride(0),
        **layout_constants(planes.fmt),
        K_STEPS=k_steps,
        INTERPRETED=not y.is_cuda,
        LIFTED=planes.lift != 0,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return y


@triton.jit(do_not_specialize=["lift"])
def _dequantize_kernel(
    words,
    scales,
    y,
    lift,
    n_size,
    k_size,
    k_steps,
    y_stride,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    K_STEPS: tl.constexpr,
    LIFTED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    PLANES: tl.constexpr = SHAPE[0]
    WORDS: tl.constexpr = SHAPE[1]
    groups = (k_steps + K_STEPS - 1) // K_STEPS
    tile = tl.program_id(0) // groups
    row = tl.arange(0, 64)
    n = tile * 64 + row
    rows = y + n[:, None].to(tl.int64) * y_stride
    for i in tl.static_range(K_STEPS):
        k_step = (tl.program_id(0) % groups) * K_STEPS + i
        at = tile.to(tl.int64) * k_steps + tl.minimum(k_step, k_steps - 1)
        w = words + at * (WORDS * 64 * 32) + row[:, None] * 32 + tl.arange(0, 32)[None, :]
        s = scales + at * (PLANES // 4 * 64) + row
        w0 = tl.load(w, eviction_policy="evict_first")
        w1 = tl.load(w + 2048, eviction_policy="evict_first") if WORDS > 1 else w0
        w2 = tl.load(w + 4096, eviction_policy="evict_first") if WORDS > 2 else w0
        s0 = tl.load(s)
        s1 = tl.load(s + 64) if PLANES > 4 else s0
        for plane in tl.static_range(PLANES):
            values = plane_values(w0, w1, w2, s0, s1, plane, SHAPE, FIELDS, ASSEMBLY, INTERPRETED)
            if LIFTED or INTERPRETED:
                values = narrow(values.to(tl.float32) * lift, tl.bfloat16)  # pyright: ignore[reportArgumentType]
            k = k_step * (PLANES * 32) + plane * 32 + tl.arange(0, 32)[None, :]
            tl.store(rows + k, values, mask=(n[:, None] < n_size) & (k < k_size))
