"""The gate between the two matmuls of an expert (numerics/gates.py), for rows sorted by expert (routing.py).

Gate and up are bfloat16. The result is computed in float32, rounded to bfloat16 and, if asked, to an MX format.
"""

# ruff: noqa: N803  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from typing import Final, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.triton.elements import narrow, widen
from mxcompile.kernels.triton.gates import gate_constants, gated
from mxcompile.kernels.triton.grouped_planes import rounding_constants
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.quantize import round_to_elements
from mxcompile.kernels.triton.reductions import maximum
from mxcompile.numerics.gates import Gate

Rounding: TypeAlias = tuple[MXFormat, ScaleRule]
_TILE_VALUES: Final = 2048


def gate_rows(y: Tensor, used: Tensor, tile: int, gate: Gate, rounding: Rounding | None) -> Tensor:
    """y `[slots, 2 * inner]` to `[slots, inner]`, bfloat16, for the first `used * tile` slots; the rest is not written.

    rounding: not to an aligned format, nor with the scale rule mse.
    """
    slots, inner = y.shape[0], y.shape[1] // 2
    h = torch.empty((slots, inner), dtype=y.dtype, device=y.device)
    if h.numel():
        block = 32 if rounding is None else rounding[0].block_size
        blocks = -(-inner // block)
        launch(
            _gate_kernel,
            -(-slots * blocks // (_TILE_VALUES // block)),
            y,
            h,
            used,
            inner,
            blocks,
            y.stride(0),
            **gate_constants(gate),
            **rounding_constants(rounding),
            BLOCK=block,
            BLOCKS=_TILE_VALUES // block,
            TILE=tile,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return h


@triton.jit
def _gate_kernel(
    y,
    h,
    used,
    inner,
    blocks,
    y_stride,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    end = tl.load(used).to(tl.int64) * TILE * blocks
    if first < end:
        index = first + tl.arange(0, BLOCKS)
        slot = (index // blocks)[:, None]
        column = (index % blocks)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (index < end)[:, None] & (column < inner)
        rows = y + slot * y_stride
        if INTERLEAVED:
            # One contiguous load, which is then split, is four times as wide as one of pairs.
            pair = (index % blocks)[:, None] * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)[None, :]
            both = tl.load(rows + pair, mask=(index < end)[:, None] & (pair < 2 * inner), other=0.0)
            gate, up = tl.split(tl.reshape(both, (BLOCKS, BLOCK, 2)))
        else:
            gate = tl.load(rows + column, mask=inside, other=0.0)
            up = tl.load(rows + inner + column, mask=inside, other=0.0)
        values = narrow(gated(widen(gate), widen(up), GATE), h.dtype.element_ty)
        if ROUNDING is not None:
            values = narrow(_rounded(widen(values), ROUNDING), h.dtype.element_ty)
        tl.store(h + slot * inner + column, values, mask=inside)


@triton.jit
def _rounded(values, ROUNDING: tl.constexpr):
    """Float32 values `[blocks, block]` rounded to elements times the scales of their blocks."""
    bits = values.to(tl.int32, bitcast=True)
    amax = tl.expand_dims(tl.reduce(bits & 0x7FFFFFFF, 1, maximum), 1)
    return round_to_elements(
        bits, amax, ROUNDING[1], ROUNDING[2], ROUNDING[3], ROUNDING[4], ROUNDING[5], ROUNDING[6], ROUNDING[7]
    )
