"""Layers of a key/value cache that hold MX elements and scales: one that grows, and one of fixed size.

keys, values: packed elements, uint8 `[batch, kv heads, tokens, blocks * block_bytes]`; `scales` has their scales in
a layer of the same kind, `[batch, kv heads, tokens, blocks]`. A format of None keeps floats there, and no scales. A
token is rounded once, when it arrives. `update` returns what attention is to read, as `numerics/cached_attention.py`
defines it:

- the first call, a prompt, reads its own exact keys and values;
- a later call of one token reads rounded ones, its own included, except the newest `window` and the first `sink`;
- a later call of several tokens, a part of a prompt, reads its own exactly and earlier ones as above. While the past is
  recorded these are candidates of assisted decoding, and are read as if they came one by one. A window of exact tokens
  is another for each of them, so that a cache with one refuses them.

With `shift`, the mean key of the first call is subtracted from all keys, which its own attention does not read.

This file imports transformers, so it is imported only where a cache is made or met.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch import _check as check  # pyright: ignore[reportPrivateUsage] - documented API
from transformers.cache_utils import DynamicLayer, StaticLayer

from mxcompile.errors import InputError
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.cached_attention import mean_key
from mxcompile.numerics.exact_tokens import ExactTokens, put_exact
from mxcompile.tensor.cache_coding import Coding
from mxcompile.tensor.cache_exact import TOKENS, ExactStates, Pair


class GrowingLayer(DynamicLayer):
    """A layer of a cache that grows by the tokens of each call.

    exact: what it also holds exactly, and length: of all tokens then, in memory: compiled, a number that is known in
    every step makes Inductor divide symbols, which it cannot always do.
    """

    def __init__(self, form: CacheFormat) -> None:
        super().__init__()
        self.form, self.codings = form, Coding.of(form)
        self.record_past = False
        self.scales, self.exact = DynamicLayer(), ExactStates(form)
        self.length = torch.zeros(1, dtype=torch.int64)
        self.shift: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of some tokens, `[batch, kv heads, tokens, size]`. Returns those to attend to."""
        given, start = (key_states, value_states), self.get_seq_length()
        if start and self.record_past:
            _check_candidates(self.form, key_states)
        if self.form.shift and start == 0:
            self.shift = mean_key(key_states)
        new = given if self.shift is None else (key_states - self.shift, value_states)
        coded = [coding.encode(states) for coding, states in zip(self.codings, new, strict=True)]
        super().update(*(elements for elements, _ in coded))
        self.scales.update(*(scales for _, scales in coded))
        self._say_that_lengths_are_equal()
        self.is_initialized = True
        places = self._places(new[0])
        if start == 0:
            self.exact.allocate(new)
        if start < self.form.sink:
            self.exact.keep_first(new, places)
        read = given if start == 0 else self._read(new, places)
        self.exact.keep_newest(new, places)
        return read

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with no tokens. transformers 5.17 gives values the dtype of the keys."""
        super().lazy_initialization(key_states, value_states)
        self.values = value_states.new_empty(0)

    def _say_that_lengths_are_equal(self) -> None:
        """Compiled, the length of each tensor is a symbol of its own, and rewrites of attention ask for equal ones."""
        keys, *others = (*_pair(self), *_pair(self.scales))
        for part in others:
            check(part.shape[TOKENS] == keys.shape[TOKENS])

    def _places(self, new: Tensor) -> Tensor:
        """Of new states, which are there already."""
        count, end = new.shape[TOKENS], self.get_seq_length()
        if not self.form.has_exact_tokens:
            return torch.arange(end - count, end, device=new.device)
        if count == end:
            self.length = torch.zeros(1, dtype=torch.int64, device=new.device)
        places = torch.arange(count, device=new.device) + self.length
        self.length.add_(count)
        return places

    def _read(self, new: Pair, places: Tensor) -> Pair:
        exact = self.exact.beside(new, self.get_seq_length())
        packed = list(zip(_pair(self), _pair(self.scales), strict=True))
        return _read(self.codings, packed, exact, self.exact.places, places, self.form, self.record_past)

    def activate_past_recording(self) -> None:
        """Read several tokens at once as if they came one by one: they are candidates of assisted decoding, and
        `crop` takes back those that were wrong."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """How many tokens the layer holds."""
        return _length(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. Raises InputError for a positive number."""
        removed = min(_removed(tokens_to_remove), self.get_seq_length())
        if removed:
            _apply([self, self.scales], lambda states: states[:, :, :-removed])
            self.length.fill_(self.get_seq_length())

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in (self, self.scales):
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.exact, self.shift = ExactStates(self.form), None

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
        states = [part for layer in (self, self.scales) for part in _held(layer)]
        shift = [] if self.shift is None else [self.shift]
        return sum(part.nbytes for part in (*states, *self.exact.tensors, self.length, *shift))

    def _apply_to_all(self, change: Callable[[Tensor], Tensor]) -> None:
        _apply([self, self.scales], change)
        self.exact.apply(change)
        self.shift = None if self.shift is None else change(self.shift)


class FixedLayer(StaticLayer):
    """A layer of a cache with room for a number of tokens; its tensors stay in place, as a CUDA graph needs them.

    exact: what it also holds exactly. shift: what is subtracted from keys, `[batch, kv heads, 1, size]`.
    """

    def __init__(self, max_cache_len: int, form: CacheFormat) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.form, self.codings = form, Coding.of(form)
        self.record_past = False
        self.is_empty = True
        self.scales, self.exact = StaticLayer(max_cache_len=max_cache_len), ExactStates(form, max_cache_len)
        self.shift: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all tensors. key_states, value_states: some, of which sizes, dtype and device are taken."""
        new = (key_states, value_states)
        empty = [coding.empty(states) for coding, states in zip(self.codings, new, strict=True)]
        self.exact.allocate(new)
        self.scales.lazy_initialization(*(scales for _, scales in empty))
        if self.form.shift:
            self.shift = torch.zeros_like(key_states[:, :, :1])
        super().lazy_initialization(*(elements for elements, _ in empty))
        self.values = _pair(self)[1].to(empty[1][0].dtype)  # transformers 5.17 gives them the dtype of the keys

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of some tokens, `[batch, kv heads, tokens, size]`. Returns those to attend to.

        These are as many as `get_mask_sizes` says. Raises InputError for more tokens than there is room for.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        given, count = (key_states, value_states), key_states.shape[TOKENS]
        if self.record_past and not self.is_empty:
            _check_candidates(self.form, key_states)
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
        self.exact.keep_first(new, places)
        read = given if self.is_empty else self._read(new, places)
        self.is_empty = False
        self.exact.keep_newest(new, places)
        return read

    def _check_room(self, count: int) -> None:
        """How many tokens there are is read where that neither waits for a GPU nor is compiled."""
        length = self.cumulative_length
        taken = 0 if length.device.type != "cpu" or torch.compiler.is_compiling() else int(length)
        if taken + count > self.max_cache_len:
            raise InputError(
                f"{count} tokens do not fit into an MXCache with max_length={self.max_cache_len}, of which {taken} are "
                "taken: give it room for the prompt, all new tokens but the last, and candidates that are taken back"
            )

    def _read(self, new: Pair, places: Tensor) -> Pair:
        exact = self.exact.beside(new, self.max_cache_len)
        packed = list(zip(_pair(self), _pair(self.scales), strict=True))
        return _read(self.codings, packed, exact, self.exact.places, places, self.form, self.record_past)

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
        self.exact.forget()
        self.is_empty = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence `i` that of `beam_idx[i]`, in place."""
        for states in self.tensors[:-1]:
            if states.dim() == 4:  # those that have sequences
                states.copy_(states.index_select(0, beam_idx.to(states.device)))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads and writes; the last is how many tokens there are."""
        states = [part for layer in (self, self.scales) for part in _held(layer)]
        shift = [] if self.shift is None else [self.shift]
        return [*states, *shift, *self.exact.tensors, self.cumulative_length]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(states.nbytes for states in self.tensors)


def _read(
    codings: tuple[Coding, Coding],
    packed: list[Pair],
    exact: list[ExactTokens],
    held: Tensor,
    places: Tensor,
    form: CacheFormat,
    are_candidates: bool,
) -> Pair:
    """Keys and values that the tokens at `places` attend to. packed, exact: of keys and of values."""
    parts = zip(codings, packed, exact, strict=True)
    if len(places) == 1 and form.has_exact_tokens:
        # One operator, so that attention over it can be fused.
        key, value = (coding.read(*pair, part, held, places, form.window) for coding, pair, part in parts)
    else:
        is_exact = form.window > 0 or (len(places) > 1 and not are_candidates)
        key, value = (
            put_exact(coding.decode(*pair, part.own), part, held, places, form.window, is_exact)
            for coding, pair, part in parts
        )
    return key, value


def _check_candidates(form: CacheFormat, new: Tensor) -> None:
    if form.window > 0 and new.shape[TOKENS] > 1:
        raise InputError(
            f"an MXCache({form}) cannot read {new.shape[TOKENS]} candidates of assisted decoding at once: its window "
            "of exact tokens is another for each. Generate without an assistant and prompt lookup, or with a cache "
            "whose window is 0"
        )


def _removed(tokens_to_remove: int) -> int:
    if tokens_to_remove > 0:
        raise InputError(f"crop({tokens_to_remove}): say how many tokens to remove, as a negative number")
    return -tokens_to_remove


def _pair(layer: DynamicLayer | StaticLayer) -> Pair:
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
