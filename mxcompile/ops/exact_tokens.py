"""Reading a packed cache of which some tokens are exact: as floats, and as attention that decodes in registers."""

import torch
from torch import Tensor
from torch import _check as check  # pyright: ignore[reportPrivateUsage] - documented API

from mxcompile.kernels import dispatch
from mxcompile.numerics.exact_tokens import ExactTokens, put_exact
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops.cached import fake_attend_packed
from mxcompile.ops.library import define, format_of

_MX = torch.ops.mx


def read_cache(
    elements: Tensor,
    scales: Tensor,
    own: Tensor,
    newest: Tensor | None,
    first: Tensor | None,
    held: Tensor,
    position: Tensor,
    format: str,
    block: int,
    window: int,
) -> Tensor:
    """Keys, or values, `[batch, kv heads, tokens, size]` for the token at `position`, in the dtype of its own.

    block: of the rotation that packed states have, 1 for none. The rest: see `numerics/exact_tokens.py`.
    """
    states = _MX.dequantize(elements, scales, format, own.shape[-1], own.dtype)
    if block > 1:
        states = _MX.rotate(states, block) * factor_of(block)
    place = position.reshape(1)
    return put_exact(states, ExactTokens(own, newest, first), held, place, window, window > 0)


def factor_of(block: int) -> int:
    """Rotating twice is the identity up to this factor: of 2**n channels, `rotate` halves one time too often where n is
    odd."""
    return 1 if block.bit_length() % 2 else 2


def attend_packed_exact(
    query: Tensor,
    turned: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    newest_keys: Tensor | None,
    newest_values: Tensor | None,
    first_keys: Tensor | None,
    first_values: Tensor | None,
    held: Tensor,
    position: Tensor,
    mask: Tensor | None,
    scale: float,
    key_format: str,
    value_format: str,
    window: int,
) -> Tensor:
    """Attention of the token at `position` over a cache; see `numerics/exact_tokens.py`."""
    states = (
        PackedStates(keys, key_scales, format_of(key_format), own_key.shape[3]),
        PackedStates(values, value_scales, format_of(value_format), own_value.shape[3]),
    )
    exact = (ExactTokens(own_key, newest_keys, first_keys), ExactTokens(own_value, newest_values, first_values))
    return dispatch.attend_packed_exact(query, turned, states, exact, held, position, window, mask, scale)


def _fake_read_cache(
    elements: Tensor,
    scales: Tensor,
    own: Tensor,
    newest: Tensor | None,
    first: Tensor | None,
    held: Tensor,
    position: Tensor,
    format: str,
    block: int,
    window: int,
) -> Tensor:
    del scales, newest, first, held, format, block, window
    check(elements.dim() == own.dim() == 4 and own.shape[2] == 1, lambda: "mx::read_cache is for one new token")
    check(position.numel() == 1, lambda: "the position of the next token is one number")
    return own.new_empty((*elements.shape[:3], own.shape[3]))


def _fake_attend_packed_exact(
    query: Tensor,
    turned: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    newest_keys: Tensor | None,
    newest_values: Tensor | None,
    first_keys: Tensor | None,
    first_values: Tensor | None,
    held: Tensor,
    position: Tensor,
    mask: Tensor | None,
    scale: float,
    key_format: str,
    value_format: str,
    window: int,
) -> Tensor:
    del newest_keys, newest_values, first_keys, first_values, held, window
    check(query.shape == turned.shape and query.shape[2] == 1, lambda: "mx::attend_packed_exact takes one query a head")
    check(position.numel() == 1, lambda: "the position of the next token is one number")
    check(own_key.dim() == own_value.dim() == 4, lambda: "the next token's keys and values are 4-D")
    packed = (keys, key_scales, values, value_scales)
    return fake_attend_packed(query, *packed, mask, scale, key_format, value_format, own_value.shape[3])


define(
    "read_cache(Tensor elements, Tensor scales, Tensor own, Tensor? newest, Tensor? first, Tensor held, "
    "Tensor position, str format, int block, int window) -> Tensor",
    read_cache,
    _fake_read_cache,
)
define(
    "attend_packed_exact(Tensor query, Tensor turned, Tensor keys, Tensor key_scales, Tensor values, "
    "Tensor value_scales, Tensor own_key, Tensor own_value, Tensor? newest_keys, Tensor? newest_values, "
    "Tensor? first_keys, Tensor? first_values, Tensor held, Tensor position, Tensor? mask, float scale, "
    "str key_format, str value_format, int window) -> Tensor",
    attend_packed_exact,
    _fake_attend_packed_exact,
)
