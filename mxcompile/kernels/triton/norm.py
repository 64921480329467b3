"""y = round(norm(x + residual)) in one pass over memory: residual sum, norm of each row, rounding to an MX format.

A program handles one row, which it holds in registers. Each intermediate value is rounded to the dtype of x where the
model rounds it (numerics/norms.py), so that the rounding to the format sees what it would see without fusion.
"""

# ruff: noqa: N803  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxcompile.errors import MXCompileError
from mxcompile.kernels.triton.elements import (
    narrow,
    starts_early,
    unsupported_device,
    unsupported_dtype,
    widen,
)
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.quantize import Rounding, rounded_rows, rounding_constants, why_not_rounded
from mxcompile.kernels.triton.reductions import plus
from mxcompile.numerics.norms import Norm

_MAX_SIZE: Final = 16384


def supports(x: Tensor, rounding: Rounding) -> str | None:
    """None if `add_norm` supports the call, else the reason."""
    if x.shape[-1] > _MAX_SIZE:
        return f"the Triton norm kernel holds rows of up to {_MAX_SIZE} values, not {x.shape[-1]}"
    return why_not_rounded(x.shape[-1], rounding) or unsupported_dtype(x.dtype) or unsupported_device(x)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    rounding: Rounding,
    warps: int | None = None,
    dependent: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """x and residual `[..., size]`, of any strides; weight and bias `[size]`. Returns `x + residual`, which is x
    itself without a residual, and the rounded norm of it, both contiguous and in the dtype of x.

    dependent: programmatic dependent launch; None: from compute capability 9.0 on. In a CUDA graph, whose kernels write
    no weights, weight and bias are then loaded before the previous kernel has ended.
    """
    dependent = starts_early(x) if dependent is None else dependent
    size, rows = x.shape[-1], math.prod(x.shape[:-1])
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise MXCompileError(f"a residual {[*residual.shape]} cannot be added to {[*x.shape]}")
    if any(part is not None and part.shape != (size,) for part in (weight, bias)):
        raise MXCompileError(f"weight and bias of a norm of {size} values have that size")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    if y.numel() == 0:
        return total, y
    flat, added = x.reshape(rows, size), x if residual is None else residual.reshape(rows, size)
    flat, added = (part if part.stride(-1) == 1 else part.contiguous() for part in (flat, added))
    lanes = triton.next_power_of_2(size)
    launch(
        _add_norm_kernel,
        rows,
        flat,
        added,
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        total,
        y,
        norm.eps,
        size,
        flat.stride(0),
        added.stride(0),
        int(dependent and x.is_cuda and torch.cuda.is_current_stream_capturing()),
        LANES=lanes,
        CENTERED=norm.centered,
        NARROWED=norm.narrowed,
        OFFSET=norm.offset,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        DEPENDENT=dependent,
        **rounding_constants(rounding, x.dtype),
        num_warps=warps or max(1, min(16, lanes // 256)),
        **({"launch_pdl": True} if dependent else {}),
    )
    return total, y


@triton.jit(do_not_specialize=["eps", "early"])
def _add_norm_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    y,
    eps,
    size,
    x_stride,
    residual_stride,
    early,
    LANES: tl.constexpr,
    CENTERED: tl.constexpr,
    NARROWED: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUNDING: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < size
    if DEPENDENT:
        gdc_launch_dependents()
        if early == 0:
            gdc_wait()
    factor = widen(tl.load(weight + lane, mask=inside, other=0.0)) if HAS_WEIGHT else tl.full((LANES,), 1.0, tl.float32)
    shift = widen(tl.load(bias + lane, mask=inside, other=0.0)) if HAS_BIAS else tl.full((LANES,), 0.0, tl.float32)
    if DEPENDENT:
        gdc_wait()
    values = widen(tl.load(x + row * x_stride + lane, mask=inside, other=0.0))
    if HAS_RESIDUAL:
        values += widen(tl.load(residual + row * residual_stride + lane, mask=inside, other=0.0))
        narrowed = narrow(values, total.dtype.element_ty)
        tl.store(total + row * size + lane, narrowed, mask=inside)
        values = widen(narrowed)
    if CENTERED:
        values -= tl.reduce(values, 0, plus) / size
        values = tl.where(inside, values, 0.0)
    values *= tl.math.rsqrt(tl.reduce(values * values, 0, plus) / size + eps)
    if NARROWED:
        values = widen(narrow(values, y.dtype.element_ty))
    if HAS_WEIGHT:
        values *= factor + OFFSET if OFFSET != 0.0 else factor
    if HAS_BIAS:
        values += shift
    values = widen(narrow(values, y.dtype.element_ty))
    result = tl.reshape(rounded_rows(tl.expand_dims(values, 0), ROUNDING), (LANES,))
    tl.store(y + row * size + lane, narrow(result, y.dtype.element_ty), mask=inside)
