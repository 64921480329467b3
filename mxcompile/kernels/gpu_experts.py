"""Experts with planar weights on a GPU: which kernels multiply, by the number of choices.

A choice is a (token, slot) pair. Nothing here waits for the GPU: which experts were chosen is never read on the host.
"""

from collections.abc import Callable
from enum import Enum
from typing import Final, TypeAlias

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.expert_configs import grouped_config, one_token_configs, sum_config
from mxcompile.kernels.gluon import grouped_planes as gluon_grouped
from mxcompile.kernels.gpu_linears import PackedWeight
from mxcompile.kernels.layout.planes import PlanarScaling, from_bytes
from mxcompile.kernels.triton import expert_sums, grouped_planes
from mxcompile.kernels.triton import planes_linear as triton_planes
from mxcompile.kernels.triton.expert_slices import Stack
from mxcompile.numerics.gates import Gate

PackedExperts: TypeAlias = tuple[PackedWeight, MXFormat, PlanarScaling]
"""Planar experts as bytes: elements `[E, out, bytes]`, scales `[E, out, blocks]` and a bias `[E, out]` or None."""
Rounding: TypeAlias = tuple[MXFormat, ScaleRule]
_LARGEST_BLOCK: Final = 128


class Path(Enum):
    """How choices become work for programs."""

    SINGLE = "every choice is multiplied on its own, and the weighted sum is part of the last matmul"
    SHARED = "a program multiplies choices of the same expert, which it finds by ranking all choices"
    SORTED = "choices are sorted by expert first, and tiles of tokens multiplied with the weight of their expert"


def path_for(x: Tensor, experts: Tensor, count: int) -> Path:
    """The path for x `[tokens, in]` and experts `[tokens, k]`, numbers of `count` experts."""
    if experts.numel() > grouped_planes.MOST_RANKED and gluon_grouped.supports(x) is None:
        return Path.SORTED
    # Up to count / 2 random choices, an expert is chosen 1.3 times on average, and read again from L2.
    return Path.SINGLE if len(x) == 1 or 2 * experts.numel() <= count else Path.SHARED


def supports(x: Tensor, rounding: Rounding | None = None) -> str | None:
    """None if `grouped_linear`, or `experts` with that rounding, supports x, else the reason."""
    reason = None if rounding is None else grouped_planes.why_not_rounded(rounding, 2 * _LARGEST_BLOCK)
    return reason or triton_planes.supports(x)


def grouped_linear(x: Tensor, experts: Tensor, weight: PackedWeight, fmt: MXFormat, scaling: PlanarScaling) -> Tensor:
    """Rows of x `[rows, in]` times the experts chosen for them, `[rows, k]`: y `[rows * k, out]`."""
    stack, path = _stack((weight, fmt, scaling), x.shape[1]), path_for(x, experts, len(weight[0]))
    if path is Path.SORTED:
        return gluon_grouped.grouped_linear(x, experts, stack)
    config = grouped_config(fmt, x.shape[1], _of_an_expert(experts, stack), x.device, shared=path is Path.SHARED)

    def multiply(rows: Tensor, chosen: Tensor) -> Tensor:
        return grouped_planes.linear(rows, chosen, stack, config)

    return _in_parts(multiply, x, experts)


def experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: PackedExperts,
    down: PackedExperts,
    gate: Gate,
    rounding: Rounding | None,
) -> Tensor:
    """The weighted sum of a token's chosen experts: x `[tokens, hidden]`, experts and weights `[tokens, k]`.

    up: experts `[E, 2 * inner, hidden]`, then the gate and `rounding`. down: experts `[E, hidden, inner]`.
    """
    first, last = _stack(up, x.shape[1]), _stack(down, up[0][0].shape[1] // 2)
    path = path_for(x, experts, first.count)
    if path is Path.SORTED:
        return gluon_grouped.experts(x, experts, weights, first, last, gate, rounding)
    run = _single if path is Path.SINGLE else _shared

    def multiply(rows: Tensor, chosen: Tensor, factors: Tensor) -> Tensor:
        return run(rows, chosen, factors, first, last, gate, rounding)

    return _in_parts(multiply, x, experts, weights)


def _single(
    x: Tensor, experts: Tensor, weights: Tensor, up: Stack, down: Stack, gate: Gate, rounding: Rounding | None
) -> Tensor:
    slots, sizes = experts.shape[1], (up.planes.size, down.planes.size)
    configs = None
    if len(x) == 1 and rounding is None:
        configs = one_token_configs((up.planes.fmt, down.planes.fmt), sizes, slots, x.device)
    if configs is None:
        last = sum_config(down.planes.fmt, down.planes.size, slots, x.device)
        configs = _gate_config(x, experts, up, rounding, shared=False), last
    h = grouped_planes.gated_linear(x, experts, up, gate, rounding, configs[0])
    return expert_sums.multiply_and_sum(h, experts, weights, down, configs[1])


def _shared(
    x: Tensor, experts: Tensor, weights: Tensor, up: Stack, down: Stack, gate: Gate, rounding: Rounding | None
) -> Tensor:
    config = _gate_config(x, experts, up, rounding, shared=True)
    h = grouped_planes.gated_linear(x, experts, up, gate, rounding, config)
    last = grouped_config(down.planes.fmt, h.shape[1], _of_an_expert(experts, down), x.device, shared=True)
    rows = grouped_planes.linear(h, experts.reshape(-1, 1), down, last)
    return expert_sums.weighted_sum(rows, weights, dependent=last.dependent)


def _gate_config(
    x: Tensor, experts: Tensor, up: Stack, rounding: Rounding | None, *, shared: bool
) -> grouped_planes.Config:
    block = 1 if rounding is None else rounding[0].block_size
    of_an_expert = _of_an_expert(experts, up)
    return grouped_config(up.planes.fmt, x.shape[1], of_an_expert, x.device, shared=shared, block=block)


def _of_an_expert(experts: Tensor, stack: Stack) -> float:
    """Choices of each expert on average, of those that are multiplied together."""
    return min(experts.numel(), grouped_planes.MOST_RANKED) / stack.count


def _in_parts(multiply: Callable[..., Tensor], x: Tensor, experts: Tensor, *others: Tensor) -> Tensor:
    """`multiply` for as many rows at once as have no more choices than programs rank."""
    step = max(1, grouped_planes.MOST_RANKED // max(1, experts.shape[1]))
    if len(x) <= step:
        return multiply(x, experts, *others)
    parts = zip(*(rows.split(step) for rows in (x, experts, *others)), strict=True)
    return torch.cat([multiply(*rows) for rows in parts])


def _stack(packed: PackedExperts, size: int) -> Stack:
    (elements, scales, bias), fmt, scaling = packed
    planes = from_bytes(elements.flatten(0, 1), scales.flatten(0, 1), fmt, size, scaling)
    return Stack(planes, len(elements), bias)
