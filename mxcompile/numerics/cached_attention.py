"""Attention over a key/value cache in MX formats: the definition of `mx::cached_attention`.

One call over all tokens of a text computes what generation computes token by token, because a token is rounded once,
when it arrives. The query at place i reads the key and value at place j

- exactly if `i - j < window` (the newest tokens) or `j < sink` (the first tokens),
- exactly if `i < prompt_length`: the tokens of the first call, a prompt, attend to what has just been computed,
- rounded otherwise.

With `shift`, keys are rounded after the mean key of the prompt is subtracted; without a prompt, of the first 128
tokens. Places count the slots of the cache, padding included. With `prompt_length=0` every token is read as if it had
been generated: the most that a cache can lose on a text, and what evaluation measures unless told otherwise.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.cache_format import CacheFormat, head_rotation
from mxcompile.numerics.hadamard import rotate_input, rotate_weight

Rounding = Callable[[Tensor, MXFormat, ScaleRule], Tensor]
_SHIFT_TOKENS = 128
_QUERIES = 256  # computed at a time: all scores of 8192 tokens would be gigabytes


def mean_key(key: Tensor) -> Tensor:
    """What a cache with `shift` subtracts from the keys `[..., tokens, head_dim]` of a prompt: `[..., 1, head_dim]`."""
    return key.float().mean(-2, keepdim=True).to(key.dtype)


def rounded_keys(
    key: Tensor, cache: CacheFormat, prompt_length: int = 0, rounding: Rounding = reference.quantize_dequantize
) -> Tensor:
    """Keys `[batch, kv heads, tokens, head_dim]` as a cache returns them, with shift and rotation undone.

    prompt_length: the first tokens, whose mean key is the shift; 0: 128 of them.
    """
    if cache.key is None or cache.key_rule is None:
        return key
    if cache.shift:
        shift = mean_key(key[..., : prompt_length or _SHIFT_TOKENS, :])
        return rounded_keys(key - shift, replace(cache, shift=False), 0, rounding) + shift
    block = head_rotation(key.shape[-1]) if cache.rotate else 1
    if block == 1:
        return rounding(key, cache.key, cache.key_rule)
    rotated = rounding(rotate_input(key, block), cache.key, cache.key_rule)
    return rotate_weight(rotated, block)


def rounded_values(value: Tensor, cache: CacheFormat, rounding: Rounding = reference.quantize_dequantize) -> Tensor:
    """Values `[batch, kv heads, tokens, size]` as a cache returns them."""
    if cache.value is None or cache.value_rule is None:
        return value
    return rounding(value, cache.value, cache.value_rule)


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    cache: CacheFormat,
    prompt_length: int = 0,
    first_query: int | None = None,
    rounding: Rounding = reference.quantize_dequantize,
) -> Tensor:
    """`softmax(query @ key.T * scale + mask) @ value` in float32, with keys and values as a cache holds them.

    Query `[batch, heads, queries, head_dim]`, key `[batch, kv heads, keys, head_dim]` after the rotary embedding, both
    exact; value `[batch, kv heads, keys, size]`. Each KV head belongs to `heads / kv heads` consecutive query heads.
    mask: additive, or bool, true where a key is attended to; broadcast to `[batch, heads, queries, keys]`. is_causal:
    a query attends to no later place. first_query: the place of the first query; by default queries are the last ones.
    rounding: quantizes and dequantizes, for gradients.
    Returns `[batch, heads, queries, size]` in the dtype of the query; zero where every key is masked.
    """
    kv_heads, keys = key.shape[1:3]
    heads, queries = query.shape[1:3]
    first = keys - queries if first_query is None else first_query
    exact = key.float().unsqueeze(2), value.float().unsqueeze(2)
    held = rounded_keys(key, cache, prompt_length, rounding), rounded_values(value, cache, rounding)
    rounded = held[0].float().unsqueeze(2), held[1].float().unsqueeze(2)
    places = torch.arange(keys, device=key.device)
    added = None if mask is None else _additive(mask).expand(*_broadcast(mask, query, keys))
    grouped = query.float().unflatten(1, (kv_heads, heads // kv_heads))
    parts: list[Tensor] = []
    is_mixed = cache.has_exact_tokens or prompt_length > 0
    for start in range(0, queries, _QUERIES):
        rows = grouped[..., start : start + _QUERIES, :]
        at = torch.arange(first + start, first + start + rows.shape[-2], device=key.device).unsqueeze(1)
        read = max(0, min(first + start + rows.shape[-2], keys)) if is_causal else keys  # later keys are not seen
        is_exact = (at - places[:read] < cache.window) | (places[:read] < cache.sink) | (at < prompt_length)
        scores = rows @ rounded[0][..., :read, :].mT
        scores = (torch.where(is_exact, rows @ exact[0][..., :read, :].mT, scores) if is_mixed else scores) * scale
        if added is not None:
            scores = scores + added[..., start : start + _QUERIES, :read].unflatten(1, (kv_heads, -1))
        if is_causal:
            scores = scores.masked_fill(places[:read] > at, -torch.inf)
        hidden = (scores == -torch.inf).all(-1, keepdim=True)
        weights = torch.where(hidden, 0.0, scores.masked_fill(hidden, 0.0).softmax(-1))  # no NaN in gradients either
        output = (weights.masked_fill(is_exact, 0.0) if is_mixed else weights) @ rounded[1][..., :read, :]
        parts.append(output + weights.where(is_exact, 0.0) @ exact[1][..., :read, :] if is_mixed else output)
    return torch.cat(parts, -2).flatten(1, 2).to(query.dtype)


def _additive(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()


def _broadcast(mask: Tensor, query: Tensor, keys: int) -> tuple[int, int, int, int]:
    """The shape of the scores: `[batch, heads, queries, keys]`."""
    batch, heads, queries, _ = query.shape
    return batch, heads, queries, keys
