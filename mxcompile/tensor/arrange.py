"""A deployed module on a GPU -> its MX weights arranged for the kernels that will read them.

Weights of one module that are alike (q, k and v; gate and up) come to lie side by side in memory, so that one launch
can serve them where they share an input. A table that is looked up, and whatever planes cannot hold, stays in rows.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from mxcompile.errors import MXCompileError
from mxcompile.formats import parse_format
from mxcompile.kernels.dispatch import choices, prepare
from mxcompile.kernels.layout import rows_to_planes
from mxcompile.kernels.layout.planes import Scaling, scaling_for
from mxcompile.kernels.layout.rows_to_planes import Range
from mxcompile.tensor.modules import place_all
from mxcompile.tensor.weight import MXLayout, MXWeight


def arrange(module: nn.Module) -> dict[str, str]:
    """Put a module's MX weights in planes, in place; returns why others stay in rows, by name."""
    kept: dict[str, str] = {}
    groups: dict[tuple[str, MXLayout], list[tuple[MXWeight, Range]]] = {}
    looked_up = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    for name, weight in module.named_parameters():
        if not isinstance(weight, MXWeight) or weight.layout_.planes is not None:
            continue
        try:
            if id(weight) in looked_up:
                raise MXCompileError("it is looked up, too")
            found = _range(weight)
        except MXCompileError as error:
            kept[name] = str(error)
            continue
        parent = name.removesuffix(".weight").rpartition(".")[0]
        groups.setdefault((parent, replace(weight.layout_, transposed=False)), []).append((weight, found))
    names: dict[int, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for group in groups.values():
        for weights, scaling in _scaled_alike(group):
            prepare(weights[0].device)
            for weight, arranged in zip(weights, _side_by_side(weights, scaling), strict=True):
                place_all(module, [(name, arranged) for name in names[id(weight)]])
    return kept


def _range(weight: MXWeight) -> Range:
    """The range of the weight's scales; raises MXCompileError with the reason if it has to stay in rows."""
    spec, fmt = weight.layout_, parse_format(weight.layout_.format)
    if weight.dim() == 2:
        x = torch.empty((1, spec.size), dtype=weight.dtype, device=weight.device)
        reason = choices(x, fmt, len(weight.elements))["planes"]
        if reason is not None:
            raise MXCompileError(reason)
    found = rows_to_planes.range_of_rows(weight.elements, weight.scales, fmt, spec.size)
    scaling_for(*found, fmt)
    return found


def _scaled_alike(group: list[tuple[MXWeight, Range]]) -> Iterator[tuple[list[MXWeight], Scaling]]:
    """Weights that one launch can serve have one scaling; each has its own where that would take from one of them."""
    fmt = parse_format(group[0][0].layout_.format)
    own = [scaling_for(*found, fmt) for _, found in group]
    try:
        together = scaling_for(min(low for _, (low, _) in group), max(high for _, (_, high) in group), fmt)
    except MXCompileError:
        together = None
    if together is not None and (together.top or not any(scaling.top for scaling in own)):
        yield [weight for weight, _ in group], together
    else:
        yield from (([weight], scaling) for (weight, _), scaling in zip(group, own, strict=True))


def _side_by_side(weights: list[MXWeight], scaling: Scaling) -> list[MXWeight]:
    """The weights in planes, one behind the other in two tensors."""
    outs, layout = [len(weight.elements) for weight in weights], weights[0].layout_
    parts = rows_to_planes.empty_planes(sum(outs), parse_format(layout.format), layout.size, weights[0].device)
    places = zip(*(part.split(outs) for part in parts), strict=True)
    return [weight.in_planes(scaling, place) for weight, place in zip(weights, places, strict=True)]
