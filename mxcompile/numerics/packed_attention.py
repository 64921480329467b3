"""Attention of one query, or a few, over keys and values that are packed MX elements and scales.

    y = softmax(query @ dequantize(keys).T * scale + mask) @ dequantize(values)

Keys and values are blocks along the head dimension, as `mx::quantize` packs `[batch, kv heads, tokens, size]`. Decoded
values are exact in float32, and so is what they are multiplied by; nothing else is rounded before the result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.numerics import packing, reference
from mxcompile.numerics.next_token import rotate


@dataclass(frozen=True)
class PackedStates:
    """Keys or values of a cache: elements uint8 `[batch, kv heads, tokens, blocks * block_bytes]` and E8M0 scales uint8
    `[batch, kv heads, tokens, blocks]`. size: of a head."""

    elements: Tensor
    scales: Tensor
    fmt: MXFormat
    size: int

    def values(self, dtype: torch.dtype) -> Tensor:
        """`[batch, kv heads, tokens, size]`."""
        return reference.dequantize(packing.unpack(self.elements, self.fmt), self.scales, self.fmt, self.size, dtype)


def attend_packed(
    query: Tensor,
    keys: PackedStates,
    values: PackedStates,
    mask: Tensor | None,
    scale: float,
    position: Tensor | None = None,
) -> Tensor:
    """Query `[batch, heads, queries, size]`: each KV head belongs to `heads / kv_heads` consecutive query heads.

    mask: additive, or bool, true where a key is attended to; broadcast to `[batch, heads, queries, tokens]`. A query
    whose mask excludes every key gives zero. position: one integer; no query attends to later tokens.
    Returns `[batch, heads, queries, values.size]` in the dtype of the query.
    Raises MXCompileError for shapes that do not fit.
    """
    check_shapes(query, keys, values)
    (batch, heads, queries, _), (kv_heads, tokens) = query.shape, keys.elements.shape[1:3]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads * queries, query.shape[3])
    scores = grouped @ keys.values(torch.float32).mT * scale
    y = weighted_sum(scores.reshape(batch, heads, queries, tokens), values.values(torch.float32), mask, position)
    return y.to(query.dtype)


def weighted_sum(scores: Tensor, values: Tensor, mask: Tensor | None, position: Tensor | None) -> Tensor:
    """`softmax(scores + mask) @ values` for scores `[batch, heads, queries, tokens]` and values `[batch, kv heads,
    tokens, size]`; see `attend_packed`."""
    (batch, heads, queries, tokens), (_, kv_heads, _, size) = scores.shape, values.shape
    if mask is not None:
        added = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()
        scores = scores + added
    if position is not None:
        is_later = torch.arange(tokens, device=scores.device) > position
        scores = scores.masked_fill(is_later, -torch.inf)
    weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1))
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads * queries, tokens)
    return (grouped @ values).reshape(batch, heads, queries, size)


def append_packed(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    states: tuple[PackedStates, PackedStates],
    rules: tuple[ScaleRule, ScaleRule],
    position: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Round a key and a value, `[batch, kv_heads, 1, size]`, and write them to packed ones at `position`, in place.

    rotation: cos and sin `[batch or 1, 1, 1, size]`, by which the query `[batch, heads, 1, size]` and the key are
    rotated first; None if they are already. Returns the query.
    """
    key, value = new
    if rotation is not None:
        query, key = rotate(query, *rotation), rotate(key, *rotation)
    index = position.reshape(1).to(torch.int64)
    for part, side, rule in zip((key, value), states, rules, strict=True):
        codes, scales = reference.quantize(part, side.fmt, rule)
        side.elements.index_copy_(2, index, packing.pack(codes, side.fmt))
        side.scales.index_copy_(2, index, scales)
    return query


def check_shapes(query: Tensor, keys: PackedStates, values: PackedStates) -> None:
    """Raise MXCompileError if these do not fit: kernels would read out of bounds."""
    for states in (keys, values):
        blocks = states.fmt.blocks(states.size)
        widths = (states.elements.shape[-1], states.scales.shape[-1])
        if states.elements.dim() != 4 or states.elements.shape[:3] != states.scales.shape[:3]:
            raise MXCompileError(f"elements {[*states.elements.shape]} and scales {[*states.scales.shape]} do not fit")
        if widths != (blocks * states.fmt.block_bytes, blocks):
            raise MXCompileError(
                f"heads of {states.size} in {states.fmt} are not {widths[0]} bytes, {widths[1]} scales"
            )
    shape, kv_heads = keys.elements.shape[:3], keys.elements.shape[1]
    if query.dim() != 4 or shape != values.elements.shape[:3] or query.shape[0] != shape[0]:
        raise MXCompileError(f"queries {[*query.shape]} cannot attend to {[*shape]} and {[*values.elements.shape[:3]]}")
    if keys.size != query.shape[3] or query.shape[1] % kv_heads:
        raise MXCompileError(f"{query.shape[1]} heads of {query.shape[3]} cannot share {kv_heads} heads of {keys.size}")
