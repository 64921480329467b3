"""Rotation over runs of channels, by Hadamard matrices along the diagonal: the definition of `mx::rotate`.

    x [..., in], in runs of 2^n channels:  each times H / 2^ceil(n/2);     w [..., in]:  likewise, H / 2^floor(n/2)

H H^T = 2^n: the two powers of two cancel exactly, and no square root is needed.
"""

from functools import cache

import torch
from torch import Tensor


def rotate_input(x: Tensor, block: int) -> Tensor:
    """`[..., in]`, every run of `block` channels times H / 2^ceil(n/2), 2^n = block; float32 inside, rounded once."""
    return _times(x, block, -(-_log2(block) // 2))


def rotate_weight(w: Tensor, block: int) -> Tensor:
    """`[..., in]` likewise times H / 2^floor(n/2): rotate_input(x) @ rotate_weight(w).T = x @ w.T."""
    return _times(w, block, _log2(block) // 2)


def _times(x: Tensor, block: int, halvings: int) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    matrix = _hadamard(block).to(wide.device, wide.dtype) * 2.0**-halvings
    return (wide.unflatten(-1, (-1, block)) @ matrix).flatten(-2).to(x.dtype)


@cache
def _hadamard(size: int) -> Tensor:
    """Sylvester's matrix of +1 and -1, symmetric, float32 `[size, size]`."""
    matrix = torch.ones(1, 1)
    for _ in range(_log2(size)):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _log2(size: int) -> int:
    if size < 1 or size & (size - 1):
        raise ValueError(f"a rotation is over a power of two channels, not {size}")
    return size.bit_length() - 1
