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
    at = (torch.arange(count, device=states.device) + (start - count)).clamp(min=0)
    slots = at % len(held)
    index = torch.arange(count, device=states.device)
    missing = torch.where(held.index_select(0, slots) == at, -1, index).amax()
    is_exact = (index > missing).view(-1, 1)
    exact = torch.where(is_exact, newest.index_select(_TOKENS, slots), states.index_select(_TOKENS, at))
    states.index_copy_(_TOKENS, at, exact)


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
