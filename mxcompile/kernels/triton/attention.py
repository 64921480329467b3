"""Single-token (decode) attention with grouped heads: y = softmax(query @ key.T * scale + mask) @ value.

A program handles up to 16 query heads that share keys and values, as the rows of one tensor-core tile, and a range of
the keys, so each key and value is read once. Where the keys of a head group are split among programs (flash-decoding),
each program stores its maximum score, its softmax denominator and its weighted sum of values. The last program to
arrive (`split_k_counters.py`) combines them in the order of the keys, so results are bit-identical on repeat.

Accumulation is in float32. As in torch's kernels, exponentials are rounded to the dtype of the values before the second
matmul. Where every key is masked with -inf the result is zero. The interpreter multiplies bfloat16 as float32, which
gives the same products.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

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
_TARGET_PROGRAMS: Final = 264
"""Two per multiprocessor of an H100, as many as fit."""
_MAX_HEAD_SIZE: Final = 256
_BLOCK_BYTES: Final = 16384
"""Bytes of a block of keys, and of values, in shared memory; double-buffered, with two programs per multiprocessor."""
_MAX_COMBINED_VALUES: Final = 16384
"""Partial sums that a program holds in registers while it combines splits, 128 per thread."""
FLOAT32_LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
FLOAT32_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Config:
    """How a call is tiled: `splits` programs share the keys of one head group; each loads `block` keys at a time."""

    splits: int
    block: int
    warps: int = 4
    stages: int = 3


def supports(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """None if `attend` supports the call, else the reason."""
    if query.dim() != 4 or query.shape[2] != 1:
        return "the Triton attention kernel takes one query per head"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries, keys and values have different dtypes: {query.dtype}, {key.dtype}, {value.dtype}"
    if max(query.shape[3], value.shape[3]) > _MAX_HEAD_SIZE:
        return f"the Triton attention kernel takes head sizes up to {_MAX_HEAD_SIZE}, not {query.shape[3]}"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads cannot share {key.shape[1]} KV heads"
    if mask is not None and mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        return f"the mask must be bool or float, not {str(mask.dtype).removeprefix('torch.')}"
    return unsupported_dtype(query.dtype) or unsupported_device(query)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, config: Config | None = None
) -> Tensor:
    """Query `[batch, heads, 1, size]`, key `[batch, kv_heads, keys, size]`, value `[batch, kv_heads, keys, vsize]`.

    mask: additive, or bool, true where a key is attended to; broadcast to `[batch, heads, 1, keys]`. Any strides.
    Returns `[batch, heads, 1, vsize]`, contiguous, in the dtype of the query.
    """
    _check(query, key, value)
    (batch, heads, _, size), (_, kv_heads, keys, vsize) = query.shape, value.shape
    result = torch.empty((batch, heads, 1, vsize), dtype=query.dtype, device=query.device)
    if result.numel() == 0:
        return result
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    mask = None if mask is None else mask.expand(batch, heads, 1, keys)
    group = heads // kv_heads
    head_groups, rows = batch * kv_heads * -(-group // _ROWS), triton.next_power_of_2(min(group, _ROWS))
    config, counters = _with_counters(query, config or config_for(key, head_groups), head_groups)
    launch(
        _attend_kernel,
        (head_groups, config.splits),
        query,
        key,
        value,
        query if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        result,
        query if counters is None else _scratch(query, head_groups * config.splits * rows, vsize),
        query if counters is None else counters,
        scale,
        keys,
        -(-keys // (config.splits * config.block)),
        (query.stride(0), query.stride(1)),
        key.stride()[:3],
        value.stride()[:3],
        (0, 0, 0) if mask is None else (mask.stride(0), mask.stride(1), mask.stride(3)),
        MASK="" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        MASK_OF_HEADS=mask is not None and mask.stride(1) != 0,
        INTERPRETED=not query.is_cuda,
        **constants(size, vsize, kv_heads, group, config),
        **options(config),
    )
    return result


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Shapes that disagree would make the kernel read out of bounds."""
    fits = query.dim() == key.dim() == value.dim() == 4 and query.shape[2] == 1
    if not fits or key.shape[:3] != value.shape[:3] or (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise MXCompileError(f"queries {[*query.shape]} cannot attend to {[*key.shape]} and {[*value.shape]}")
    if query.shape[1] % key.shape[1]:
        raise MXCompileError(f"{query.shape[1]} query heads cannot share {key.shape[1]} KV heads")


def config_for(key: Tensor, head_groups: int) -> Config:
    """As many programs as run concurrently, with equal numbers of key blocks; no program of a split is empty."""
    width = max(16, triton.next_power_of_2(key.shape[3])) * key.element_size()
    block = max(16, min(64, _BLOCK_BYTES // width))
    blocks = max(1, -(-key.shape[2] // block))
    blocks_per_split = -(-blocks // max(1, _TARGET_PROGRAMS // head_groups))
    return Config(-(-blocks // blocks_per_split), block)


def _with_counters(query: Tensor, config: Config, head_groups: int) -> tuple[Config, Tensor | None]:
    """The counters for a split; if there are not enough, the keys are not split."""
    if config.splits == 1:
        return config, None
    if not query.is_cuda:
        return config, torch.zeros(head_groups, dtype=torch.int32)
    counters = split_k_counters.stream_counters(query.device, head_groups)
    return (config, counters) if counters is not None else (Config(1, config.block, config.warps, config.stages), None)


def _scratch(query: Tensor, rows: int, vsize: int) -> Tensor:
    """For each row of each program: the weighted sum of values; behind these, maximum scores and denominators."""
    return torch.empty(rows * (vsize + 2), dtype=torch.float32, device=query.device)


@cache
def constants(size: int, vsize: int, kv_heads: int, group: int, config: Config) -> dict[str, Any]:
    """The constexpr arguments of the kernel that follow from sizes and config."""
    rows, lanes = triton.next_power_of_2(min(group, _ROWS)), max(16, triton.next_power_of_2(vsize))
    return {
        "SIZE": size,
        "VSIZE": vsize,
        "LANES": max(16, triton.next_power_of_2(size)),
        "VLANES": lanes,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "ROWS": rows,
        "BLOCK": config.block,
        "CHUNK": max(1, min(32, _MAX_COMBINED_VALUES // (rows * lanes))),
        "SPLIT": config.splits > 1,
    }


def options(config: Config) -> dict[str, Any]:
    """Compiler options."""
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sum(a, b):
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
    """Rows `index` as `[rows, LANES]`; zero where not `inside` and beyond `SIZE`."""
    lane = tl.arange(0, LANES)
    in_bounds = inside[:, None] if SIZE == LANES else inside[:, None] & (lane < SIZE)[None, :]
    return tl.load(pointer + index.to(tl.int64)[:, None] * stride + lane[None, :], mask=in_bounds, other=0.0)


@triton.jit
def _masked(scores, mask, head, k, in_bounds, inside, strides, MASK: tl.constexpr, MASK_OF_HEADS: tl.constexpr):
    """Apply the mask to scores `[rows, keys]`; -inf beyond the last key."""
    if MASK != "":
        if MASK_OF_HEADS:
            offsets = head[:, None] * strides[1] + (k.to(tl.int64) * strides[2])[None, :]
            mask_values = tl.load(mask + offsets, mask=in_bounds[:, None] & inside[None, :], other=0)
        else:
            mask_values = tl.load(mask + k.to(tl.int64) * strides[2], mask=inside, other=0)[None, :]
        if MASK == "bool":
            scores = tl.where(mask_values != 0, scores, float("-inf"))
        else:
            scores += widen(mask_values)
    return tl.where(inside[None, :], scores, float("-inf"))


@triton.jit
def _softmax_step(scores, values, running_max, denominator, acc, INTERPRETED: tl.constexpr):
    """Update the running maximum, denominator and weighted sum of values with another block of keys."""
    new_max = tl.maximum(running_max, tl.reduce(scores, 1, _maximum))
    exponentials = tl.exp(scores - new_max[:, None])
    rescale = tl.exp(running_max - new_max)
    denominator = denominator * rescale + tl.reduce(exponentials, 1, _sum)
    rounded = narrow(exponentials, values.dtype) if INTERPRETED else exponentials.to(values.dtype)
    return new_max, denominator, _multiply(rounded, values, acc * rescale[:, None], INTERPRETED)


@triton.jit(do_not_specialize=["scale", "keys", "blocks_per_split"])
def _attend_kernel(
    query,
    key,
    value,
    mask,
    result,
    scratch,
    counters,
    scale,
    keys,
    blocks_per_split,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    SIZE: tl.constexpr,
    VSIZE: tl.constexpr,
    LANES: tl.constexpr,
    VLANES: tl.constexpr,
    KV_HEADS: tl.constexpr,
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
    head_group = tl.program_id(0)
    split = tl.program_id(1)
    batch = (head_group // (PARTS * KV_HEADS)).to(tl.int64)
    kv_head = head_group // PARTS % KV_HEADS
    row = head_group % PARTS * 16 + tl.arange(0, 16)
    head = kv_head * GROUP + row
    in_bounds = row < GROUP

    query += batch * query_strides[0]
    key += batch * key_strides[0] + kv_head.to(tl.int64) * key_strides[1]
    value += batch * value_strides[0] + kv_head.to(tl.int64) * value_strides[1]
    mask += batch * mask_strides[0]
    running_max = tl.full((16,), FLOAT32_LOWEST, tl.float32)
    denominator = tl.full((16,), 0.0, tl.float32)
    acc = tl.full((16, VLANES), 0.0, tl.float32)
    blocks = (keys + BLOCK - 1) // BLOCK
    for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, blocks)):
        k = block * BLOCK + tl.arange(0, BLOCK)
        inside = k < keys
        # Loop-invariant, but hidden from the compiler: the load overlaps with that of the keys instead of preceding it.
        q = _load_rows(query + (block >> 30) * 16, head, query_strides[1], in_bounds, SIZE, LANES)
        key_block = _load_rows(key, k, key_strides[2], inside, SIZE, LANES)
        value_block = _load_rows(value, k, value_strides[2], inside, VSIZE, VLANES)
        scores = _multiply(q, tl.trans(key_block), tl.full((16, BLOCK), 0.0, tl.float32), INTERPRETED) * scale
        scores = _masked(scores, mask, head, k, in_bounds, inside, mask_strides, MASK, MASK_OF_HEADS)
        running_max, denominator, acc = _softmax_step(scores, value_block, running_max, denominator, acc, INTERPRETED)

    if SPLIT:
        _store_partial(scratch, running_max, denominator, acc, VSIZE, VLANES, ROWS)
        if arrives_last(counters + head_group, tl.num_programs(1)):
            full_denominator, full_acc = _combine(scratch, VSIZE, VLANES, ROWS, CHUNK)
            row_in_group = head_group % PARTS * 16 + tl.arange(0, ROWS)
            output_row = batch * (KV_HEADS * GROUP) + kv_head * GROUP + row_in_group
            _store(result, output_row, row_in_group < GROUP, full_denominator, full_acc, VSIZE, VLANES, INTERPRETED)
    else:
        _store(result, batch * (KV_HEADS * GROUP) + head, in_bounds, denominator, acc, VSIZE, VLANES, INTERPRETED)


@triton.jit
def _partial_pointers(scratch, row, VSIZE: tl.constexpr, VLANES: tl.constexpr, ROWS: tl.constexpr):
    """Scratch pointers to the weighted sums, maximum scores and denominators of rows, numbered across all programs."""
    rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * ROWS
    numerator_pointers = scratch + tl.expand_dims(row * VSIZE, -1) + tl.arange(0, VLANES)
    return numerator_pointers, scratch + rows * VSIZE + row, scratch + rows * (VSIZE + 1) + row


@triton.jit
def _store_partial(
    scratch, running_max, denominator, acc, VSIZE: tl.constexpr, VLANES: tl.constexpr, ROWS: tl.constexpr
):
    """Store the partial result of a program for the last one to combine."""
    row = tl.arange(0, 16)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    numerator_pointers, max_pointers, denominator_pointers = _partial_pointers(
        scratch, program * ROWS + row, VSIZE, VLANES, ROWS
    )
    tl.store(numerator_pointers, acc, mask=(row < ROWS)[:, None] & (tl.arange(0, VLANES) < VSIZE)[None, :])
    tl.store(max_pointers, running_max, mask=row < ROWS)
    tl.store(denominator_pointers, denominator, mask=row < ROWS)


@triton.jit
def _combine(scratch, VSIZE: tl.constexpr, VLANES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Denominators and weighted sums of `ROWS` rows over all programs of a head group, in the order of the keys."""
    splits = tl.num_programs(1)
    first = tl.program_id(0).to(tl.int64) * splits
    running_max = tl.full((ROWS,), FLOAT32_LOWEST, tl.float32)
    denominator = tl.full((ROWS,), 0.0, tl.float32)
    acc = tl.full((ROWS, VLANES), 0.0, tl.float32)
    for begin in range(0, splits, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        in_bounds = (split < splits)[:, None]
        row = (first + split)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        numerator_pointers, max_pointers, denominator_pointers = _partial_pointers(scratch, row, VSIZE, VLANES, ROWS)
        inside = in_bounds[:, :, None] & (tl.arange(0, VLANES) < VSIZE)
        parts = tl.load(numerator_pointers, mask=inside, other=0.0, cache_modifier=".cg")
        maxima = tl.load(max_pointers, mask=in_bounds, other=FLOAT32_LOWEST, cache_modifier=".cg")
        new_max = tl.maximum(running_max, tl.reduce(maxima, 0, _maximum))
        weights, rescale = tl.exp(maxima - new_max[None, :]), tl.exp(running_max - new_max)
        weights = tl.where(in_bounds, weights, 0.0)
        exponentials = weights * tl.load(denominator_pointers, mask=in_bounds, other=0.0, cache_modifier=".cg")
        denominator = denominator * rescale + tl.reduce(exponentials, 0, _sum)
        acc = acc * rescale[:, None] + tl.reduce(parts * weights[:, :, None], 0, _sum)
        running_max = new_max
    return denominator, acc


@triton.jit
def _store(
    result, head, in_bounds, denominator, acc, VSIZE: tl.constexpr, VLANES: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Divide by the denominator, round once, store; heads are numbered across the batch."""
    lane = tl.arange(0, VLANES)
    quotient = acc / tl.maximum(denominator, FLOAT32_TINY)[:, None]
    rounded = narrow(quotient, result.dtype.element_ty) if INTERPRETED else quotient.to(result.dtype.element_ty)
    tl.store(result + head[:, None] * VSIZE + lane[None, :], rounded, mask=in_bounds[:, None] & (lane < VSIZE)[None, :])
