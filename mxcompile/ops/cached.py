"""Attention over a key/value cache in MX formats: over what it has packed, and as a lowered graph states it."""

from torch import Tensor
from torch import _check as check  # pyright: ignore[reportPrivateUsage] - documented API

from mxcompile.kernels import dispatch
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.cached_attention import cached_attention as reference
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops.library import define, format_of, rounding_of, rule_of


def attend_packed(
    query: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    mask: Tensor | None,
    scale: float,
    key_format: str,
    value_format: str,
    size: int,
) -> Tensor:
    """Attention of a few queries; see `numerics/packed_attention.py`. size: of a value head."""
    packed_keys = PackedStates(keys, key_scales, format_of(key_format), query.shape[3])
    packed_values = PackedStates(values, value_scales, format_of(value_format), size)
    return dispatch.attend_packed(query, packed_keys, packed_values, mask, scale)


def attend_packed_next(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    scale: float,
    key_format: str,
    key_rule: str,
    value_format: str,
    value_rule: str,
    format: str | None,
    rule: str | None,
) -> Tensor:
    """Round the key and value of the next token, write them to the cache, then attend to all tokens up to its own.

    position: one integer, the place of the token. cos, sin: of RoPE on halves, for query and key; None if they are
    rotated. The result is quantized and dequantized as `format` and `rule` say, if given. See
    `numerics/packed_attention.py`.
    """
    states = (
        PackedStates(keys, key_scales, format_of(key_format), key.shape[3]),
        PackedStates(values, value_scales, format_of(value_format), value.shape[3]),
    )
    rotation = None if cos is None or sin is None else (cos, sin)
    rules = (rule_of(key_rule), rule_of(value_rule))
    new, rounding = (key, value), rounding_of(format, rule)
    return dispatch.attend_packed_next(query, new, states, rules, position, rotation, mask, scale, rounding)


def fake_attend_packed(
    query: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    mask: Tensor | None,
    scale: float,
    key_format: str,
    value_format: str,
    size: int,
) -> Tensor:
    """The result, on tensors without data."""
    del mask, scale
    check(query.dim() == keys.dim() == values.dim() == 4, lambda: "mx::attend_packed takes 4-D tensors")
    _check_packed(keys, key_scales, key_format, query.shape[3])
    _check_packed(values, value_scales, value_format, size)
    heads, kv_heads = query.shape[1], keys.shape[1]
    check(heads % kv_heads == 0, lambda: f"{heads} query heads cannot share {kv_heads} KV heads")
    return query.new_empty((*query.shape[:3], size))


def _fake_attend_packed_next(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    scale: float,
    key_format: str,
    key_rule: str,
    value_format: str,
    value_rule: str,
    format: str | None,
    rule: str | None,
) -> Tensor:
    del key_rule, value_rule
    check((cos is None) == (sin is None), lambda: "cos and sin must be given together")
    check((format is None) == (rule is None), lambda: "format and rule must be given together")
    check(query.dim() == 4 and query.shape[2] == 1, lambda: "mx::attend_packed_next takes one query per head")
    for new, cache in ((key, keys), (value, values)):
        fits = new.dim() == 4 and new.shape[2] == 1 and new.shape[1] == cache.shape[1]
        check(fits, lambda: "the next token's keys and values do not fit the cache")
    check(position.numel() == 1, lambda: "the position of the next token is one number")
    size = value.shape[3]
    packed = (keys, key_scales, values, value_scales)
    return fake_attend_packed(query, *packed, mask, scale, key_format, value_format, size)


def _check_packed(elements: Tensor, scales: Tensor, format: str, size: int) -> None:
    fmt = format_of(format)
    blocks = fmt.blocks(size)
    fits = (elements.shape[-1], scales.shape[-1]) == (blocks * fmt.block_bytes, blocks)
    check(fits, lambda: f"elements and scales are not heads of {size} values in {fmt}")


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    cache: str,
    prompt_length: int,
) -> Tensor:
    """See `numerics/cached_attention.py`; cache: the text of a `CacheFormat`."""
    return reference(query, key, value, mask, scale, is_causal, CacheFormat.parse(cache), prompt_length)


def _fake_cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    cache: str,
    prompt_length: int,
) -> Tensor:
    del mask, scale, is_causal, prompt_length
    CacheFormat.parse(cache)
    check(
        query.dim() == key.dim() == value.dim() == 4, lambda: "mx::cached_attention takes [batch, heads, tokens, size]"
    )
    check(query.shape[-1] == key.shape[-1], lambda: "queries and keys of mx::cached_attention have one size")
    check(query.shape[1] % key.shape[1] == 0, lambda: "every KV head belongs to as many query heads")
    return query.new_empty((*query.shape[:3], value.shape[3]))


define(
    "attend_packed(Tensor query, Tensor keys, Tensor key_scales, Tensor values, Tensor value_scales, Tensor? mask, "
    "float scale, str key_format, str value_format, int size) -> Tensor",
    attend_packed,
    fake_attend_packed,
)
define(
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool is_causal, str cache, "
    "int prompt_length) -> Tensor",
    cached_attention,
    _fake_cached_attention,
)
define(
    "attend_packed_next(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) key_scales, "
    "Tensor(c!) values, Tensor(d!) value_scales, Tensor position, Tensor? cos, Tensor? sin, Tensor? mask, float scale, "
    "str key_format, str key_rule, str value_format, str value_rule, str? format, str? rule) -> Tensor",
    attend_packed_next,
    _fake_attend_packed_next,
)
