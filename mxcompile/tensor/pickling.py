"""Pickle an MXWeight as its component tensors: `torch.save` and `torch.load`, worker processes, `copy.copy`.

    torch.save(model.state_dict(), "weights.pt")
    model.load_state_dict(torch.load("weights.pt"))  # a quantized one; a float one: assign=True, without gradients

The file names `rebuild_weight` alone, which torch then calls with tensors, texts and numbers. It checks them, so that
`torch.load` may call it with its default `weights_only=True`, which is for files that nobody vouches for. A planar
weight is written row-major: files are the same on all devices.
"""

import copyreg
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from mxcompile.errors import WeightError
from mxcompile.formats import parse_format, parse_scale_rule
from mxcompile.tensor.dtypes import FLOAT_DTYPES
from mxcompile.tensor.weight import MXLayout, MXWeight


def rebuild_weight(
    parts: tuple[Tensor, ...], layout: tuple[Any, ...], dtype: torch.dtype, is_parameter: bool
) -> MXWeight:
    """The weight with these component tensors. layout: the fields of an `MXLayout` up to `rotation`.

    Raises WeightError if they do not fit each other, an MXCompileError if a format is unknown.
    """
    spec = MXLayout(*layout)
    if (reason := _why_unfit(parts, spec, dtype)) is not None:
        raise WeightError(f"a pickled MXWeight is damaged: {reason}; save it again")
    elements, scales, *multiplier = parts
    weight = MXWeight(elements, scales, spec, dtype, *multiplier)
    if is_parameter:
        setattr(weight, "_is_param", True)  # noqa: B010 - how torch marks a parameter of another class
    return weight


def _reduce(weight: MXWeight) -> tuple[Any, ...]:
    rows = weight.to_row_major()
    *layout, _ = astuple(rows.layout_)
    is_parameter = isinstance(weight, torch.nn.Parameter)
    return rebuild_weight, (rows.parts, tuple(layout), rows.dtype, is_parameter)


def _why_unfit(parts: tuple[Tensor, ...], layout: MXLayout, dtype: torch.dtype) -> str | None:
    fmt, size = parse_format(layout.format), layout.size
    count = 2 if layout.multiplier is None else 3
    if len(parts) != count:
        return f"it has {len(parts)} component tensors, not {count}"
    if type(size) is not int or size < 1:
        return f"its rows have {size!r} values"
    elements, scales, *multiplier = parts
    blocks = fmt.blocks(size)
    shapes = [*scales.shape[:-1], blocks], [*scales.shape[:-1], blocks * fmt.block_bytes]
    if scales.dim() < 2 or ([*scales.shape], [*elements.shape]) != shapes:
        return f"{fmt} rows of {size} values have no elements {[*elements.shape]} with scales {[*scales.shape]}"
    if (elements.dtype, scales.dtype) != (torch.uint8, torch.uint8) or dtype not in FLOAT_DTYPES.values():
        return f"it is {dtype} of {elements.dtype} elements and {scales.dtype} scales"
    if any((part.dtype, (*part.shape,)) != (dtype, layout.multiplier_shape) for part in multiplier):
        return f"its multiplier is not {layout.multiplier_shape} values of {dtype}"
    return _why_wrong_input(layout)


def _why_wrong_input(layout: MXLayout) -> str | None:
    rotation = layout.rotation
    if rotation is not None and (rotation < 1 or rotation & (rotation - 1) or layout.size % rotation):
        return f"its rotation {rotation} is not a power of two that divides {layout.size}"
    if (layout.activation is None) != (layout.rule is None):
        return f"it has the input format {layout.activation} with the scale rule {layout.rule}"
    if layout.activation is not None:
        parse_scale_rule(str(layout.rule)).threshold(parse_format(layout.activation))
    return None


copyreg.pickle(MXWeight, _reduce)
torch.serialization.add_safe_globals([rebuild_weight])
