"""Single-token (decode) attention with grouped heads: y = softmax(query @ key.T * scale + mask) @ value.

A program handles up to 16 query heads that share keys and values, as the rows of one tensor-core tile, and a range of
the keys, so each key and value is read once. Where the keys of a head group are split among programs (flash-decoding),
each program stores its maximum score, its softmax denominator and its weighted sum of values. The last program to
arrive (`split_k_counters.py`) combines them in the order of the keys, so results are bit-identical on repeat.

With a new token the kernel also rotates query and key (RoPE), writes the key and the value to the cache, and rounds the
result to an MX format: all that stands between two matmuls of a decode step.

Accumulation is in float32. As in torch's kernels, exponentials are rounded to the dtype of the values before the second
matmul. Where every key is masked with -inf the result is zero. The interpreter multiplies bfloat16 as float32, which
gives the same products.
"""

# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors where jit functions are. Host code is fully typed.

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import torch
import triton
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.kernels.triton import split_k_counters
from mxcompile.kernels.triton.attention.one_token_kernel import attend_kernel
from mxcompile.kernels.triton.elements import FLOAT_DTYPES, starts_early, unsupported_device, unsupported_dtype
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.quantize import Rounding, rounding_constants, why_not_rounded

MOST_COMBINED: Final = 33
"""Parts whose partial results are loaded at a time, at most."""
_ROWS: Final = 16
_TARGET_PROGRAMS: Final = 264
"""Two per multiprocessor of an H100, as many as fit."""
_MAX_HEAD_SIZE: Final = 256
_BLOCK_BYTES: Final = 16384
"""Bytes of a block of keys, and of values, in shared memory; double-buffered, with two programs per multiprocessor."""
_MAX_COMBINED_VALUES: Final = 16384
"""Partial sums that a program holds in registers while it combines splits, 128 per thread."""


@dataclass(frozen=True)
class Config:
    """How a call is tiled: `splits` programs share the keys of one head group; each loads `block` keys at a time.

    dependent: programmatic dependent launch: the first keys and values are prefetched while the previous kernel runs.
    registers: of a thread, at most; 0 for as many as the compiler takes.
    """

    splits: int
    block: int
    warps: int = 8
    stages: int = 3
    dependent: bool = False
    registers: int = 0


def supports(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rounding: Rounding | None = None
) -> str | None:
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
    reason = None if rounding is None else why_not_rounded(value.shape[3], rounding)
    return reason or unsupported_dtype(query.dtype) or unsupported_device(query)


@dataclass(frozen=True)
class NewToken:
    """Key `[batch, kv_heads, 1, size]` and value `[batch, kv_heads, 1, vsize]` of the current token, to be written to a
    cache at `position`, which is one int64.

    cos, sin: `[batch or 1, 1, 1, size]`, by which query and key are rotated (RoPE on halves); None if they are rotated
    already.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    cos: Tensor | None
    sin: Tensor | None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    config: Config | None = None,
    new: NewToken | None = None,
    rounding: Rounding | None = None,
) -> Tensor:
    """Query `[batch, heads, 1, size]`, key `[batch, kv_heads, keys, size]`, value `[batch, kv_heads, keys, vsize]`.

    mask: additive, or bool, true where a key is attended to; broadcast to `[batch, heads, 1, keys]`. Any strides.
    new: the current token; key and value are then its cache, which is written to. rounding: of the result.
    Returns `[batch, heads, 1, vsize]`, contiguous, in the dtype of the query.
    """
    _check(query, key, value, new)
    (batch, heads, _, size), (_, kv_heads, keys, vsize) = query.shape, value.shape
    result = torch.empty((batch, heads, 1, vsize), dtype=query.dtype, device=query.device)
    if result.numel() == 0:
        return result
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    mask = None if mask is None else mask.expand(batch, heads, 1, keys)
    group = heads // kv_heads
    head_groups, rows = batch * kv_heads * -(-group // _ROWS), triton.next_power_of_2(min(group, _ROWS))
    config, counters = _with_counters(query, config or config_for(key, head_groups, new is not None), head_groups)
    programs = config.splits + (new is not None and config.splits > 1)  # one of its own for the new token
    tokens, new_strides = _new_token_arguments(query, new)
    launch(
        attend_kernel,
        (head_groups, programs),
        query,
        (key, value),
        *tokens,
        query if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        result,
        query if counters is None else scratch_of(query, head_groups * programs, rows, vsize),
        query if counters is None else counters,
        scale,
        keys,
        -(-keys // (config.splits * config.block)),
        (query.stride(0), query.stride(1)),
        (*key.stride()[:3], *value.stride()[:3]),
        new_strides,
        (0, 0, 0) if mask is None else (mask.stride(0), mask.stride(1), mask.stride(3)),
        MASK="" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        MASK_OF_HEADS=mask is not None and mask.stride(1) != 0,
        APPEND=new is not None,
        ROTATE=new is not None and new.cos is not None,
        DEPENDENT=config.dependent,
        INTERPRETED=not query.is_cuda,
        **rounding_constants(rounding, query.dtype),
        **constants(size, vsize, kv_heads, group, config),
        **options(config),
    )
    return result


def _new_token_arguments(query: Tensor, new: NewToken | None) -> tuple[list[Any], tuple[int, ...]]:
    """((new key and value), (cos and sin), position; the strides of these over batch entries and heads)."""
    if new is None:
        return [(query, query), (query, query), query], (0,) * 6
    key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (new.key, new.value))
    turns, steps = [query, query], [0, 0]
    if new.cos is not None and new.sin is not None:
        turns = [part if part.stride(3) == 1 else part.contiguous() for part in (new.cos, new.sin)]
        steps = [part.stride(0) if part.shape[0] > 1 else 0 for part in turns]
    return [(key, value), tuple(turns), new.position], (*key.stride()[:2], *value.stride()[:2], *steps)


def _check(query: Tensor, key: Tensor, value: Tensor, new: NewToken | None) -> None:
    """Shapes that disagree would make the kernel read out of bounds; and what is written must be the cache itself."""
    fits = query.dim() == key.dim() == value.dim() == 4 and query.shape[2] == 1
    if not fits or key.shape[:3] != value.shape[:3] or (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise MXCompileError(f"queries {[*query.shape]} cannot attend to {[*key.shape]} and {[*value.shape]}")
    if query.shape[1] % key.shape[1]:
        raise MXCompileError(f"{query.shape[1]} query heads cannot share {key.shape[1]} KV heads")
    if new is None:
        return
    for part, held in ((new.key, key), (new.value, value)):
        if part.shape != (*held.shape[:2], 1, held.shape[3]) or part.dtype != held.dtype or held.stride(3) != 1:
            raise MXCompileError(f"a new token's {part.dtype} {[*part.shape]} cannot be written to {[*held.shape]}")
    sizes = [(n, 1, 1, query.shape[3]) for n in (1, query.shape[0])]
    turns = [part for part in (new.cos, new.sin) if part is not None]
    if len(turns) == 1 or any(part.shape not in sizes for part in turns) or new.position.numel() != 1:
        raise MXCompileError(
            f"cos and sin of {[*query.shape]} are {sizes[0]} or {sizes[1]}, and the position one number"
        )


def config_for(key: Tensor, head_groups: int, has_new: bool = True) -> Config:
    """As many programs as run concurrently, with equal numbers of key blocks, two or more where there are several: then
    combining their results takes less time. No program of a split is empty.

    Without a new token a program needs less shared memory, and three would fit on a multiprocessor: those of the next
    launch, which start early, would crowd on some. A fourth stage leaves room for two.
    """
    width = max(16, triton.next_power_of_2(key.shape[3])) * key.element_size()
    block = max(16, min(64, _BLOCK_BYTES // width))
    blocks = max(1, -(-key.shape[2] // block))
    blocks_per_split = max(min(blocks, 2), -(-blocks // max(1, _TARGET_PROGRAMS // head_groups)))
    splits = -(-blocks // blocks_per_split)
    return Config(splits, block, stages=3 if has_new else 4, dependent=starts_early(key))


def _with_counters(query: Tensor, config: Config, head_groups: int) -> tuple[Config, Tensor | None]:
    """The counters for a split; if there are not enough, the keys are not split."""
    if config.splits == 1:
        return config, None
    if not query.is_cuda:
        return config, torch.zeros(head_groups, dtype=torch.int32)
    counters = split_k_counters.stream_counters(query.device, head_groups)
    return (config, counters) if counters is not None else (replace(config, splits=1), None)


def scratch_of(query: Tensor, programs: int, rows: int, vsize: int) -> Tensor:
    """For each row of each program: the weighted sum of values; behind these, maximum scores and denominators; and room
    for parts that `combine_partials` reads too many."""
    return torch.empty((programs + MOST_COMBINED) * rows * (vsize + 2), dtype=torch.float32, device=query.device)


@cache
def constants(size: int, vsize: int, kv_heads: int, group: int, config: Config) -> dict[str, Any]:
    """The constexpr arguments of the kernel that follow from sizes and config."""
    rows, lanes = triton.next_power_of_2(min(group, _ROWS)), max(16, triton.next_power_of_2(vsize))
    return {
        "SIZES": (size, vsize, max(16, triton.next_power_of_2(size)), lanes),
        "HEADS": (kv_heads, group),
        "ROWS": rows,
        "BLOCK": config.block,
        # Not all 33 at once: with 193 registers a thread, no two programs would share a multiprocessor.
        "CHUNK": max(1, min(8 if config.splits < 8 else 17, _MAX_COMBINED_VALUES // (rows * lanes))),
        "SPLIT": config.splits > 1,
    }


def options(config: Config) -> dict[str, Any]:
    """Compiler options."""
    return {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
        **({"launch_pdl": True} if config.dependent else {}),
        **({"maxnreg": config.registers} if config.registers else {}),
    }
