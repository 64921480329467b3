"""Block-diagonal Hadamard rotation of channels: the definition of `mx::rotate`.

    x [..., in] -> each run of 2^n channels @ H / 2^ceil(n/2)         w [..., in] -> each run @ H / 2^floor(n/2)

H H^T = 2^n, so the two powers of two cancel exactly and no square root is needed.
"""

import torch
from torch import Tensor

from mxcompile.numerics.row_slices import row_wise


def rotate_input(x: Tensor, block: int) -> Tensor:
    """`[..., in]`: every run of `block` = 2^n channels times H / 2^ceil(n/2), computed in float32 and rounded once."""
    return _times(x, block, -(-_log2(block) // 2))


def rotate_weight(w: Tensor, block: int) -> Tensor:
    """`[..., in]`: every run times H / 2^floor(n/2), so that rotate_input(x) @ rotate_weight(w).T = x @ w.T."""
    halvings = _log2(block) // 2

    def times(rows: Tensor) -> tuple[Tensor]:
        return (_times(rows, block, halvings),)

    return row_wise(times, w)[0]


def _times(x: Tensor, block: int, halvings: int) -> Tensor:
    """Fast Walsh-Hadamard transform (Sylvester order); the order of additions is the same on every device."""
    wide = x if x.dtype == torch.float64 else x.float()
    runs = wide.unflatten(-1, (-1, block))
    for step in range(_log2(block)):
        first, second = runs.unflatten(-1, (-1, 2, 1 << step)).unbind(-2)
        runs = torch.stack((first + second, first - second), -2).flatten(-3)
    return (runs.flatten(-2) * 2.0**-halvings).to(x.dtype)


def _log2(size: int) -> int:
    if size < 1 or size & (size - 1):
        raise ValueError(f"a rotation block must be a power of two, not {size}")
    return size.bit_length() - 1
