"""Grouped matmuls with planar weights (planes.py) for few tokens: only experts that were chosen are read.

    linear:       y[choice] = W[expert of choice] @ x[row of choice] + bias
    gated_linear: h[choice] = gate(W[expert of choice] @ x[token of choice] + bias), rounded to an MX format if asked

All experts of a layer are one planar weight of `experts * out` rows. As in planes_linear.py the weight is the left
operand; expert_slices.py says how a program multiplies. With a gate, a program has both rows of each of its channels.
The gate sees float32. Its result is rounded to bfloat16 and from there to the MX format, as the composition does.

Which choices a program has, columns of its product:

- *single*: one choice. For so few tokens that experts are hardly ever shared.
- *leader*: up to `config.choices` choices of one expert, found without a launch: there is a program for every choice,
  it ranks its choice among those of the same expert, and runs only if the rank is a multiple of `config.choices`.
- *table*: the same, listed for every block by an earlier launch.

**Programmatic dependent launch** (`Config.dependent`): a kernel waits for the previous one before it reads anything,
and lets the next one start when it has its products. Earlier, programs of the next kernel would crowd on those
multiprocessors that become free first: measured, that takes up to twice as long. With `Config.early` it lets the next
one start when its first loads are on their way, which pays where no two programs of the next one fit on a
multiprocessor.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.layout.planes import plane_layout
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
from mxcompile.kernels.triton.gates import gate_constants, gated
from mxcompile.kernels.triton.held_slices import (
    load_ahead,
    multiply_held,
    offsets_of_rows,
    rows_of_slices,
    sizes_of_experts,
)
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.quantize import fraction_limit, round_to_elements
from mxcompile.kernels.triton.reductions import maximum, plus
from mxcompile.numerics.gates import Gate

MOST_RANKED: Final = 256
"""Choices up to which programs rank them without a table."""


@dataclass(frozen=True)
class Table:
    """Choices per block, int32 `[blocks * config.choices]`, -1 for none; experts int32 `[blocks]`, -1 if unused."""

    choices: Tensor
    experts: Tensor


def why_not_rounded(rounding: tuple[MXFormat, ScaleRule], out: int) -> str | None:
    """None if `gated` can round to that format with configs of `out` rows, else the reason."""
    fmt, rule = rounding
    if fmt.aligned or rule is ScaleRule.MSE:
        return f"{fmt} with the scale rule {rule.name.lower()} is rounded by a kernel of its own"
    try:
        rule.threshold(fmt)
    except MXCompileError as error:
        return str(error)
    channels = out // 2
    return f"blocks of {fmt.block_size} do not fit in {channels} channels" if channels % fmt.block_size else None


def gated_linear(
    x: Tensor,
    experts: Tensor,
    up: Stack,
    gate: Gate,
    rounding: tuple[MXFormat, ScaleRule] | None,
    config: Config,
    table: Table | None = None,
) -> Tensor:
    """The gate of each choice: x `[tokens, in]` bfloat16, experts `[tokens, k]`, h `[tokens * k, up.out / 2]`.

    Rows of choices whose number is that of no expert are not written.
    """
    if rounding is not None and (reason := why_not_rounded(rounding, config.out)):
        raise MXCompileError(reason)
    h = torch.empty((experts.numel(), up.out // 2), dtype=x.dtype, device=x.device)
    return _grouped(x, experts, up, h, config, table, gate, rounding)


def linear(x: Tensor, experts: Tensor, stack: Stack, config: Config, table: Table | None = None) -> Tensor:
    """x `[rows, in]` bfloat16 times the weights of its experts `[rows, k]`: y `[rows * k, out]`, rounded once.

    Rows of choices whose number is that of no expert are zero.
    """
    allocate = torch.empty if table is None else torch.zeros
    y = allocate((experts.numel(), stack.out), dtype=x.dtype, device=x.device)
    return _grouped(x, experts, stack, y, config, table, None, None)


def _grouped(
    x: Tensor,
    experts: Tensor,
    stack: Stack,
    y: Tensor,
    config: Config,
    table: Table | None,
    gate: Gate | None,
    rounding: tuple[MXFormat, ScaleRule] | None,
) -> Tensor:
    check_shapes(x, stack)
    if y.numel() == 0:
        return y
    if table is None and config.choices > 1 and experts.numel() > MOST_RANKED:
        raise MXCompileError(f"more than {MOST_RANKED} choices need a table")
    if config.held and plane_layout(stack.planes.fmt).planes > 4:
        raise MXCompileError(f"weights in {stack.planes.fmt} cannot be held in registers: take a config with held=0")
    if config.halves > 1:
        raise MXCompileError(f"a grouped matmul takes no {config}")
    x = x if x.stride(1) == 1 else x.contiguous()
    experts, planes = experts.contiguous(), stack.planes
    tiles = -(-stack.out // config.out)
    blocks = experts.numel() if table is None else len(table.experts)
    launch(
        _grouped_kernel,
        (tiles, blocks),
        x,
        planes.words,
        planes.scales,
        x if stack.bias is None else stack.bias.contiguous(),
        y,
        experts,
        experts if table is None else table.choices,
        experts if table is None else table.experts,
        2.0**planes.lift,
        experts.numel(),
        experts.shape[1],
        stack.count,
        stack.out,
        planes.size,
        planes.words.shape[1],
        x.stride(0),
        MODE="table" if table is not None else "leader" if config.choices > 1 else "single",
        RANKED=triton.next_power_of_2(experts.numel()) if table is None and config.choices > 1 else 1,
        HAS_BIAS=stack.bias is not None,
        **gate_constants(gate),
        **rounding_constants(rounding),
        **constants(planes, config, config.slices),
        INTERPRETED=not x.is_cuda,
        **options(config),
    )
    return y


def rounding_constants(rounding: tuple[MXFormat, ScaleRule] | None) -> dict[str, Any]:
    """ROUNDING: block size and the arguments of quantize.round_to_elements, None for none."""
    if rounding is None:
        return {"ROUNDING": None}
    fmt, rule = rounding
    largest = int(torch.finfo(torch.bfloat16).max).bit_length() - 1
    limits = (fmt.emin, fmt.emax, fmt.max_value, fraction_limit(fmt, rule), largest)
    return {"ROUNDING": (fmt.block_size, fmt.exponent_bits, fmt.mantissa_bits, *limits)}


@triton.jit
def _choices_of_block(
    experts,
    table_choices,
    table_experts,
    choices,
    count,
    MODE: tl.constexpr,
    TILE_M: tl.constexpr,
    RANKED: tl.constexpr,
):
    """The expert, -1 for none, the choices `[TILE_M]`, -1 for none, and whether the program runs."""
    block = tl.program_id(1)
    column = tl.arange(0, TILE_M)
    if MODE == "table":
        expert = tl.load(table_experts + block)
        choice = tl.load(table_choices + block * TILE_M + column)
        runs = expert >= 0
    elif MODE == "leader":
        expert, choice, runs = _ranked_choices(experts, block, choices, count, TILE_M, RANKED)
    else:
        expert = chosen_expert(experts, block, block >= 0, count)
        choice = block + column
        runs = expert >= -1
    return expert, choice, runs


@triton.jit
def _ranked_choices(experts, own, choices, count, TILE_M: tl.constexpr, RANKED: tl.constexpr):
    """The choices `[TILE_M]` of the same expert from `own` on, -1 for none; and whether `own` is first in its block."""
    index = tl.arange(0, RANKED)
    expert = chosen_expert(experts, own, own >= 0, count)
    same = (chosen_expert(experts, index, index < choices, count) == expert) & (index < choices)
    ranks = tl.associative_scan(same.to(tl.int32), 0, plus) - 1
    rank = tl.reduce((same & (index < own)).to(tl.int32), 0, plus)
    column = tl.arange(0, TILE_M)
    found = same[None, :] & (ranks[None, :] == rank + column[:, None])
    choice = tl.reduce(tl.where(found, index[None, :] + 1, 0), 1, plus) - 1
    return expert, choice, rank % TILE_M == 0  # pyright: ignore[reportOperatorIssue]


@triton.jit(do_not_specialize=["choices", "lift"])
def _grouped_kernel(
    x,
    words,
    scales,
    bias,
    y,
    experts,
    table_choices,
    table_experts,
    lift,
    choices,
    slots,
    expert_count,
    out,
    k_size,
    k_steps,
    x_stride,
    MODE: tl.constexpr,
    RANKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDING: tl.constexpr,
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
    """A block of choices times `TILE_N` rows: all of them, or with a gate in halves those of the same channels."""
    if DEPENDENT:
        gdc_wait()
    expert, choice, runs = _choices_of_block(
        experts, table_choices, table_experts, choices, expert_count, MODE, TILE_M, RANKED
    )
    if GATE is not None:
        runs = runs & (expert >= 0)
    if runs:
        n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
        weight_row = n
        if GATE is not None and not INTERLEAVED:
            HALF: tl.constexpr = TILE_N // 2
            weight_row = tl.arange(0, TILE_N) // HALF * (out // 2) + tl.program_id(0) * HALF + n % HALF
        weight_row = tl.minimum(weight_row, out - 1)
        acc = _product_of_block(
            x, words, scales, expert, choice, weight_row, slots, out, k_size, k_steps, x_stride,
            SHAPE, FIELDS, ASSEMBLY, TILE_M, TILE_N, SLICES, HELD, STEPS, UNEVEN, PADDED, DEPENDENT, EARLY, INTERPRETED,
        )  # fmt: skip
        if DEPENDENT and not EARLY:
            gdc_launch_dependents()
        acc = acc * lift
        if HAS_BIAS:
            biases = bias + expert.to(tl.int64) * out + weight_row
            acc += widen(tl.load(biases, mask=tl.where(n >= 0, expert, -1) >= 0, other=0.0))[:, None]
        if GATE is None:
            _store(acc, y, choice, n, out, INTERPRETED)
        else:
            _store_gated(acc, y, choice, out // 2, GATE, INTERLEAVED, ROUNDING, TILE_M, TILE_N, INTERPRETED)


@triton.jit
def _product_of_block(
    x,
    words,
    scales,
    expert,
    choice,
    weight_row,
    slots,
    out,
    k_size,
    k_steps,
    x_stride,
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
    """`[TILE_N, TILE_M]`: rows of an expert's weight times the x of choices; zeros if there is no such expert."""
    inside = (tl.where(choice >= 0, expert, -1) >= 0)[None, None, :]
    rows = x + (tl.maximum(choice, 0) // slots).to(tl.int64)[None, None, :] * x_stride
    if HELD == 0:
        row = tl.reshape(tl.broadcast_to(weight_row[None, :], (SLICES, TILE_N)), (SLICES * TILE_N,))
        tile = tl.maximum(expert, 0) * (out // 64) + row // 64
        count = tl.where(expert >= 0, (k_steps + SLICES - 1) // SLICES, 0)
        if DEPENDENT and EARLY:
            gdc_launch_dependents()
        acc = multiply_slices(
            rows, inside, words, scales, tile, row % 64, row >= 0, count, k_size, k_steps, SLICES, False,
            SHAPE, FIELDS, ASSEMBLY, TILE_M, TILE_N, SLICES, UNEVEN, PADDED, INTERPRETED,
        )  # fmt: skip
    else:
        row = rows_of_slices(weight_row, TILE_N, SLICES)
        word, scale = offsets_of_rows(row, k_steps, SLICES, 1, SHAPE, TILE_N, SLICES)
        words_of_one, scales_of_one = sizes_of_experts(out, k_steps, SHAPE)
        words += tl.maximum(expert, 0) * words_of_one
        scales += tl.maximum(expert, 0) * scales_of_one
        held = load_ahead(
            words, scales, word, scale, row >= 0, k_steps, SLICES, 1, False, SHAPE, TILE_N, SLICES, HELD, UNEVEN
        )
        if DEPENDENT and EARLY:
            gdc_launch_dependents()
        acc = multiply_held(
            held, rows, inside, words, scales, word, scale, row >= 0, k_size, k_steps, SLICES, 1, False,
            SHAPE, FIELDS, ASSEMBLY, TILE_M, TILE_N, SLICES, HELD, STEPS, UNEVEN, PADDED, INTERPRETED,
        )  # fmt: skip
    return tl.reduce(acc, 0, plus)


@triton.jit
def _store_gated(
    acc,
    y,
    choice,
    inner,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDING: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Rows `[TILE_N, TILE_M]` of gates and ups to channels `[TILE_N / 2, TILE_M]`, rounded and stored."""
    CHANNELS: tl.constexpr = TILE_N // 2
    if INTERLEAVED:
        pairs = tl.permute(tl.reshape(acc, (CHANNELS, 2, TILE_M)), (0, 2, 1))
    else:
        pairs = tl.permute(tl.reshape(acc, (2, CHANNELS, TILE_M)), (1, 2, 0))
    gate, up = tl.split(pairs)
    h = gated(gate, up, GATE)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    if ROUNDING is not None:
        h = _rounded_channels(tl.where((channel < inner)[:, None], h, 0.0), ROUNDING, TILE_M, CHANNELS)
    _store(h, y, choice, channel, inner, INTERPRETED)


@triton.jit
def _rounded_channels(h, ROUNDING: tl.constexpr, TILE_M: tl.constexpr, CHANNELS: tl.constexpr):
    """Round `[CHANNELS, TILE_M]` to bfloat16, then blocks of channels to the MX format."""
    bits = widen(narrow(h, tl.bfloat16)).to(tl.int32, bitcast=True)
    blocks = tl.reshape(bits, (CHANNELS // ROUNDING[0], ROUNDING[0], TILE_M))
    amax = tl.expand_dims(tl.reduce(blocks & 0x7FFFFFFF, 1, maximum), 1)
    rounded = round_to_elements(
        blocks, amax, ROUNDING[1], ROUNDING[2], ROUNDING[3], ROUNDING[4], ROUNDING[5], ROUNDING[6], ROUNDING[7]
    )
    return tl.reshape(rounded, (CHANNELS, TILE_M))


@triton.jit
def _store(values, y, choice, n, n_size, INTERPRETED: tl.constexpr):
    """Round and store `[n, choices]` as rows of y."""
    result = narrow(values, y.dtype.element_ty) if INTERPRETED else values.to(y.dtype.element_ty)
    offsets = choice[None, :].to(tl.int64) * n_size + n[:, None]
    tl.store(y + offsets, result, mask=(choice >= 0)[None, :] & (n < n_size)[:, None])
