"""One token's step of attention with a cache: what a fused kernel of it computes, in plain PyTorch.

    keys[position] = rotate(key);  values[position] = value;  y = attend(rotate(query), keys, values, mask)

RoPE on halves (Su et al., "RoFormer", arXiv 2104.09864, in the order of channels of GPT-NeoX and Llama).
"""

import torch
from torch import Tensor

from mxcompile.numerics import reference


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x * cos + [-x[half:], x[:half]] * sin` in float32, rounded once. x `[..., size]`; cos, sin broadcast."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos.float() + torch.cat([-second, first], -1) * sin.float()).to(x.dtype)


def attend_next(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Query `[batch, heads, 1, size]`; the cache, keys `[batch, kv_heads, length, size]` and values, is written to.

    new: key and value `[batch, kv_heads, 1, size]`, position (one integer), and cos and sin `[batch or 1, 1, 1, size]`
    or None, for queries and keys that are rotated already. Otherwise as `reference.attend`.
    """
    key, value, position, cos, sin = new
    if cos is not None and sin is not None:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    index = position.reshape(1).to(torch.int64)
    keys.index_copy_(2, index, key)
    values.index_copy_(2, index, value)
    return reference.attend(query, keys, values, mask, scale)
