"""The sum of a token's experts with weights: of rows, or together with the matmul that makes them, for few tokens.

    weighted_sum:     y[token] = sum over its choices of weight * row[choice]
    multiply_and_sum: y[token] = sum over its choices of weight * (W[expert] @ h[choice] + bias[expert])

In `multiply_and_sum` a program has all choices of one token for a few outputs: each slice (expert_slices.py) has a part
of K of one choice, so that neither a launch nor a semaphore is needed to add them. With 8 outputs, the 16 rows of a
tensor-core instruction are those of two parts of K, each with a column of x: twice as many programs. An expert that
several tokens chose is read for each of them. All orders are fixed: results are bit-identical on repeat.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxcompile.errors import MXCompileError
from mxcompile.kernels.triton.elements import narrow, widen
from mxcompile.kernels.triton.expert_slices import (
    Config,
    Stack,
    check_shapes,
    chosen_expert,
    constants,
    multiply_slices,
    options,
)
from mxcompile.kernels.triton.held_slices import (
    decode_ahead,
    load_ahead,
    multiply_decoded,
    multiply_held,
    offsets_of_rows,
    rows_of_slices,
    sizes_of_experts,
    slice_of_rows,
)
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.reductions import plus

_COLUMNS: Final = 512


def multiply_and_sum(h: Tensor, experts: Tensor, weights: Tensor, down: Stack, config: Config) -> Tensor:
    """For each token the sum over its choices of weight * (W[expert] @ h[choice] + bias[expert]), rounded once.

    h `[tokens * k, in]` bfloat16, experts and weights `[tokens, k]`; returns `[tokens, out]`. Choices whose number is
    that of no expert count as zero, whatever h is. With `config.dependent`, experts and weights must not come from the
    previous kernel: they are read before it ends.
    """
    check_shapes(h, down)
    (tokens, slots), planes = experts.shape, down.planes
    y = torch.empty((tokens, down.out), dtype=h.dtype, device=h.device)
    if y.numel() == 0:
        return y
    all_held = config.held * config.parts * config.halves >= planes.words.shape[1]
    ahead = (all_held or not config.decoded) and (config.held or config.halves == 1) and config.halves <= 2
    if config.choices > 1 or config.slices % config.parts or not ahead:
        raise MXCompileError(f"multiply_and_sum takes no {config}")
    launch(
        _multiply_and_sum_kernel,
        (-(-down.out // config.out), tokens),
        h if h.stride(1) == 1 else h.contiguous(),
        planes.words,
        planes.scales,
        h if down.bias is None else down.bias.contiguous(),
        y,
        experts.contiguous(),
        weights.contiguous(),
        2.0**planes.lift,
        slots,
        down.count,
        down.out,
        planes.size,
        planes.words.shape[1],
        h.stride(0),
        PARTS=config.parts,
        ROUNDS=-(-slots // (config.slices // config.parts)),
        HALVES=config.halves,
        HAS_BIAS=down.bias is not None,
        DECODED=config.decoded,
        **constants(planes, config, config.parts),
        INTERPRETED=not h.is_cuda,
        **options(config),
    )
    return y


def weighted_sum(rows: Tensor, weights: Tensor, *, dependent: bool = False) -> Tensor:
    """Rows `[tokens * k, out]` times weights `[tokens, k]`, added per token in float32: `[tokens, out]`.

    dependent: as for `multiply_and_sum`.
    """
    (tokens, slots), size = weights.shape, rows.shape[1]
    y = torch.empty((tokens, size), dtype=rows.dtype, device=rows.device)
    if y.numel():
        launch(
            _weighted_sum_kernel,
            (-(-size // _COLUMNS), tokens),
            rows.contiguous(),
            weights.contiguous(),
            y,
            size,
            slots,
            COLUMNS=_COLUMNS,
            DEPENDENT=dependent,
            num_warps=_COLUMNS // 256,
            **({"launch_pdl": True} if dependent else {}),
        )
    return y


@triton.jit(do_not_specialize=["lift"])
def _multiply_and_sum_kernel(
    x,
    words,
    scales,
    bias,
    y,
    experts,
    weights,
    lift,
    slots,
    expert_count,
    out,
    k_size,
    k_steps,
    x_stride,
    PARTS: tl.constexpr,
    ROUNDS: tl.constexpr,
    HALVES: tl.constexpr,
    DECODED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    HELD: tl.constexpr,
    STEPS: tl.constexpr,
    UNEVEN: tl.constexpr,
    PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`TILE_N / HALVES` outputs of one token; in a round, `PARTS` slices have the parts of one choice."""
    OUTPUTS: tl.constexpr = TILE_N // HALVES
    token = tl.program_id(1)
    first = token * slots
    if HELD == 0:
        slice_of_row = tl.arange(0, SLICES * TILE_N) // TILE_N
        row = tl.program_id(0) * TILE_N + tl.arange(0, SLICES * TILE_N) % TILE_N
    else:
        slice_of_row = slice_of_rows(TILE_N, SLICES)
        row = rows_of_slices(tl.program_id(0) * OUTPUTS + tl.arange(0, TILE_N) % OUTPUTS, TILE_N, SLICES)
    row = tl.minimum(row, out - 1)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.full((OUTPUTS,), 0.0, tl.float32)
    for round in tl.static_range(ROUNDS):
        slot_of_row = round * (SLICES // PARTS) + slice_of_row // PARTS
        expert_of_row = chosen_expert(experts, first + slot_of_row, slot_of_row < slots, expert_count)
        slice = tl.arange(0, SLICES)
        slot = round * (SLICES // PARTS) + slice // PARTS
        expert = chosen_expert(experts, first + slot, slot < slots, expert_count)
        weight = widen(tl.load(weights + first + slot, mask=slot < slots, other=0.0))
        rows = x + (first + slot).to(tl.int64) * x_stride
        acc = _products(
            rows[:, None, None], (expert >= 0)[:, None, None], words, scales, expert_of_row, row, out,
            k_size, k_steps, PARTS, HALVES, DEPENDENT and round == 0, EARLY, DECODED,
            SHAPE, FIELDS, ASSEMBLY, TILE_M, TILE_N, SLICES, HELD, STEPS, UNEVEN, PADDED, INTERPRETED,
        )  # fmt: skip
        products = _of_outputs(acc, HALVES, OUTPUTS, SLICES) * lift
        if HAS_BIAS:
            once = ((expert >= 0) & (slice % PARTS == 0))[:, None] & (n < out)[None, :]
            offsets = tl.maximum(expert, 0).to(tl.int64)[:, None] * out + n[None, :]
            products += widen(tl.load(bias + offsets, mask=once, other=0.0))
        total += tl.reduce(products * weight[:, None], 0, plus)
    result = narrow(total, y.dtype.element_ty) if INTERPRETED else total.to(y.dtype.element_ty)
    tl.store(y + token.to(tl.int64) * out + n, result, mask=n < out)


@triton.jit
def _of_outputs(acc, HALVES: tl.constexpr, OUTPUTS: tl.constexpr, SLICES: tl.constexpr):
    """Products `[SLICES, OUTPUTS]`: of each row the one with its own half of x, and the halves added."""
    if HALVES > 1:
        own = (tl.arange(0, HALVES * OUTPUTS) // OUTPUTS)[None, :, None] == tl.arange(0, HALVES)[None, None, :]
        acc = tl.reduce(tl.where(own, acc, 0.0), 2, plus)
        products = tl.reduce(tl.reshape(acc, (SLICES, HALVES, OUTPUTS)), 1, plus)
    else:
        products = tl.reshape(acc, (SLICES, OUTPUTS))
    return products


@triton.jit
def _products(
    rows,
    inside,
    words,
    scales,
    expert,
    row,
    out,
    k_size,
    k_steps,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    WAITS: tl.constexpr,
    EARLY: tl.constexpr,
    DECODED: tl.constexpr,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    HELD: tl.constexpr,
    STEPS: tl.constexpr,
    UNEVEN: tl.constexpr,
    PADDED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The products of each slice; weights that are held are loaded before the wait for the previous kernel, and
    decoded before it if DECODED. expert, row: of the weight, for each row of all slices."""
    if HELD > 0:
        words_of_one, scales_of_one = sizes_of_experts(out, k_steps, SHAPE)
        word, scale = offsets_of_rows(row, k_steps, PARTS, HALVES, SHAPE, TILE_N, SLICES)
        word += tl.maximum(expert, 0) * words_of_one
        scale += tl.maximum(expert, 0) * scales_of_one
        held = load_ahead(
            words, scales, word, scale, expert >= 0, k_steps, PARTS, HALVES, True, SHAPE, TILE_N, SLICES, HELD, UNEVEN
        )
        if DECODED:
            values = decode_ahead(held, SHAPE, FIELDS, ASSEMBLY, TILE_N, SLICES, HELD, INTERPRETED)
    if WAITS:
        if DECODED:
            if k_steps > 0:  # always; without a branch, ptxas decodes after the wait
                gdc_wait()
        else:
            gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    if DECODED:
        acc = multiply_decoded(
            values, rows, inside, k_size, PARTS, HALVES, SHAPE, TILE_M, TILE_N, SLICES, HELD, PADDED, INTERPRETED
        )
    elif HELD > 0:
        acc = multiply_held(
            held, rows, inside, words, scales, word, scale, expert >= 0, k_size, k_steps, PARTS, HALVES, True,
            SHAPE, FIELDS, ASSEMBLY, TILE_M, TILE_N, SLICES, HELD, STEPS, UNEVEN, PADDED, INTERPRETED,
        )  # fmt: skip
    else:
        tile = tl.maximum(expert, 0) * (out // 64) + row // 64
        acc = multiply_slices(
            rows, inside, words, scales, tile, row % 64, expert >= 0, (k_steps + PARTS - 1) // PARTS, k_size, k_steps,
            PARTS, True, SHAPE, FIELDS, ASSEMBLY, TILE_M, TILE_N, SLICES, UNEVEN, PADDED, INTERPRETED,
        )  # fmt: skip
    return acc


@triton.jit
def _weighted_sum_kernel(rows, weights, y, size, slots, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_wait()
    token = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.full((COLUMNS,), 0.0, tl.float32)
    for slot in range(slots):
        choice = (token * slots + slot).to(tl.int64)
        weight = widen(tl.load(weights + choice))
        total += weight * widen(tl.load(rows + choice * size + column, mask=column < size, other=0.0))
    tl.store(y + token.to(tl.int64) * size + column, narrow(total, y.dtype.element_ty), mask=column < size)
