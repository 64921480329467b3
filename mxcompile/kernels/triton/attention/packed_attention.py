"""Attention of a few queries over packed keys and values: y = softmax(query @ keys.T * scale + mask) @ values.

Keys and values are decoded in registers (`packed_states.py`), so their packed bytes are all that is read. A program
handles the query heads that share keys and values, and a range of the tokens; the last program to arrive combines the
results in the order of the tokens, as in `one_token.py`. Matmuls are in bfloat16 with float32 sums: elements are exact,
exponentials are rounded to bfloat16 and then multiplied by the scales of values, which are powers of two.

A scale of 2**-127 counts as zero.
"""

# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors where jit functions are. Host code is fully typed.

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
import triton
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, ScaleRule, why_no_kernel
from mxcompile.kernels.triton import split_k_counters
from mxcompile.kernels.triton.attention.append_packed import append_constants
from mxcompile.kernels.triton.attention.one_token import MOST_COMBINED, Config, options, scratch_of
from mxcompile.kernels.triton.attention.packed_attention_kernel import attend_packed_kernel
from mxcompile.kernels.triton.attention.packed_states import plane_constants
from mxcompile.kernels.triton.elements import FLOAT_DTYPES, starts_early, unsupported_device
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.quantize import Rounding, rounding_constants, why_not_rounded
from mxcompile.numerics.exact_tokens import ExactTokens, check_exact
from mxcompile.numerics.packed_attention import PackedStates, check_shapes

_MOST_ROWS: Final = 64
_MAX_HEAD_SIZE: Final = 256
_TARGET_PROGRAMS: Final = 264
"""Two per multiprocessor of an H100 or H200, as many as registers allow."""
_MAX_COMBINED_VALUES: Final = MOST_COMBINED * 512
"""Partial sums that a program holds in registers while it combines parts: those of four heads of 128."""


@dataclass(frozen=True)
class Exact:
    """What is read exactly: see `numerics/exact_tokens.py`. query: for these keys."""

    query: Tensor
    keys: ExactTokens
    values: ExactTokens
    held: Tensor
    window: int

    def constants(self, tensors: list[Tensor]) -> tuple[int, int, int, int, bool]:
        """`EXACT` of the kernel."""
        first, newest = (0 if part is None else part.shape[2] for part in (self.keys.first, self.keys.newest))
        width = 16 // tensors[0].element_size()
        starts = (part.data_ptr() % 16 == 0 for part in tensors)
        is_aligned = all(starts) and not any(stride % width for part in tensors for stride in part.stride()[:3])
        return self.window, first, newest, triton.next_power_of_2(max(1, self.window - 1)), is_aligned

    @property
    def tensors(self) -> list[Tensor]:
        """The query and the states, of the new token in place of what there is not."""
        pairs = zip(*((part.own, part.newest, part.first) for part in (self.keys, self.values)), strict=True)
        states = [own if part is None else part for pair in pairs for own, part in zip(self._own, pair, strict=True)]
        return [part if part.stride(3) == 1 else part.contiguous() for part in (self.query, *states)]

    @property
    def _own(self) -> tuple[Tensor, Tensor]:
        return self.keys.own, self.values.own


@dataclass(frozen=True)
class Next:
    """Key and value of the query's token, `[batch, kv_heads, 1, size]`, which are rounded by these rules and written at
    its position. rotation: cos and sin `[batch or 1, 1, 1, size]`, for query and key."""

    key: Tensor
    value: Tensor
    rules: tuple[ScaleRule, ScaleRule]
    rotation: tuple[Tensor, Tensor] | None

    def arguments(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Key, value, cos and sin; and the kernel's strides of these."""
        parts = (self.key, self.value, *((self.key, self.key) if self.rotation is None else self.rotation))
        key, value, cos, sin = tensors = tuple(part if part.stride(3) == 1 else part.contiguous() for part in parts)
        steps = (0 if self.rotation is None or part.shape[0] == 1 else part.stride(0) for part in (cos, sin))
        return tensors, (*key.stride()[:2], *value.stride()[:2], *steps)

    def constants(self, states: tuple[PackedStates, PackedStates]) -> tuple[Any, ...]:
        """`NEW` of the kernel."""
        sides = zip(states, self.rules, strict=True)
        return tuple(append_constants(side.fmt, side.size, rule, self.key.dtype) for side, rule in sides)


def supports(
    query: Tensor, keys: PackedStates, values: PackedStates, mask: Tensor | None, rounding: Rounding | None = None
) -> str | None:
    """None if `attend` supports the call, else the reason."""
    for states in (keys, values):
        reason = why_no_kernel(states.fmt)
        if reason is not None:
            return reason
        if states.size > _MAX_HEAD_SIZE:
            return f"the kernel of packed attention takes head sizes up to {_MAX_HEAD_SIZE}, not {states.size}"
    if query.dtype != torch.bfloat16:
        return f"the kernel of packed attention takes bfloat16, not {str(query.dtype).removeprefix('torch.')}"
    rows = _rows(query, keys, values)
    if max(rows[1:]) > _MOST_ROWS:
        return f"{query.shape[2]} queries of {query.shape[1] // keys.elements.shape[1]} heads are too many rows"
    if mask is not None and mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        return f"the mask must be bool or float, not {str(mask.dtype).removeprefix('torch.')}"
    reason = None if rounding is None else why_not_rounded(values.size, rounding)
    return reason or unsupported_device(query)


def why_not_written(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    states: tuple[PackedStates, PackedStates],
    rules: tuple[ScaleRule, ScaleRule],
    rotation: tuple[Tensor, Tensor] | None,
) -> str | None:
    """None if `attend` writes a new token to such states, else the reason."""
    if ScaleRule.MSE in rules:
        return "scale rule mse searches exponents, which the kernel does not do"
    if any(part.dtype != query.dtype for part in (*new, *(rotation or ()))):
        return f"key, value, cos and sin must be {query.dtype}, as the query is"
    if not all(map(_is_written_in_place, states)):
        return "rows of the cache are not aligned"
    return None


def attend(
    query: Tensor,
    keys: PackedStates,
    values: PackedStates,
    mask: Tensor | None,
    scale: float,
    config: Config | None = None,
    rounding: Rounding | None = None,
    position: Tensor | None = None,
    exact: Exact | None = None,
    new: Next | None = None,
) -> Tensor:
    """See `numerics.packed_attention.attend_packed`. Any strides; rows that are not contiguous are copied.

    rounding: of the result. position: later tokens are not read. exact: what is read otherwise, up to a position. new:
    what is first written to keys and values, at that position, in place.
    """
    _check(query, keys, values, position, exact, new)
    (batch, heads, queries, _), (kv_heads, tokens) = query.shape, keys.elements.shape[1:3]
    result = torch.empty((batch, heads, queries, values.size), dtype=query.dtype, device=query.device)
    if result.numel() == 0:
        return result
    rows = _rows(query, keys, values)
    programs = batch * kv_heads
    config = config or config_for(tokens, programs, keys, values, starts_early(query), int(exact is not None))
    query = query if query.stride(3) == 1 else query.contiguous()
    mask = None if mask is None else mask.expand(batch, heads, queries, tokens)
    tensors = [part for states in (keys, values) for part in (_words(states), _scales(states))]
    parts = config.splits + (exact is not None)
    token, token_strides = ((query,) * 4, (0,) * 6) if new is None else new.arguments()
    others = [query] * 7 if exact is None else exact.tensors
    launch(
        attend_packed_kernel,
        (programs, parts),
        query,
        tuple(tensors),
        query if position is None else position,
        token,
        (*others, query if exact is None else exact.held),
        query if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        result,
        scratch_of(query, programs * parts, rows[0], values.size),
        _counters(query.device, programs),
        scale,
        tokens,
        query.stride()[:3],
        tuple(part.stride(i) for i in range(3) for part in tensors),
        token_strides,
        tuple(stride for part in others for stride in part.stride()[:3]),
        (0, 0, 0, 0) if mask is None else mask.stride(),
        UP_TO_POSITION=position is not None,
        NEW=None if new is None else new.constants((keys, values)),
        ROTATE=new is not None and new.rotation is not None,
        EXACT=None if exact is None else exact.constants(others),
        MASK="" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        MASK_OF_ROWS=mask is not None and any(mask.stride(i) for i in (1, 2)),
        INTERPRETED=not query.is_cuda,
        **rounding_constants(rounding, query.dtype),
        **constants(
            keys.fmt,
            values.fmt,
            (keys.size, values.size),
            (kv_heads, heads // kv_heads, queries),
            config,
            tuple(part.dtype == torch.int32 for part in tensors[1::2]),
        ),
        **options(config),
    )
    return result


def _counters(device: torch.device, programs: int) -> Tensor:
    counters = split_k_counters.stream_counters(device, programs) if device.type == "cuda" else None
    return torch.zeros(programs, dtype=torch.int32, device=device) if counters is None else counters


def _check(
    query: Tensor,
    keys: PackedStates,
    values: PackedStates,
    position: Tensor | None,
    exact: Exact | None,
    new: Next | None,
) -> None:
    check_shapes(query, keys, values)
    if max(_rows(query, keys, values)[1:]) > _MOST_ROWS:
        raise MXCompileError(f"{[*query.shape]} queries are too many rows for one program")
    if new is not None:
        _check_next(query, (keys, values), position, new)
    if exact is None:
        return
    if position is None or query.shape[2] != 1 or exact.query.shape != query.shape:
        raise MXCompileError("only attention of one query up to its position reads some tokens exactly")
    for states, part in ((keys, exact.keys), (values, exact.values)):
        check_exact((*states.elements.shape[:3], states.size), part, exact.held)


def _check_next(query: Tensor, states: tuple[PackedStates, PackedStates], position: Tensor | None, new: Next) -> None:
    """Shapes that disagree would make the kernel write out of bounds; and what is written must be the cache itself."""
    for part, side in zip((new.key, new.value), states, strict=True):
        fits = part.shape == (*side.elements.shape[:2], 1, side.size) and part.dtype == query.dtype
        if not fits or not _is_written_in_place(side):
            raise MXCompileError(f"a new token's {[*part.shape]} cannot be written to {[*side.elements.shape]}")
    sizes = [(n, 1, 1, query.shape[3]) for n in (1, query.shape[0])]
    if query.shape[2] != 1 or position is None or position.numel() != 1:
        raise MXCompileError("a new token has one query and one position")
    if any(part.shape not in sizes for part in new.rotation or ()):
        raise MXCompileError(f"cos and sin of {[*query.shape]} are {sizes[0]} or {sizes[1]}")


def _is_written_in_place(side: PackedStates) -> bool:
    pairs = ((side.elements, _words(side)), (side.scales, _scales(side)))
    return all(part.data_ptr() == read.data_ptr() for part, read in pairs)


def config_for(
    tokens: int, programs: int, keys: PackedStates, values: PackedStates, dependent: bool, others: int = 0
) -> Config:
    """Measured for Llama-3-8B's heads: as many programs as run concurrently, with equal numbers of blocks.

    programs: batch entries times KV heads. others: further programs of each, for exact tokens.
    """
    block, stages = (128, 3) if max(keys.fmt.bits, values.fmt.bits) == 4 else (64, 3)
    blocks = max(1, -(-tokens // block))
    per_split = -(-blocks // max(1, _TARGET_PROGRAMS // programs - others))
    return Config(-(-blocks // per_split), block, 4, stages, dependent)


@cache
def constants(
    key: MXFormat,
    value: MXFormat,
    sizes: tuple[int, int],
    heads: tuple[int, int, int],
    config: Config,
    in_words: tuple[bool, ...],
) -> dict[str, Any]:
    """The constexpr arguments of the kernel that follow from formats, sizes and config.

    sizes: of a key and a value. heads: KV heads, query heads that share one, queries. in_words: whether scales of keys,
    and of values, are read four at a time.
    """
    lanes = triton.next_power_of_2(sizes[1])
    blocks = [fmt.blocks(size) for fmt, size in zip((key, value), sizes, strict=True)]
    rows = _row_counts(heads[1] * heads[2], blocks)
    sides: list[tuple[Any, ...]] = []
    for fmt, size, count, words, left in zip((key, value), sizes, blocks, in_words, (True, False), strict=True):
        plane = plane_constants(fmt, size, left)
        scales = (count, triton.next_power_of_2(count), words)
        sides.append(
            (plane["FORMAT"], plane["COLUMNS"], scales, plane["ELEMENT"], plane["NUMBERS"], *plane["ASSEMBLY"])
        )
    return {
        "KEY": sides[0],
        "VALUE": sides[1],
        "SIZES": (*sizes, lanes, triton.next_power_of_2(sizes[0])),
        "HEADS": heads,
        "ROWS": rows,
        "BLOCK": config.block,
        "SLICES": max(1, min(config.warps, config.block // 16)),
        "CHUNK": max(1, min(_combined(config.splits + 1), _MAX_COMBINED_VALUES // (rows[0] * lanes))),
        "DEPENDENT": config.dependent,
    }


def _combined(parts: int) -> int:
    """How many parts to load at a time: few sizes, or each would be a kernel of its own."""
    return next(size for size in (8, 17, MOST_COMBINED) if size >= min(parts, MOST_COMBINED))


def _rows(query: Tensor, keys: PackedStates, values: PackedStates) -> tuple[int, int, int]:
    group = query.shape[1] // keys.elements.shape[1] * query.shape[2]
    return _row_counts(group, [states.fmt.blocks(states.size) for states in (keys, values)])


def _row_counts(group: int, blocks: list[int]) -> tuple[int, int, int]:
    """Query rows, and those of keys and of values, at least the 16 of a tensor core."""
    powers = [triton.next_power_of_2(count) for count in blocks]
    rows = max(triton.next_power_of_2(group), 16 // min(powers))
    return rows, rows * powers[0], rows * powers[1]


def _words(states: PackedStates) -> Tensor:
    return _viewed(states.elements, torch.int16)


def _scales(states: PackedStates) -> Tensor:
    """In words of four where heads have a multiple of four blocks."""
    scales = states.scales
    fits = scales.shape[3] % 4 == 0 and scales.shape[3] & (scales.shape[3] - 1) == 0
    return _viewed(scales, torch.int32) if fits else scales if scales.stride(3) == 1 else scales.contiguous()


def _viewed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes as larger integers; a copy where strides do not allow it."""
    size = dtype.itemsize
    aligned = part.stride(3) == 1 and part.storage_offset() % size == 0
    if not aligned or any(stride % size for stride in part.stride()[:3]):
        part = part.contiguous()
    return part.view(dtype)
