"""Choices sorted by expert on the GPU, rows in that order, and the weighted sum back: what grouped matmuls need.

A *choice* is a (token, slot) pair: choice `token * k + slot` of experts `[tokens, k]`. Sorted by expert, in the order
of the choices, with each expert's part padded to a multiple of `tile`, they form blocks of `tile` slots that each
belong to one expert:

    choices        int32 [blocks * tile]   the choice in a slot, -1 in padding
    block_experts  int32 [blocks]          the expert of a block, -1 if unused
    block_tokens   int32 [blocks]          how many choices a block holds
    position       int32 [tokens, k]       the slot of a choice, -1 if its number is not that of an expert
    used           int32 [1]               blocks in use; they come first

`blocks` is a bound that follows from shapes, so nothing waits for the GPU. It is a counting sort in two launches. The
first counts the choices of each expert in each chunk of choices. In the second, every program adds up these counts,
which gives the start of each expert and what earlier chunks placed there, and ranks its own choices by comparing them
with each other. No atomics: the order, and so every result, is the same on repeat.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.kernels.triton.elements import narrow, widen
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.reductions import plus

_CHUNKS: Final = 128
_STEP: Final = 128
_COLUMNS: Final = 1024
_ALIGNMENT: Final = 32


@dataclass(frozen=True)
class Routing:
    """See the module's docstring."""

    choices: Tensor
    block_experts: Tensor
    block_tokens: Tensor
    position: Tensor
    used: Tensor
    tile: int

    @property
    def slots(self) -> int:
        """Number of slots: rows of a tensor in the sorted order."""
        return len(self.choices)


def most_blocks(choices: int, experts: int, tile: int) -> int:
    """The largest number of blocks that so many choices among so many experts can fill."""
    return (choices + min(choices, experts) * (tile - 1)) // tile


def route(experts: Tensor, count: int, tile: int) -> Routing:
    """Sort the choices `[tokens, k]` (integers) among `count` experts into blocks of `tile`, a power of two."""
    choices = experts.numel()
    if experts.dim() != 2 or count < 1 or choices >= 2**31 // tile:
        raise MXCompileError(f"choices of shape {tuple(experts.shape)} among {count} experts cannot be sorted")
    blocks, lanes = most_blocks(choices, count, tile), triton.next_power_of_2(count)
    chunk = _STEP * max(1, -(-choices // (_STEP * _CHUNKS)))
    chunks = -(-choices // chunk)
    sizes = (blocks * tile, blocks, blocks, choices, 1, chunks * lanes)
    # One allocation; its parts are aligned as tensors of their own are.
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    parts = torch.empty(sum(padded), dtype=torch.int32, device=experts.device).split(padded)
    slots, block_experts, block_tokens, position, used, counts = (
        part[:size] for part, size in zip(parts, sizes, strict=True)
    )
    if not choices:
        return Routing(slots, block_experts, block_tokens, position.view(experts.shape), used.zero_(), tile)
    experts = experts.contiguous()
    constants = {"CHUNK": chunk, "STEP": _STEP, "EXPERTS": lanes, "num_warps": 4}
    launch(_count_kernel, chunks, experts, counts, choices, count, **constants)
    launch(
        _place_kernel,
        chunks,
        experts,
        counts,
        slots,
        block_experts,
        block_tokens,
        position,
        used,
        choices,
        count,
        blocks,
        TILE=tile,
        **constants,
    )
    return Routing(slots, block_experts, block_tokens, position.view(experts.shape), used, tile)


def gather(x: Tensor, routing: Routing) -> Tensor:
    """Rows of x `[tokens, in]` in the sorted order, `[slots, in]`; rows of slots in padding are not written."""
    rows, size = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty((routing.slots, size), dtype=x.dtype, device=x.device)
    if y.numel():
        programs = (rows, -(-size // _COLUMNS))
        slots = routing.position.shape[1]
        launch(_gather_kernel, programs, x, y, routing.position, size, x.stride(0), SLOTS=slots, COLUMNS=_COLUMNS)
    return y


def weighted_sum(y: Tensor, routing: Routing, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the choices of each token: y `[slots, hidden]` in the sorted order, weights `[tokens, k]`.

    Added in float32 in the order of the choices and rounded once; choices of no expert count as zeros. Returns
    `[tokens, hidden]` of `dtype`.
    """
    (rows, slots), size = routing.position.shape, y.shape[1]
    result = torch.empty((rows, size), dtype=dtype, device=y.device)
    if result.numel():
        launch(
            _weighted_sum_kernel,
            (rows, -(-size // _COLUMNS)),
            y,
            result,
            routing.position,
            weights,
            size,
            y.stride(0),
            *weights.stride(),
            SLOTS=slots,
            COLUMNS=_COLUMNS,
        )
    return result


def ungather(y: Tensor, routing: Routing) -> Tensor:
    """Rows of y `[slots, out]` in the order of the choices, `[tokens * k, out]`; zeros for choices of no expert."""
    choices, size = routing.position.numel(), y.shape[1]
    result = torch.empty((choices, size), dtype=y.dtype, device=y.device)
    if result.numel():
        programs = (choices, -(-size // _COLUMNS))
        launch(_ungather_kernel, programs, y, result, routing.position, size, y.stride(0), COLUMNS=_COLUMNS)
    return result


@triton.jit
def _load_choices(experts, index, choices, count):
    """The experts of the choices at `index` as int32, -1 for numbers of no expert."""
    number = tl.load(experts + index, mask=index < choices, other=-1)
    return tl.where((number >= 0) & (number < count), number, -1).to(tl.int32)


@triton.jit(do_not_specialize=["choices", "count"])
def _count_kernel(experts, counts, choices, count, CHUNK: tl.constexpr, STEP: tl.constexpr, EXPERTS: tl.constexpr):
    chunk = tl.program_id(0)
    lanes = tl.arange(0, EXPERTS)
    total = tl.full((EXPERTS,), 0, tl.int32)
    for first in range(0, CHUNK, STEP):
        expert = _load_choices(experts, chunk * CHUNK + first + tl.arange(0, STEP), choices, count)
        total += tl.reduce((expert[:, None] == lanes[None, :]).to(tl.int32), 0, plus)
    tl.store(counts + chunk * EXPERTS + lanes, total)


@triton.jit(do_not_specialize=["choices", "count", "blocks"])
def _place_kernel(
    experts,
    counts,
    slots,
    block_experts,
    block_tokens,
    position,
    used,
    choices,
    count,
    blocks,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    chunk = tl.program_id(0)
    lanes = tl.arange(0, EXPERTS)
    total, next_slot = _totals(counts, chunk, tl.num_programs(0), EXPERTS)
    tiles = (total + (TILE - 1)) // TILE
    ends = tl.associative_scan(tiles, 0, plus)
    next_slot += (ends - tiles) * TILE
    for first in range(0, CHUNK, STEP):
        index = chunk * CHUNK + first + tl.arange(0, STEP)
        expert = _load_choices(experts, index, choices, count)
        other = chunk * CHUNK + first + tl.arange(0, STEP)
        same = expert[:, None] == _load_choices(experts, other, choices, count)[None, :]
        rank = tl.reduce((same & (other[None, :] < index[:, None])).to(tl.int32), 1, plus)
        chosen = expert[:, None] == lanes[None, :]
        slot = tl.reduce(tl.where(chosen, next_slot[None, :], 0), 1, plus) + rank
        tl.store(slots + slot, index, mask=expert >= 0)
        tl.store(position + index, tl.where(expert >= 0, slot, -1), mask=index < choices)
        next_slot += tl.reduce(chosen.to(tl.int32), 0, plus)
    blocks_in_use = tl.reduce(tiles, 0, plus)
    if chunk == 0:
        tl.store(used, blocks_in_use)
    for first in range(chunk * STEP, blocks, tl.num_programs(0) * STEP):
        block = first + tl.arange(0, STEP)
        expert = tl.reduce((ends[None, :] <= block[:, None]).to(tl.int32), 1, plus)
        filled = tl.where(lanes[None, :] == expert[:, None], ((ends - tiles) * TILE + total)[None, :], 0)
        tokens = tl.reduce(filled, 1, plus) - block * TILE
        tokens = tl.where(block < blocks_in_use, tl.minimum(tokens, TILE), 0)
        tl.store(block_experts + block, tl.where(block < blocks_in_use, expert, -1), mask=block < blocks)
        tl.store(block_tokens + block, tokens, mask=block < blocks)
    for expert in range(chunk, count, tl.num_programs(0)):
        end = tl.reduce(tl.where(lanes == expert, ends, 0), 0, plus) * TILE
        unfilled = tl.reduce(tl.where(lanes == expert, tiles * TILE - total, 0), 0, plus)
        slot = end - TILE + tl.arange(0, TILE)
        tl.store(slots + slot, -1, mask=slot >= end - unfilled)
    for block in range(blocks_in_use + chunk, blocks, tl.num_programs(0)):
        tl.store(slots + block * TILE + tl.arange(0, TILE), -1)


@triton.jit
def _totals(counts, chunk, chunks, EXPERTS: tl.constexpr):
    """How many choices each expert has: in all chunks, and in those before `chunk`."""
    ROWS: tl.constexpr = 64 if EXPERTS <= 128 else 16
    lanes = tl.arange(0, EXPERTS)
    total = tl.full((EXPERTS,), 0, tl.int32)
    before = tl.full((EXPERTS,), 0, tl.int32)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        part = tl.load(counts + row * EXPERTS + lanes[None, :], mask=row < chunks, other=0)
        total += tl.reduce(part, 0, plus)
        before += tl.reduce(tl.where(row < chunk, part, 0), 0, plus)
    return total, before


@triton.jit
def _gather_kernel(x, y, position, size, x_stride, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    row = tl.load(x + token.to(tl.int64) * x_stride + column, mask=inside)
    for i in tl.static_range(SLOTS):
        slot = tl.load(position + token * SLOTS + i)
        tl.store(y + slot.to(tl.int64) * size + column, row, mask=column < tl.where(slot >= 0, size, 0))


@triton.jit
def _weighted_sum_kernel(
    y,
    result,
    position,
    weights,
    size,
    y_stride,
    weights_stride_token,
    weights_stride_slot,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    total = tl.full((COLUMNS,), 0.0, tl.float32)
    for i in tl.static_range(SLOTS):
        slot = tl.load(position + token * SLOTS + i)
        weight = widen(tl.load(weights + token * weights_stride_token + i * weights_stride_slot))
        present = column < tl.where(slot >= 0, size, 0)
        row = tl.load(y + slot.to(tl.int64) * y_stride + column, mask=present, other=0.0)
        total += widen(row) * weight
    tl.store(result + token.to(tl.int64) * size + column, narrow(total, result.dtype.element_ty), mask=inside)


@triton.jit
def _ungather_kernel(y, result, position, size, y_stride, COLUMNS: tl.constexpr):
    choice = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    slot = tl.load(position + choice)
    present = column < tl.where(slot >= 0, size, 0)
    row = tl.load(y + slot.to(tl.int64) * y_stride + column, mask=present, other=0.0)
    tl.store(result + choice.to(tl.int64) * size + column, row, mask=inside)
