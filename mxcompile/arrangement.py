"""A deployed module on a GPU -> its MX weights arranged for the kernels that will read them.

Weights of one module that are alike (q, k and v; gate and up) come to lie side by side in memory, so that one launch
can serve them where they share an input. A table that is looked up, and whatever planes cannot hold, stays in rows.
"""

from dataclasses import replace

import torch
from torch import nn

from mxcompile.errors import MXCompileError
from mxcompile.formats import parse_format
from mxcompile.kernels import arranging
from mxcompile.kernels.dispatch import choices, prepare
from mxcompile.storage import place_all
from mxcompile.weight import MXLayout, MXWeight


def arrange(module: nn.Module) -> dict[str, str]:
    """Put a module's MX weights in planes, in place; returns why others stay in rows, by name."""
    kept: dict[str, str] = {}
    groups: dict[tuple[str, MXLayout], list[MXWeight]] = {}
    looked_up = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    for name, weight in module.named_parameters():
        if not isinstance(weight, MXWeight) or weight.layout_.planes is not None:
            continue
        try:
            if id(weight) in looked_up:
                raise MXCompileError("it is looked up, too")
            layout = replace(weight.layout_, planes=_lift(weight), transposed=False)
        except MXCompileError as error:
            kept[name] = str(error)
            continue
        parent = name.removesuffix(".weight").rpartition(".")[0]
        groups.setdefault((parent, layout), []).append(weight)
    names: dict[int, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for (_, layout), weights in groups.items():
        prepare(weights[0].device)
        for weight, arranged in zip(weights, _side_by_side(weights, layout), strict=True):
            place_all(module, [(name, arranged) for name in names[id(weight)]])
    return kept


def _lift(weight: MXWeight) -> int:
    """The lift of the weight's planes; raises MXCompileError with the reason if it has to stay in rows."""
    spec = weight.layout_
    if weight.dim() == 2:
        fmt, x = parse_format(spec.format), torch.empty((1, spec.size), dtype=weight.dtype, device=weight.device)
        reason = choices(x, fmt, len(weight.elements))["planes"]
        if reason is not None:
            raise MXCompileError(reason)
    return arranging.lift_of_rows(weight.elements, weight.scales, parse_format(spec.format), spec.size)


def _side_by_side(weights: list[MXWeight], layout: MXLayout) -> list[MXWeight]:
    """The weights in planes, one behind the other in two tensors."""
    outs = [len(weight.elements) for weight in weights]
    parts = arranging.empty_planes(sum(outs), parse_format(layout.format), layout.size, weights[0].device)
    places = zip(*(part.split(outs) for part in parts), strict=True)
    return [weight.in_planes(layout.planes, place) for weight, place in zip(weights, places, strict=True)]
