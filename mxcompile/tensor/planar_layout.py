"""Convert the MX weights of a deployed module on a GPU to the planar layout, which the fast kernels read.

Similar weights of one module (q, k and v; gate and up) become adjacent in memory, so that one launch runs them where
they share an input; experts are not joined. Embedding tables, and weights that the layout cannot hold, stay row-major.

Weights at the same place in every layer share one scaling where that costs none of them a kernel: it is a constant of
compiled graphs, and layers with equal constants are compiled once.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, parse_format
from mxcompile.kernels.dispatch import choices, prepare
from mxcompile.kernels.layout import rows_to_planes
from mxcompile.kernels.layout.planes import PlanarScaling, scaling_for
from mxcompile.kernels.layout.rows_to_planes import ScaleRange
from mxcompile.tensor.modules import set_tensors
from mxcompile.tensor.weight import MXLayout, MXWeight


def use_planar_layout(module: nn.Module) -> dict[str, str]:
    """Convert a module's MX weights to the planar layout, in place; returns name -> reason for those not converted."""
    reasons: dict[str, str] = {}
    groups: dict[tuple[str, MXLayout], list[tuple[MXWeight, ScaleRange]]] = {}
    of_all_layers: dict[tuple[str, MXLayout], list[ScaleRange]] = {}
    looked_up = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    for name, weight in module.named_parameters():
        if not isinstance(weight, MXWeight) or weight.layout_.planes is not None:
            continue
        try:
            if id(weight) in looked_up:
                raise MXCompileError("it is an embedding table")
            scale_range = _scale_range(weight)
        except MXCompileError as error:
            reasons[name] = str(error)
            continue
        parent = name.removesuffix(".weight").rpartition(".")[0] if weight.dim() == 2 else name
        layout = replace(weight.layout_, transposed=False)
        groups.setdefault((parent, layout), []).append((weight, scale_range))
        of_all_layers.setdefault((_in_any_layer(parent), layout), []).append(scale_range)
    names: dict[int, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    shared = {key: _shared_scaling(ranges, parse_format(key[1].format)) for key, ranges in of_all_layers.items()}
    while groups:  # a group's row-major weights are freed before the next one is converted
        parent, layout = next(iter(groups))
        _convert(module, names, groups.pop((parent, layout)), shared[_in_any_layer(parent), layout])
    return reasons


def _in_any_layer(name: str) -> str:
    """The name of a module without the numbers of layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _convert(
    module: nn.Module,
    names: dict[int, list[str]],
    group: list[tuple[MXWeight, ScaleRange]],
    shared: PlanarScaling | None,
) -> None:
    """Replace a group of weights, under all their names, by planar ones. shared: the scaling of all layers."""
    one = None if shared is None else [([weight for weight, _ in group], shared)]
    for weights, scaling in one or _groups_with_one_scaling(group):
        prepare(weights[0].device)
        for weight, planar in zip(weights, _place_adjacently(weights, scaling), strict=True):
            set_tensors(module, [(name, planar) for name in names[id(weight)]])


def _scale_range(weight: MXWeight) -> ScaleRange:
    """The range of the weight's scales; raises MXCompileError with the reason if it must stay row-major."""
    spec, fmt = weight.layout_, parse_format(weight.layout_.format)
    x = torch.empty((1, spec.size), dtype=weight.dtype, device=weight.device)
    reason = choices(x, fmt, weight.elements.shape[-2])["planes"]
    if reason is not None:
        raise MXCompileError(reason)
    scale_range = weight.planar_scale_range()
    scaling_for(*scale_range, fmt)
    return scale_range


def _groups_with_one_scaling(
    group: list[tuple[MXWeight, ScaleRange]],
) -> Iterator[tuple[list[MXWeight], PlanarScaling]]:
    """Weights that share one scaling, as one launch requires: the whole group, or each weight alone if a shared scaling
    would make one of them ineligible for the planar layout or for FP8."""
    ranges, fmt = [scale_range for _, scale_range in group], parse_format(group[0][0].layout_.format)
    if (shared := _shared_scaling(ranges, fmt)) is not None:
        yield [weight for weight, _ in group], shared
    else:
        yield from (([weight], scaling_for(*scale_range, fmt)) for weight, scale_range in group)


def _shared_scaling(ranges: list[ScaleRange], fmt: MXFormat) -> PlanarScaling | None:
    """The scaling for weights with these ranges together; None if it would make one of them ineligible for the planar
    layout or for FP8."""
    try:
        shared = scaling_for(min(low for low, _ in ranges), max(high for _, high in ranges), fmt)
    except MXCompileError:
        return None
    return shared if shared.top or not any(scaling_for(*scale_range, fmt).top for scale_range in ranges) else None


def _place_adjacently(weights: list[MXWeight], scaling: PlanarScaling) -> list[MXWeight]:
    """The weights in the planar layout, one after the other in two shared tensors."""
    outs, layout = [weight.elements.shape[:-1].numel() for weight in weights], weights[0].layout_
    parts = rows_to_planes.empty_planes(sum(outs), parse_format(layout.format), layout.size, weights[0].device)
    targets = zip(*(part.split(outs) for part in parts), strict=True)
    return [weight.to_planar(scaling, target) for weight, target in zip(weights, targets, strict=True)]
