"""Random planar experts, and float64 bounds for kernels of experts (grouped_planes.py, expert_sums.py)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.layout.planes import PlanarWeight, to_planes
from mxcompile.numerics import reference
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.packing import pack

_UNIT = 2.0**-23
_AT_ONCE = 16
"""Choices whose weights are float64 at a time: many processes may share a GPU's memory."""
_STEEPEST = 1.13
"""The largest slope of the functions of a gate."""


@dataclass(frozen=True)
class Experts:
    """Experts as planes and as values `[count, out, size]`, with a bias `[count, out]` or None."""

    planes: PlanarWeight
    values: Tensor
    bias: Tensor | None

    def stack(self, kernels: Any) -> Any:
        """The `Stack` of a module of kernels, which may be a copy for the interpreter."""
        return kernels.Stack(self.planes, len(self.values), self.bias)

    def chosen(self, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each choice: whether it is of an expert, the weight `[choices, out, size]`, the bias `[choices, out]`."""
        numbers = experts.flatten().to(self.values.device)
        valid = (numbers >= 0) & (numbers < len(self.values))
        index = torch.where(valid, numbers, 0).long()
        weight = self.values[index].double() * valid[:, None, None]
        bias = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
        return valid, weight, bias if self.bias is None else self.bias[index].double() * valid[:, None]


def make_experts(
    fmt: MXFormat, count: int, out: int, size: int, with_bias: bool = False, device: str = "cpu", lift: int = 0
) -> Experts:
    """Normal values. lift: added to all scales, so that large ones do not fit into a plane unchanged."""
    generator = torch.Generator().manual_seed(count * out + size)
    values = torch.randn(count * out, size, generator=generator).to(device)
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    scales += lift
    dense = reference.dequantize(codes, scales, fmt, size, torch.bfloat16).unflatten(0, (count, out))
    bias = torch.randn(count, out, generator=generator).to(device, torch.bfloat16) if with_bias else None
    return Experts(to_planes(pack(codes, fmt), scales, fmt, size), dense, bias)


def tokens(rows: int, size: int, device: str = "cpu") -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(rows)).to(device, torch.bfloat16)


def choose(rows: int, slots: int, count: int, device: str = "cpu") -> Tensor:
    """Random experts `[rows, slots]`, with repetition."""
    return torch.randint(count, (rows, slots), generator=torch.Generator().manual_seed(rows + slots)).to(device)


def several_tiles(out: int) -> int:
    """A number of weight rows, whole 64s, for more than one tile of `out`: of 128, the last is a half."""
    return out + 64 if out >= 64 else 64


def linear_over_bound(y: Tensor, x: Tensor, experts: Tensor, layer: Experts) -> float:
    """The largest error of y `[choices, out]` over what float32 accumulation and one rounding may lose; at most 1."""
    exact, error = _products(x, experts, layer)
    return _over_bound(y, exact, error)


def gated_over_bound(h: Tensor, x: Tensor, experts: Tensor, up: Experts, gate: Gate) -> float:
    """The same for the gate of the products: their errors times the slope of each factor, and 32 float32 operations.

    Rows of choices of no expert, which are not written, are left out.
    """
    exact, error = _products(x, experts, up)
    valid = up.chosen(experts)[0]
    (first, second), (first_error, second_error) = _split(exact, gate), _split(error, gate)
    limited = second if gate.limit is None else second.clamp(-gate.limit, gate.limit)
    result = gate(exact)
    factor = limited + gate.shift
    activated = Gate(gate.function, gate.alpha, gate.limit)(torch.cat([first, torch.ones_like(first)], dim=-1))
    lost = _STEEPEST * first_error * (factor.abs() + second_error) + activated.abs() * second_error
    lost += 32 * _UNIT * (result.abs() + (first * factor).abs())
    return _over_bound(h[valid], result[valid], lost[valid])


def sum_over_bound(y: Tensor, h: Tensor, experts: Tensor, weights: Tensor, down: Experts) -> float:
    """The same for the weighted sum over the choices of each token: y `[tokens, out]`, h `[choices, in]`."""
    valid = down.chosen(experts)[0]
    exact, error = _products(torch.where(valid[:, None], h, 0.0), experts.reshape(-1, 1), down)
    factors = weights.double().flatten()[:, None]
    terms, lost = exact * factors, error * factors.abs()
    slots = experts.shape[1]
    lost = lost.unflatten(0, (-1, slots)).sum(1) + 2 * slots * _UNIT * terms.abs().unflatten(0, (-1, slots)).sum(1)
    return _over_bound(y, terms.unflatten(0, (-1, slots)).sum(1), lost)


def _products(x: Tensor, experts: Tensor, layer: Experts) -> tuple[Tensor, Tensor]:
    """W @ x + bias of each choice in float64, and what float32 accumulation may lose, `[choices, out]`."""
    rows = x.repeat_interleave(experts.shape[1], 0).double()
    parts = zip(rows.split(_AT_ONCE), experts.flatten().split(_AT_ONCE), strict=True)
    exact, magnitude = zip(*(_of_some(some, chosen, layer) for some, chosen in parts), strict=True)
    n_u = (x.shape[1] + 1) * _UNIT
    return torch.cat(exact), n_u / (1 - n_u) * torch.cat(magnitude)


def _of_some(rows: Tensor, experts: Tensor, layer: Experts) -> tuple[Tensor, Tensor]:
    _, weight, bias = layer.chosen(experts)
    magnitude = (weight.abs() @ rows.abs()[..., None])[..., 0] + bias.abs()
    return (weight @ rows[..., None])[..., 0] + bias, magnitude


def _split(channels: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    if gate.interleaved:
        return channels[..., ::2], channels[..., 1::2]
    first, second = channels.chunk(2, dim=-1)
    return first, second


def _over_bound(y: Tensor, exact: Tensor, error: Tensor) -> float:
    info = torch.finfo(y.dtype)
    bound = error + info.eps / 2 * (exact.abs() + error) + info.smallest_normal * info.eps / 2
    assert y.isfinite().all()
    assert y.shape == exact.shape
    return ((y.double() - exact).abs() / bound).max().item() if y.numel() else 0.0
