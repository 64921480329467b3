"""Rotation over runs of channels, by Hadamard matrices along the diagonal: the definition of `mx::rotate`.

    x [..., in], in runs of 2^n channels:  each times H / 2^ceil(n/2);     w [..., in]:  likewise, H / 2^floor(n/2)

H H^T = 2^n: the two powers of two cancel exactly, and no square root is needed.
"""

import torch
from torch import Tensor


def rotate_input(x: Tensor, block: int) -> Tensor:
    """`[..., in]`, every run of `block` channels times H / 2^ceil(n/2), 2^n = block; float32 inside, rounded once."""
    return _times(x, block, -(-_log2(block) // 2))


def rotate_weight(w: Tensor, block: int) -> Tensor:
    """`[..., in]` likewise times H / 2^floor(n/2): rotate_input(x) @ rotate_weight(w).T = x @ w.T."""
    return _times(w, block, _log2(block) // 2)


def _times(x: Tensor, block: int, halvings: int) -> Tensor:
    """Sylvester's H by sums and differences: the order of additions is the same on every device."""
    wide = x if x.dtype == torch.float64 else x.float()
    runs = wide.unflatten(-1, (-1, block))
    for step in range(_log2(block)):
        first, second = runs.unflatten(-1, (-1, 2, 1 << step)).unbind(-2)
        runs = torch.stack((first + second, first - second), -2).flatten(-3)
    return (runs.flatten(-2) * 2.0**-halvings).to(x.dtype)


def _log2(size: int) -> int:
    if size < 1 or size & (size - 1):
        raise ValueError(f"a rotation is over a power of two channels, not {size}")
    return size.bit_length() - 1
