"""Experts in plain PyTorch: each token is multiplied by the weights of the experts chosen for it, and by no others.

    grouped_linear(x, experts, W, b)[r * k + j] = x[r] @ W[experts[r, j]].T + b[experts[r, j]]
    experts: y = grouped_linear(gate(grouped_linear(x, up)), down), summed over the k choices of a token with weights

A *choice* is a (token, slot) pair. A number outside of [0, E) chooses no expert: its row is zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def grouped_linear(
    x: Tensor, experts: Tensor, count: int, out: int, multiply: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """x `[rows, in]`, experts `[rows, k]` integers; returns `[rows * k, out]`.

    count: number of experts. multiply: (rows of x, expert) -> their products `[rows, out]`; called once for each expert
    that is chosen, in ascending order.
    """
    choices = experts.reshape(-1)
    slots = experts.shape[-1]
    y = x.new_zeros(len(choices), out)
    for expert in choices.unique().tolist():
        if 0 <= expert < count:
            chosen = (choices == expert).nonzero().flatten()
            y[chosen] = multiply(x[chosen // slots], expert)
    return y


def weighted_sum(y: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """y `[tokens * k, hidden]`, weights `[tokens, k]`: the sum over the k choices of each token, `[tokens, hidden]`."""
    return (y.unflatten(0, weights.shape) * weights[..., None]).sum(1).to(dtype)


def experts_of_rows(ends: Tensor, rows: int) -> Tensor:
    """The expert of each row, int64 `[rows, 1]`, where the rows of expert e end before row `ends[e]`.

    Rows behind the last end get the number of experts, which is none of them.
    """
    numbers = torch.arange(rows, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, numbers, right=True).unsqueeze(1)


def experts_in_turn(x: Tensor) -> Tensor:
    """The expert of each row of x `[E, rows, in]`, int64 `[E * rows, 1]`: that of its batch.

    A row of zeros gets a number that is none of them, so that an expert is not decoded only to be multiplied by zero:
    Llama-4 multiplies a token by its router's score, which is zero where the token did not choose the expert.
    """
    count, rows = x.shape[:2]
    numbers = torch.arange(count, device=x.device)[:, None].expand(count, rows)
    return (numbers + count * x.any(-1).logical_not()).reshape(-1, 1)
