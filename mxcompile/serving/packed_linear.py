"""A linear layer on packed tensors, for an engine that keeps plain tensors and not MXWeights.

    linear(x, layout, multiplier, parts, bias) = what F.linear(x, MXWeight(...), bias) computes

A layer that an engine made of several (q, k and v) is one matrix of rows. On a GPU `to_planes` converts it to the
layout of the fast kernels, as one part, or as one for each of the layers if only that suits their scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import parse_format
from mxcompile.kernels import dispatch
from mxcompile.kernels.layout.planes import PlanarScaling, scaling_for
from mxcompile.ops import LINEARS, MULTIPLY, ROTATE
from mxcompile.tensor.layout import MXLayout
from mxcompile.tensor.weight import MXWeight


@dataclass(frozen=True)
class PackedPart:
    """Rows of a weight: elements `[out, bytes]`, scales `[out, blocks]`, and their scaling if they are planar."""

    elements: Tensor
    scales: Tensor
    planes: PlanarScaling | None = None


def linear(
    x: Tensor, layout: MXLayout, multiplier: Tensor | None, parts: Sequence[PackedPart], bias: Tensor | None
) -> Tensor:
    """`x` prepared as the layout says, times the dequantized parts: x `[..., in]`, returns `[..., out]`."""
    if multiplier is not None:  # a vector's product can be fused with what makes x
        x = x * multiplier if multiplier.dim() == 1 else MULTIPLY(x, multiplier, str(layout.multiplier))
    x = x if layout.rotation is None else ROTATE(x, layout.rotation)
    outputs: list[Tensor] = []
    start = 0
    for part in parts:
        stop = start + part.elements.shape[0]
        some = bias if bias is None or len(parts) == 1 else bias[start:stop]
        planes = None if part.planes is None else list(part.planes)
        args = ([part.elements], [part.scales], [some], layout.format, layout.activation, layout.rule, planes)
        outputs += LINEARS(x, *args)
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def to_planes(whole: PackedPart, layout: MXLayout, dtype: torch.dtype, outs: Sequence[int]) -> list[PackedPart]:
    """The rows in the planar layout, in one part or in parts of `outs` rows.

    Raises MXCompileError with the reason if they must stay as they are.
    """
    weight = _as_weight(whole, layout, dtype)
    fmt = parse_format(layout.format)
    x = torch.empty((1, layout.size), dtype=dtype, device=weight.device)
    reason = dispatch.choices(x, fmt, len(whole.elements))["planes"]
    if reason is not None:
        raise MXCompileError(reason)
    dispatch.prepare(weight.device)
    scaling = _scaling(weight)
    if len(outs) > 1 and not (isinstance(scaling, PlanarScaling) and (scaling.top or layout.activation is None)):
        pieces = [_as_weight(piece, layout, dtype) for piece in _pieces(whole, outs)]
        scalings = [_scaling(piece) for piece in pieces]
        separate = [each for each in scalings if isinstance(each, PlanarScaling)]
        if len(separate) == len(pieces) and (isinstance(scaling, MXCompileError) or any(s.top for s in separate)):
            return [_planar(piece, each) for piece, each in zip(pieces, separate, strict=True)]
    if isinstance(scaling, MXCompileError):
        raise scaling
    return [_planar(weight, scaling)]


def _scaling(weight: MXWeight) -> PlanarScaling | MXCompileError:
    """The scaling of a weight in the planar layout, or why it has none."""
    try:
        return scaling_for(*weight.planar_scale_range(), parse_format(weight.layout_.format))
    except MXCompileError as error:
        return error


def _planar(weight: MXWeight, scaling: PlanarScaling) -> PackedPart:
    planar = weight.to_planar(scaling)
    return PackedPart(planar.elements, planar.scales, scaling)


def _pieces(whole: PackedPart, outs: Sequence[int]) -> list[PackedPart]:
    parts = zip(whole.elements.split(list(outs)), whole.scales.split(list(outs)), strict=True)
    return [PackedPart(*part) for part in parts]


def _as_weight(part: PackedPart, layout: MXLayout, dtype: torch.dtype) -> MXWeight:
    return MXWeight(part.elements, part.scales, replace(layout, multiplier=None, rotation=None), dtype)
