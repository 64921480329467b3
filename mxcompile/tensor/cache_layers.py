"""Layers of a key/value cache that hold MX elements and scales: one that grows, and one of fixed size.

keys, values: packed elements, uint8 `[batch, kv heads, tokens, blocks * block_bytes]`; `scales` has their scales in
a layer of the same kind, `[batch, kv heads, tokens, blocks]`. A format of None keeps floats there, and no scales. A
token is rounded once, when it arrives. `update` returns what attention is to read, as `numerics/cached_attention.py`
defines it:

- the first call, a prompt, reads its own exact keys and values;
- a later call of one token reads rounded ones, its own included, except the newest `window` and the first `sink`;
- a later call of several tokens, a part of a prompt, reads its own exactly and earlier ones as above. While the past is
  recorded these are candidates of assisted decoding, and are read as if they came one by one.

With `shift`, the mean key of the first call is subtracted from all keys, which its own attention does not read.

This file imports transformers, so it is imported only where a cache is made or met.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from mxcompile.errors import InputError
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.cached_attention import mean_key
from mxcompile.numerics.exact_tokens import ExactTokens, put_exact
from mxcompile.tensor.cache_coding import Coding

TOKENS: Final = 2
"""The dimension of keys and values that counts tokens."""
_ROLLED_BACK: Final = 32
"""So many tokens can be taken back without loss of the exact tokens that the window then reaches."""


class GrowingLayer(DynamicLayer):
    """A layer of a cache that grows by the tokens of each call."""

    def __init__(self, form: CacheFormat) -> None:
        super().__init__()
        self.form, self.codings = form, Coding.of(form)
        self.record_past = False
        self.scales, self.newest, self.first = DynamicLayer(), DynamicLayer(), DynamicLayer()
        self.shift: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of some tokens, `[batch, kv heads, tokens, size]`. Returns those to attend to."""
        given, start = (key_states, value_states), self.get_seq_length()
        if self.form.shift and start == 0:
            self.shift = mean_key(key_states)
        new = given if self.shift is None else (key_states - self.shift, value_states)
        coded = [coding.encode(states) for coding, states in zip(self.codings, new, strict=True)]
        super().update(*(elements for elements, _ in coded))
        self.scales.update(*(scales for _, scales in coded))
        self.is_initialized = True
        states = given if start == 0 else self._read(new, start)
        self._keep_exact(new)
        return states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with no tokens. transformers 5.17 gives values the dtype of the keys."""
        super().lazy_initialization(key_states, value_states)
        self.values = value_states.new_empty(0)

    def _read(self, new: tuple[Tensor, Tensor], start: int) -> tuple[Tensor, Tensor]:
        is_exact = self.form.window > 0 or (new[0].shape[TOKENS] > 1 and not self.record_past)
        packed = zip(_pair(self), _pair(self.scales), new, strict=True)
        states = [coding.decode(*parts) for coding, parts in zip(self.codings, packed, strict=True)]
        for index, (part, own) in enumerate(zip(states, new, strict=True)):
            if is_exact:
                part[:, :, start:] = own
            if self.form.window > 1 and (held := _length(self.newest)):
                count = min(self.form.window - 1, held)
                part[:, :, start - count : start] = _pair(self.newest)[index][:, :, held - count :]
            if self.form.sink:
                first = torch.cat([_pair(self.first)[index], own], TOKENS)[:, :, : self.form.sink]
                part[:, :, : first.shape[TOKENS]] = first
        return states[0], states[1]

    def _keep_exact(self, new: tuple[Tensor, Tensor]) -> None:
        if (room := self.form.sink - _length(self.first)) > 0:
            self.first.update(*(states[:, :, :room] for states in new))
        if self.form.window > 1:
            self.newest.update(*new)
            self._trim()

    def _trim(self) -> None:
        """Drop exact tokens that the window has passed, and will not reach when tokens are taken back."""
        room = self.form.window - 1 + _ROLLED_BACK
        surplus = 0 if self.record_past else _length(self.newest) - room
        if surplus > 0:
            _apply([self.newest], lambda states: states[:, :, surplus:].contiguous())

    def activate_past_recording(self) -> None:
        """Keep all exact tokens until `crop` is called, which assisted decoding does after each step."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """How many tokens the layer holds."""
        return _length(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. Raises InputError for a positive number."""
        left = self.get_seq_length() - _removed(tokens_to_remove)
        removed = self.get_seq_length() - max(left, 0)
        if removed:
            _apply([self, self.scales], lambda states: states[:, :, :-removed])
            _apply([self.newest], lambda states: states[:, :, : max(states.shape[TOKENS] - removed, 0)])
            _apply([self.first], lambda states: states[:, :, : max(left, 0)])
        recording, self.record_past = self.record_past, False
        self._trim()
        self.record_past = recording

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in (self, self.scales, self.newest, self.first):
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.shift = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence `i` that of `beam_idx[i]`."""
        self._apply_to_all(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._apply_to_all(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences alone."""
        self._apply_to_all(lambda states: states[indices])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        shift = 0 if self.shift is None else self.shift.nbytes
        return shift + sum(states.nbytes for layer in self._layers for states in _held(layer))

    @property
    def _layers(self) -> tuple[DynamicLayer, ...]:
        return self, self.scales, self.newest, self.first

    def _apply_to_all(self, change: Callable[[Tensor], Tensor]) -> None:
        _apply(self._layers, change)
        self.shift = None if self.shift is None else change(self.shift)


class FixedLayer(StaticLayer):
    """A layer of a cache with room for a number of tokens; its tensors stay in place, as a CUDA graph needs them.

    newest: the last tokens in exact form, at `place % room`; places: which ones, `[room]`. first: the first tokens.
    shift: what is subtracted from keys, `[batch, kv heads, 1, size]`.
    """

    def __init__(self, max_cache_len: int, form: CacheFormat) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.form, self.codings = form, Coding.of(form)
        self.record_past = False
        self.is_empty = True
        self.scales = StaticLayer(max_cache_len=max_cache_len)
        self.newest = StaticLayer(max_cache_len=form.window - 1 + _ROLLED_BACK) if form.window > 1 else None
        self.first = StaticLayer(max_cache_len=min(form.sink, max_cache_len)) if form.sink else None
        self.places = torch.zeros(0, dtype=torch.int64)
        self.shift: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all tensors. key_states, value_states: some, of which sizes, dtype and device are taken."""
        new = (key_states, value_states)
        empty = [coding.empty(states) for coding, states in zip(self.codings, new, strict=True)]
        for layer in self._exact_layers:
            layer.lazy_initialization(key_states, value_states)
        self.scales.lazy_initialization(*(scales for _, scales in empty))
        if self.form.shift:
            self.shift = torch.zeros_like(key_states[:, :, :1])
        if self.newest is not None:
            room = self.newest.max_cache_len
            self.places = torch.full((room,), -1, dtype=torch.int64, device=key_states.device)
        super().lazy_initialization(*(elements for elements, _ in empty))
        self.values = _pair(self)[1].to(empty[1][0].dtype)  # transformers 5.17 gives them the dtype of the keys

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of some tokens, `[batch, kv heads, tokens, size]`. Returns those to attend to.

        These are as many as `get_mask_sizes` says. Raises InputError for more tokens than there is room for.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        given, count = (key_states, value_states), key_states.shape[TOKENS]
        self._check_room(count)
        if self.shift is not None and self.is_empty:
            self.shift.copy_(mean_key(key_states))
        new = given if self.shift is None else (key_states - self.shift, value_states)
        places = torch.arange(count, device=key_states.device) + self.cumulative_length
        self.cumulative_length.add_(count)
        for coding, states, into, scales in zip(self.codings, new, _pair(self), _pair(self.scales), strict=True):
            elements, exponents = coding.encode(states)
            into.index_copy_(TOKENS, places, elements)
            if exponents.shape[-1]:
                scales.index_copy_(TOKENS, places, exponents)
        if self.is_empty:
            self.is_empty = False
            self._keep_first(new, places)
            read = given
        else:
            self._keep_first(new, places)
            read = self._read(new, places)
        self._keep_newest(new, places)
        return read

    def _check_room(self, count: int) -> None:
        """How many tokens there are is read where that neither waits for a GPU nor is compiled."""
        length = self.cumulative_length
        taken = 0 if length.device.type != "cpu" or torch.compiler.is_compiling() else int(length)
        if taken + count > self.max_cache_len:
            raise InputError(
                f"{count} tokens do not fit into an MXCache with max_length={self.max_cache_len}, of which {taken} are "
                "taken: give it room for the prompt and all new tokens but the last"
            )

    def _read(self, new: tuple[Tensor, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
        is_exact = self.form.window > 0 or (len(places) > 1 and not self.record_past)
        newest, first = ((None, None) if layer is None else _pair(layer) for layer in (self.newest, self.first))
        exact = [ExactTokens(*parts) for parts in zip(new, newest, first, strict=True)]
        packed = list(zip(_pair(self), _pair(self.scales), strict=True))
        if len(places) == 1 and _can_be_fused(new[0]) and (newest[0] is not None or first[0] is not None or is_exact):
            # One operator, so that attention over it can be fused.
            parts = zip(self.codings, packed, exact, strict=True)
            read = [coding.read(*pair, part, self.places, places, self.form.window) for coding, pair, part in parts]
        else:
            decoded = [coding.decode(*pair, own) for coding, pair, own in zip(self.codings, packed, new, strict=True)]
            pairs = zip(decoded, exact, strict=True)
            read = [put_exact(part, own, self.places, places, self.form.window, is_exact) for part, own in pairs]
        return read[0], read[1]

    def _keep_newest(self, new: tuple[Tensor, Tensor], places: Tensor) -> None:
        if self.newest is None:
            return
        kept = places[-self.newest.max_cache_len :]
        slots = kept % self.newest.max_cache_len
        self.places.index_copy_(0, slots, kept)
        for into, states in zip(_pair(self.newest), new, strict=True):
            into.index_copy_(TOKENS, slots, states[:, :, -len(kept) :])

    def _keep_first(self, new: tuple[Tensor, Tensor], places: Tensor) -> None:
        """Write those of the new tokens that are among the first."""
        if self.first is None:
            return
        slots = torch.arange(self.first.max_cache_len, device=places.device)
        own = slots - places[:1]
        source = torch.where((own >= 0) & (own < len(places)), own + len(slots), slots)
        for into, states in zip(_pair(self.first), new, strict=True):
            into.copy_(torch.cat([into, states], TOKENS).index_select(TOKENS, source))

    def activate_past_recording(self) -> None:
        """Read several tokens at once as if they came one by one: they are candidates of assisted decoding."""
        self.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next call with so many tokens attends to, and the place of the first."""
        return (query_length, 0) if self.is_empty else (self.max_cache_len, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. Raises InputError for a positive number."""
        self.cumulative_length.sub_(_removed(tokens_to_remove)).clamp_(min=0)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.cumulative_length.zero_()
        self.places.fill_(-1)
        self.is_empty = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence `i` that of `beam_idx[i]`, in place."""
        for states in self.tensors[:-1]:
            if states.dim() == 4:  # those that have sequences
                states.copy_(states.index_select(0, beam_idx.to(states.device)))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads and writes; the last is how many tokens there are."""
        layers = (self, self.scales, *self._exact_layers)
        shift = [] if self.shift is None else [self.shift]
        return [*(states for layer in layers for states in _held(layer)), *shift, self.places, self.cumulative_length]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(states.nbytes for states in self.tensors)

    @property
    def _exact_layers(self) -> list[StaticLayer]:
        return [layer for layer in (self.newest, self.first) if layer is not None]


def _can_be_fused(states: Tensor) -> bool:
    """Whether there are kernels that read some tokens exactly."""
    return states.is_cuda


def _removed(tokens_to_remove: int) -> int:
    if tokens_to_remove > 0:
        raise InputError(f"crop({tokens_to_remove}): say how many tokens to remove, as a negative number")
    return -tokens_to_remove


def _pair(layer: DynamicLayer | StaticLayer) -> tuple[Tensor, Tensor]:
    keys, values = layer.keys, layer.values
    assert isinstance(keys, Tensor), "a layer that has been written to"
    assert isinstance(values, Tensor), "a layer that has been written to"
    return keys, values


def _held(layer: DynamicLayer | StaticLayer) -> list[Tensor]:
    return [states for states in (layer.keys, layer.values) if states is not None]


def _length(layer: DynamicLayer) -> int:
    return 0 if layer.keys is None or layer.keys.dim() < 4 else layer.keys.shape[TOKENS]


def _apply(layers: Iterable[DynamicLayer], change: Callable[[Tensor], Tensor]) -> None:
    for layer in layers:
        if _length(layer):
            layer.keys, layer.values = (change(states) for states in _pair(layer))
