"""Tokens that a packed cache also holds exactly, and that attention reads in place of the rounded ones: the newest and
the first.

    states[..., place, :] = exact[..., place, :]    for places in (start - window, start], and those below the sink
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.numerics.packed_attention import PackedStates, check_shapes, weighted_sum

_TOKENS = 2


@dataclass(frozen=True)
class ExactTokens:
    """Exact keys, or values, of some tokens of a cache.

    own: of the new tokens, `[batch, kv heads, new, size]`. newest: of earlier ones, `[batch, kv heads, room, size]`,
    each at its place modulo the room. first: `[batch, kv heads, sink, size]`, the new tokens' among them.
    """

    own: Tensor
    newest: Tensor | None
    first: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "ExactTokens":
        """Of all of them."""
        newest, first = (None if part is None else function(part) for part in (self.newest, self.first))
        return ExactTokens(function(self.own), newest, first)


def put_exact(
    states: Tensor, exact: ExactTokens, held: Tensor, places: Tensor, window: int, is_own_exact: bool
) -> Tensor:
    """Overwrite what is to be read exactly in states `[batch, kv heads, tokens, size]`, in place.

    held: the place of the token in each slot of `newest`, `[room]`, -1 for none; a token that is not there any more,
    and those before it, stay rounded. places: of the new tokens, which follow each other. window: counts a query's own
    token.
    """
    if exact.newest is not None:
        _put_newest(states, exact.newest, held, places[:1], window - 1)
    if is_own_exact:
        states.index_copy_(_TOKENS, places, exact.own)
    if exact.first is not None:
        sink = exact.first.shape[_TOKENS]
        is_held = (torch.arange(sink, device=states.device) <= places[-1]).view(-1, 1)
        head = states[:, :, :sink]
        head.copy_(torch.where(is_held, exact.first, head))
    return states


def _put_newest(states: Tensor, newest: Tensor, held: Tensor, start: Tensor, count: int) -> None:
    """Put the exact tokens among the `count` before `start` in their places."""
    places, is_exact = _newest_places(held, start, count)
    at = places.clamp(min=0)
    own = newest.index_select(_TOKENS, at % len(held))
    states.index_copy_(_TOKENS, at, torch.where(is_exact.view(-1, 1), own, states.index_select(_TOKENS, at)))


def _newest_places(held: Tensor, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` places before `start`, and which of them are read exactly: those behind the last that is not held.
    Places before 0 count as place 0."""
    index = torch.arange(count, device=held.device)
    places = index + (start - count)
    at = places.clamp(min=0)
    missing = torch.where(held.index_select(0, at % len(held)) == at, -1, index).amax()
    return places, index > missing


@dataclass(frozen=True)
class ExactPart:
    """Exact keys and values of some tokens, `[batch, kv heads, n, size]`.

    places: of the tokens, `[n]`, of which any that are not read may be negative. is_read: which are read, `[n]`.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    is_read: Tensor


def exact_parts(
    exact: tuple[ExactTokens, ExactTokens], held: Tensor, position: Tensor, window: int
) -> tuple[list[ExactPart], Callable[[Tensor], Tensor]]:
    """What the token at `position` `[1]` reads exactly, each token once; and which places those are, as a function."""
    keys, values = exact
    parts, sink, start = list[ExactPart](), 0, position
    if keys.first is not None and values.first is not None:
        sink = keys.first.shape[_TOKENS]
        places = torch.arange(sink, device=held.device)
        parts.append(ExactPart(keys.first, values.first, places, places <= position))
    if keys.newest is not None and values.newest is not None:
        places, is_exact = _newest_places(held, position, window - 1)
        start = position - is_exact.sum()
        slots = places.clamp(min=0) % len(held)
        key, value = (part.index_select(_TOKENS, slots) for part in (keys.newest, values.newest))
        parts.append(ExactPart(key, value, places, is_exact & (places >= sink)))
    if window > 0:
        parts.append(ExactPart(keys.own, values.own, position, position >= sink))

    def are_exact(places: Tensor) -> Tensor:
        is_first = (places < sink) & (places <= position)
        return is_first | ((places >= start) & (places <= position)) if window > 0 else is_first

    return parts, are_exact


def attend_packed_exact(
    query: Tensor,
    turned: Tensor,
    states: tuple[PackedStates, PackedStates],
    exact: tuple[ExactTokens, ExactTokens],
    held: Tensor,
    position: Tensor,
    window: int,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """`attend_packed` of the token at `position`, query `[batch, heads, 1, size]`, where some tokens are read exactly.

    turned: the query for packed keys, which may be rotated. states, exact: of keys and of values. window: 0 where a
    query's own token is rounded, too.
    Raises MXCompileError for shapes that do not fit.
    """
    check_shapes(query, *states)
    for side, part in zip(states, exact, strict=True):
        check_exact((*side.elements.shape[:3], side.size), part, held)
    (batch, heads, _, size), (kv_heads, tokens) = query.shape, states[0].elements.shape[1:3]
    place, shape = position.reshape(1).to(torch.int64), (batch, kv_heads, heads // kv_heads, size)

    def placed(part: ExactTokens, into: Tensor) -> Tensor:
        return put_exact(into, part, held, place, window, window > 0)

    keys, values = (part.map(Tensor.float) for part in exact)
    none = torch.zeros(batch, kv_heads, tokens, size, device=query.device)
    is_exact = placed(keys.map(lambda part: torch.ones_like(part[..., :1])), none[..., :1].clone()).mT > 0
    rounded = turned.float().reshape(shape) @ states[0].values(torch.float32).mT
    scores = torch.where(is_exact, query.float().reshape(shape) @ placed(keys, none).mT, rounded) * scale
    read = placed(values, states[1].values(torch.float32))
    return weighted_sum(scores.reshape(batch, heads, 1, tokens), read, mask, position).to(query.dtype)


def check_exact(shape: tuple[int, ...], exact: ExactTokens, held: Tensor) -> None:
    """Raise MXCompileError unless these are for one new token of a cache `[batch, kv heads, tokens, size]`: kernels
    would read out of bounds."""
    batch, kv_heads, tokens, size = shape
    sink = 0 if exact.first is None else exact.first.shape[_TOKENS]
    parts = {"new": (exact.own, 1), "newest": (exact.newest, held.numel()), "first": (exact.first, min(sink, tokens))}
    for name, (part, count) in parts.items():
        if part is not None and tuple(part.shape) != (batch, kv_heads, count, size):
            raise MXCompileError(f"the exact {name} states {[*part.shape]} do not fit a cache of {[*shape]}")
