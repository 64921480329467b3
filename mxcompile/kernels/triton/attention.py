"""y = softmax(query @ key.T * scale + mask) @ value of one query a head, with keys and values that heads share.

A program takes up to 16 query heads that share keys and values, the rows of a tensor core's product, and a run of the
keys, so that each key and value is read once. Programs that split the keys of the same heads each leave their largest
score, the sum of their powers and the sum of values, and the last one to arrive (`split_k_counters.py`) adds them up in
the order of the keys: results are equal bit for bit on repeat.

Sums are in float32; as in torch's kernels powers are rounded to the values' type before they multiply them. Where a
mask of -inf leaves nothing the result is zero. The interpreter multiplies bfloat16 as float32, which changes nothing.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking has nothing true to say about jit functions. Host code is fully typed.

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.kernels.triton import split_k_counters
from mxcompile.kernels.triton.elements import (
    FLOAT_DTYPES,
    arrives_last,
    launch,
    narrow,
    unsupported_device,
    unsupported_dtype,
    widen,
)

_ROWS: Final = 16
_PROGRAMS: Final = 264
"""Two for each multiprocessor of an H100, which is what fits in."""
_LARGEST_SIZE: Final = 256
_BLOCK_BYTES: Final = 16384
"""Of keys, and of values, in shared memory at a time; twice of each, and two programs have room."""
_COMBINED: Final = 16384
"""Sums of values that a program holds in registers while it combines splits, 128 a thread."""
LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
SMALLEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Cut:
    """How a call is cut: `splits` programs for the keys of the same heads, each `block` keys at a time."""

    splits: int
    block: int
    warps: int = 4
    stages: int = 3


def supports(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """None if `attend` can serve the call, or the reason why not."""
    if query.dim() != 4 or query.shape[2] != 1:
        return "the Triton kernel of attention takes one query a head"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries, keys and values are of different types: {query.dtype}, {key.dtype}, {value.dtype}"
    if max(query.shape[3], value.shape[3]) > _LARGEST_SIZE:
        return f"the Triton kernel of attention takes heads of up to {_LARGEST_SIZE} channels, not {query.shape[3]}"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} heads of queries cannot share {key.shape[1]} heads of keys"
    if mask is not None and mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        return f"a mask is bool or float, not {str(mask.dtype).removeprefix('torch.')}"
    return unsupported_dtype(query.dtype) or unsupported_device(query)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cut: Cut | None = None
) -> Tensor:
    """Query `[batch, heads, 1, size]`, key `[batch, shared, keys, size]`, value `[batch, shared, keys, vsize]`.

    mask: added to the scores, or bool, true where a key counts; broadcast to `[batch, heads, 1, keys]`. Any strides.
    The result is `[batch, heads, 1, vsize]`, contiguous, of the queries' type.
    """
    _check(query, key, value)
    (batch, heads, _, size), (_, shared, keys, vsize) = query.shape, value.shape
    result = torch.empty((batch, heads, 1, vsize), dtype=query.dtype, device=query.device)
    if result.numel() == 0:
        return result
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    mask = None if mask is None else mask.expand(batch, heads, 1, keys)
    group = heads // shared
    places, rows = batch * shared * -(-group // _ROWS), triton.next_power_of_2(min(group, _ROWS))
    cut, count = _with_counters(query, cut or cut_for(key, places), places)
    launch(
        _attend_kernel,
        (places, cut.splits),
        query,
        key,
        value,
        query if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        result,
        query if count is None else _scratch(query, places * cut.splits * rows, vsize),
        query if count is None else count,
        scale,
        keys,
        -(-keys // (cut.splits * cut.block)),
        (query.stride(0), query.stride(1)),
        key.stride()[:3],
        value.stride()[:3],
        (0, 0, 0) if mask is None else (mask.stride(0), mask.stride(1), mask.stride(3)),
        MASK="" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        MASK_OF_HEADS=mask is not None and mask.stride(1) != 0,
        INTERPRETED=not query.is_cuda,
        **constants(size, vsize, shared, group, cut),
        **options(cut),
    )
    return result


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Shapes that disagree would make the kernel read out of bounds."""
    fits = query.dim() == key.dim() == value.dim() == 4 and query.shape[2] == 1
    if not fits or key.shape[:3] != value.shape[:3] or (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise MXCompileError(f"queries {[*query.shape]} cannot attend to {[*key.shape]} and {[*value.shape]}")
    if query.shape[1] % key.shape[1]:
        raise MXCompileError(f"{query.shape[1]} heads of queries cannot share {key.shape[1]} heads of keys")


def cut_for(key: Tensor, places: int) -> Cut:
    """As many programs as run at a time, with as many blocks of keys each; no program of a split has none."""
    width = max(16, triton.next_power_of_2(key.shape[3])) * key.element_size()
    block = max(16, min(64, _BLOCK_BYTES // width))
    blocks = max(1, -(-key.shape[2] // block))
    each = -(-blocks // max(1, _PROGRAMS // places))
    return Cut(-(-blocks // each), block)


def _with_counters(query: Tensor, cut: Cut, places: int) -> tuple[Cut, Tensor | None]:
    """Counters for a split; without them keys stay whole."""
    if cut.splits == 1:
        return cut, None
    if not query.is_cuda:
        return cut, torch.zeros(places, dtype=torch.int32)
    free = split_k_counters.of_stream(query.device, places)
    return (cut, free) if free is not None else (Cut(1, cut.block, cut.warps, cut.stages), None)


def _scratch(query: Tensor, rows: int, vsize: int) -> Tensor:
    """For each row of each program: the sum of values; behind them all, the largest score and the sum of powers."""
    return torch.empty(rows * (vsize + 2), dtype=torch.float32, device=query.device)


@cache
def constants(size: int, vsize: int, shared: int, group: int, cut: Cut) -> dict[str, Any]:
    """The compile-time arguments of the kernel that follow from sizes and how they are cut."""
    rows, lanes = triton.next_power_of_2(min(group, _ROWS)), max(16, triton.next_power_of_2(vsize))
    return {
        "SIZE": size,
        "VSIZE": vsize,
        "LANES": max(16, triton.next_power_of_2(size)),
        "VLANES": lanes,
        "SHARED": shared,
        "GROUP": group,
        "ROWS": rows,
        "BLOCK": cut.block,
        "CHUNK": max(1, min(32, _COMBINED // (rows * lanes))),
        "SPLIT": cut.splits > 1,
    }


def options(cut: Cut) -> dict[str, Any]:
    """What the compiler is told."""
    return {"num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _added(a, b):
    return a + b


@triton.jit
def _multiply(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        result = tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    else:
        result = tl.dot(a, b, acc, input_precision="ieee")
    return result


@triton.jit
def _load_rows(pointer, index, stride, inside, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Rows `index` as `[rows, LANES]`, zeros where they are not `inside` and beyond `SIZE`."""
    lane = tl.arange(0, LANES)
    there = inside[:, None] if SIZE == LANES else inside[:, None] & (lane < SIZE)[None, :]
    return tl.load(pointer + index.to(tl.int64)[:, None] * stride + lane[None, :], mask=there, other=0.0)


@triton.jit
def _masked(scores, mask, head, k, there, inside, strides, MASK: tl.constexpr, MASK_OF_HEADS: tl.constexpr):
    """scores `[rows, keys]` with the mask; -inf beyond the last key."""
    if MASK != "":
        if MASK_OF_HEADS:
            at = head[:, None] * strides[1] + (k.to(tl.int64) * strides[2])[None, :]
            given = tl.load(mask + at, mask=there[:, None] & inside[None, :], other=0)
        else:
            given = tl.load(mask + k.to(tl.int64) * strides[2], mask=inside, other=0)[None, :]
        if MASK == "bool":
            scores = tl.where(given != 0, scores, float("-inf"))
        else:
            scores += widen(given)
    return tl.where(inside[None, :], scores, float("-inf"))


@triton.jit
def _added_block(scores, values, most, total, acc, INTERPRETED: tl.constexpr):
    """The largest score, the sum of powers and the sum of values with those of more keys."""
    top = tl.maximum(most, tl.reduce(scores, 1, _larger))
    powers = tl.exp(scores - top[:, None])
    decay = tl.exp(most - top)
    total = total * decay + tl.reduce(powers, 1, _added)
    rounded = narrow(powers, values.dtype) if INTERPRETED else powers.to(values.dtype)
    return top, total, _multiply(rounded, values, acc * decay[:, None], INTERPRETED)


@triton.jit(do_not_specialize=["scale", "keys", "each"])
def _attend_kernel(
    query,
    key,
    value,
    mask,
    result,
    scratch,
    counts,
    scale,
    keys,
    each,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    SIZE: tl.constexpr,
    VSIZE: tl.constexpr,
    LANES: tl.constexpr,
    VLANES: tl.constexpr,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_HEADS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    PARTS: tl.constexpr = (GROUP + 15) // 16
    place = tl.program_id(0)
    split = tl.program_id(1)
    batch = (place // (PARTS * SHARED)).to(tl.int64)
    shared = place // PARTS % SHARED
    row = place % PARTS * 16 + tl.arange(0, 16)
    head = shared * GROUP + row
    there = row < GROUP

    query += batch * query_strides[0]
    key += batch * key_strides[0] + shared.to(tl.int64) * key_strides[1]
    value += batch * value_strides[0] + shared.to(tl.int64) * value_strides[1]
    mask += batch * mask_strides[0]
    most = tl.full((16,), LOWEST, tl.float32)
    total = tl.full((16,), 0.0, tl.float32)
    acc = tl.full((16, VLANES), 0.0, tl.float32)
    blocks = (keys + BLOCK - 1) // BLOCK
    for block in range(split * each, tl.minimum((split + 1) * each, blocks)):
        k = block * BLOCK + tl.arange(0, BLOCK)
        inside = k < keys
        # The same each time, which the compiler does not know: on its way with the keys, not waited for before them.
        q = _load_rows(query + (block >> 30) * 16, head, query_strides[1], there, SIZE, LANES)
        keys_here = _load_rows(key, k, key_strides[2], inside, SIZE, LANES)
        values_here = _load_rows(value, k, value_strides[2], inside, VSIZE, VLANES)
        scores = _multiply(q, tl.trans(keys_here), tl.full((16, BLOCK), 0.0, tl.float32), INTERPRETED) * scale
        scores = _masked(scores, mask, head, k, there, inside, mask_strides, MASK, MASK_OF_HEADS)
        most, total, acc = _added_block(scores, values_here, most, total, acc, INTERPRETED)

    if SPLIT:
        _leave(scratch, most, total, acc, VSIZE, VLANES, ROWS)
        if arrives_last(counts + place, tl.num_programs(1)):
            all_powers, all_sums = _combine(scratch, VSIZE, VLANES, ROWS, CHUNK)
            one = place % PARTS * 16 + tl.arange(0, ROWS)
            to = batch * (SHARED * GROUP) + shared * GROUP + one
            _write(result, to, one < GROUP, all_powers, all_sums, VSIZE, VLANES, INTERPRETED)
    else:
        _write(result, batch * (SHARED * GROUP) + head, there, total, acc, VSIZE, VLANES, INTERPRETED)


@triton.jit
def _places(scratch, row, VSIZE: tl.constexpr, VLANES: tl.constexpr, ROWS: tl.constexpr):
    """Where sums of values, largest scores and sums of powers of rows, counted over all programs, are kept."""
    rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * ROWS
    sums = scratch + tl.expand_dims(row * VSIZE, -1) + tl.arange(0, VLANES)
    return sums, scratch + rows * VSIZE + row, scratch + rows * (VSIZE + 1) + row


@triton.jit
def _leave(scratch, most, total, acc, VSIZE: tl.constexpr, VLANES: tl.constexpr, ROWS: tl.constexpr):
    """What a program found, for the last one to combine."""
    row = tl.arange(0, 16)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    sums, tops, totals = _places(scratch, program * ROWS + row, VSIZE, VLANES, ROWS)
    tl.store(sums, acc, mask=(row < ROWS)[:, None] & (tl.arange(0, VLANES) < VSIZE)[None, :])
    tl.store(tops, most, mask=row < ROWS)
    tl.store(totals, total, mask=row < ROWS)


@triton.jit
def _combine(scratch, VSIZE: tl.constexpr, VLANES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The sums of powers and of values of `ROWS` rows over all programs of the same heads, in the order of the keys."""
    splits = tl.num_programs(1)
    first = tl.program_id(0).to(tl.int64) * splits
    most = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    acc = tl.full((ROWS, VLANES), 0.0, tl.float32)
    for begin in range(0, splits, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        there = (split < splits)[:, None]
        row = (first + split)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        sums, tops, totals = _places(scratch, row, VSIZE, VLANES, ROWS)
        inside = there[:, :, None] & (tl.arange(0, VLANES) < VSIZE)
        parts = tl.load(sums, mask=inside, other=0.0, cache_modifier=".cg")
        mosts = tl.load(tops, mask=there, other=LOWEST, cache_modifier=".cg")
        top = tl.maximum(most, tl.reduce(mosts, 0, _larger))
        shares, decay = tl.exp(mosts - top[None, :]), tl.exp(most - top)
        shares = tl.where(there, shares, 0.0)
        powers = shares * tl.load(totals, mask=there, other=0.0, cache_modifier=".cg")
        total = total * decay + tl.reduce(powers, 0, _added)
        acc = acc * decay[:, None] + tl.reduce(parts * shares[:, :, None], 0, _added)
        most = top
    return total, acc


@triton.jit
def _write(result, head, there, total, acc, VSIZE: tl.constexpr, VLANES: tl.constexpr, INTERPRETED: tl.constexpr):
    """Sums of values over sums of powers, rounded once; heads are counted over the batch."""
    lane = tl.arange(0, VLANES)
    quotient = acc / tl.maximum(total, SMALLEST)[:, None]
    rounded = narrow(quotient, result.dtype.element_ty) if INTERPRETED else quotient.to(result.dtype.element_ty)
    tl.store(result + head[:, None] * VSIZE + lane[None, :], rounded, mask=there[:, None] & (lane < VSIZE)[None, :])
