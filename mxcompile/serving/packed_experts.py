"""Experts on packed tensors, for an engine that keeps plain tensors and not MXWeights.

    experts(x, numbers, weights, up, down, gate) = mx::experts(prepared x, ...)

A `down` whose input is multiplied or rotated has no fused operator: its input is prepared between two of
`mx::grouped_linear`. On a GPU `to_planes` converts a weight to the layout of the fast kernels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import parse_format
from mxcompile.kernels import dispatch
from mxcompile.kernels.layout.planes import PlanarScaling
from mxcompile.numerics.experts import weighted_sum
from mxcompile.numerics.gates import parse_gate
from mxcompile.ops import EXPERTS, GROUPED_LINEAR, MULTIPLY, QUANTIZE_DEQUANTIZE, ROTATE
from mxcompile.serving.stored_experts import PackedExperts
from mxcompile.tensor.weight import MXWeight


def experts(x: Tensor, numbers: Tensor, weights: Tensor, up: PackedExperts, down: PackedExperts, gate: str) -> Tensor:
    """x `[tokens, hidden]`, numbers and weights `[tokens, k]`; a number outside of [0, E) chooses no expert.

    gate: the text of a `Gate`, between up `[E, 2 * inner, hidden]` and down `[E, hidden, inner]`.
    """
    x = _rounded(_transformed(x, up), up)
    if _is_plain(down):
        parts = ([up.elements, up.scales], up.bias, [down.elements, down.scales], down.bias)
        formats = (up.layout.format, down.layout.format, gate, down.layout.activation, down.layout.rule)
        return EXPERTS(x, numbers, weights, *parts, *formats, _planes(up), _planes(down))
    h = parse_gate(gate)(_grouped(x, numbers, up))
    y = _grouped(_rounded(_transformed(h, down), down), numbers.reshape(-1, 1), down)
    return weighted_sum(y, weights, x.dtype)


def to_planes(weight: PackedExperts, dtype: torch.dtype) -> PackedExperts:
    """The weight in the planar layout. Raises MXCompileError with the reason if it must stay as it is."""
    fmt = parse_format(weight.layout.format)
    x = torch.empty((1, weight.layout.size), dtype=dtype, device=weight.elements.device)
    reason = dispatch.expert_choices(x, fmt, weight.elements.shape[1])["experts"]
    if reason is not None:
        raise MXCompileError(reason)
    dispatch.prepare(weight.elements.device)
    layout = replace(weight.layout, multiplier=None, rotation=None)
    planar = MXWeight(weight.elements, weight.scales, layout, dtype).to_planar()
    layout = replace(weight.layout, planes=planar.layout_.planes)
    return replace(weight, layout=layout, elements=planar.elements, scales=planar.scales)


def _grouped(x: Tensor, numbers: Tensor, weight: PackedExperts) -> Tensor:
    parts = (weight.elements, weight.scales, weight.bias, weight.layout.format, _planes(weight))
    return GROUPED_LINEAR(x, numbers, *parts)


def _is_plain(weight: PackedExperts) -> bool:
    return weight.multiplier is None and weight.layout.rotation is None


def _transformed(x: Tensor, weight: PackedExperts) -> Tensor:
    if weight.multiplier is not None:
        x = MULTIPLY(x, weight.multiplier, str(weight.layout.multiplier))
    return x if weight.layout.rotation is None else ROTATE(x, weight.layout.rotation)


def _rounded(x: Tensor, weight: PackedExperts) -> Tensor:
    layout = weight.layout
    return x if layout.activation is None else QUANTIZE_DEQUANTIZE(x, layout.activation, layout.rule)


def _planes(weight: PackedExperts) -> list[int] | None:
    planes: PlanarScaling | None = weight.layout.planes
    return None if planes is None else list(planes)
