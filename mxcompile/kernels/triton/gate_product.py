"""y = round(f(gate) * up) in one pass over memory: the gated product of an MLP, and its rounding to an MX format.

f(gate) and the product are each rounded to the dtype of the inputs, as the model does, before the rounding to the
format. For rows that are sorted by expert: `gate_rows.py`.
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
from mxcompile.kernels.triton.gates import activated, gate_constants
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.quantize import Rounding, rounded_rows, rounding_constants, why_not_rounded
from mxcompile.numerics.gates import Gate

_FEW_VALUES: Final = 131072
"""Up to so many values, small tiles spread the work over more multiprocessors."""


def supports(gate: Tensor, rounding: Rounding) -> str | None:
    """None if `multiply_and_round` supports the call, else the reason."""
    return why_not_rounded(gate.shape[-1], rounding) or unsupported_dtype(gate.dtype) or unsupported_device(gate)


def multiply_and_round(
    gate: Tensor,
    up: Tensor,
    function: Gate,
    rounding: Rounding,
    tile: int | None = None,
    dependent: bool | None = None,
) -> Tensor:
    """gate and up `[..., inner]` of one dtype, of any strides. Returns the rounded product, contiguous.

    function: without limit and shift. dependent: programmatic dependent launch; None: from compute capability 9.0 on.
    """
    dependent = starts_early(gate) if dependent is None else dependent
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise MXCompileError(f"a gate {gate.dtype} {[*gate.shape]} cannot gate {up.dtype} {[*up.shape]}")
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    rows, inner, block = math.prod(gate.shape[:-1]), gate.shape[-1], rounding[0].block_size
    gate, up = (part.reshape(rows, inner) for part in (gate, up))
    gate, up = (part if part.stride(1) == 1 else part.contiguous() for part in (gate, up))
    tile = max(block, tile or (128 if y.numel() <= _FEW_VALUES else 2048))
    launch(
        _multiply_and_round_kernel,
        -(-y.numel() // tile),
        gate,
        up,
        y,
        y.numel(),
        inner,
        gate.stride(0),
        up.stride(0),
        FUNCTION=gate_constants(function)["GATE"],
        TILE=tile // block,
        BLOCK=block,
        DEPENDENT=dependent,
        **rounding_constants(rounding, y.dtype),
        num_warps=max(1, min(4, tile // 256)),
        **({"launch_pdl": True} if dependent else {}),
    )
    return y


@triton.jit(do_not_specialize=["total"])
def _multiply_and_round_kernel(
    gate,
    up,
    y,
    total,
    inner,
    gate_stride,
    up_stride,
    FUNCTION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDING: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * (TILE * BLOCK) + tl.arange(0, TILE * BLOCK)
    inside = index < total
    row, column = index // inner, index % inner
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    gates = widen(tl.load(gate + row * gate_stride + column, mask=inside, other=0.0))
    ups = widen(tl.load(up + row * up_stride + column, mask=inside, other=0.0))
    values = narrow(widen(narrow(activated(gates, FUNCTION), y.dtype.element_ty)) * ups, y.dtype.element_ty)
    result = rounded_rows(tl.expand_dims(widen(values), 0), ROUNDING)
    tl.store(y + index, narrow(tl.reshape(result, (TILE * BLOCK,)), y.dtype.element_ty), mask=inside)
