"""The tokens that a layer of a cache also holds exactly: the newest ones in a ring, and the first."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.exact_tokens import ExactTokens

TOKENS: Final = 2
"""The dimension of keys and values that counts tokens."""
_ROLLED_BACK: Final = 32
"""So many tokens can be taken back without loss of the exact tokens that the window then reaches."""
Pair = tuple[Tensor, Tensor]
"""Keys and values, `[batch, kv heads, tokens, size]`."""


class ExactStates:
    """Exact keys and values beside a packed cache.

    newest: of the last tokens, each at its place modulo the room; places: which ones, `[room]`, -1 for none. first: of
    the first tokens. None: of no tokens. most: how many the cache has room for, None if it grows.
    """

    def __init__(self, form: CacheFormat, most: int | None = None) -> None:
        self.window, self.sink = form.window, form.sink if most is None else min(form.sink, most)
        self.newest: Pair | None = None
        self.first: Pair | None = None
        self.places = torch.zeros(0, dtype=torch.int64)

    def allocate(self, new: Pair) -> None:
        """new: some states, of which sizes, dtypes and device are taken."""
        if self.window > 1:
            room = self.window - 1 + _ROLLED_BACK
            self.newest = _zeros(new, room)
            self.places = torch.full((room,), -1, dtype=torch.int64, device=new[0].device)
        if self.sink:
            self.first = _zeros(new, self.sink)

    def beside(self, own: Pair, tokens: int) -> list[ExactTokens]:
        """Those of keys and those of values, with the new tokens' own. tokens: that there are then."""
        first = self.first
        if first is not None and tokens < self.sink:
            first = first[0][:, :, :tokens], first[1][:, :, :tokens]
        parts = zip(own, self.newest or (None, None), first or (None, None), strict=True)
        return [ExactTokens(*part) for part in parts]

    def keep_first(self, new: Pair, places: Tensor) -> None:
        """Write those of the new tokens that are among the first."""
        if self.first is None:
            return
        slots = torch.arange(self.sink, device=places.device)
        own = slots - places[:1]
        source = torch.where((own >= 0) & (own < len(places)), own + len(slots), slots)
        for into, states in zip(self.first, new, strict=True):
            into.copy_(torch.cat([into, states], TOKENS).index_select(TOKENS, source))

    def keep_newest(self, new: Pair, places: Tensor) -> None:
        """Write the new tokens, as many as there is room for."""
        if self.newest is None:
            return
        kept = places[-len(self.places) :]
        slots = kept % len(self.places)
        self.places.index_copy_(0, slots, kept)
        for into, states in zip(self.newest, new, strict=True):
            into.index_copy_(TOKENS, slots, states[:, :, -len(kept) :])

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change which sequences there are."""
        self.newest, self.first = (
            None if pair is None else (change(pair[0]), change(pair[1])) for pair in (self.newest, self.first)
        )

    def forget(self) -> None:
        """All tokens; the memory stays."""
        self.places.fill_(-1)

    @property
    def tensors(self) -> list[Tensor]:
        """All that there are, the places last."""
        return [*(part for pair in (self.newest, self.first) if pair is not None for part in pair), self.places]


def _zeros(like: Pair, tokens: int) -> Pair:
    key, value = (part.new_zeros((*part.shape[:2], tokens, part.shape[3])) for part in like)
    return key, value
