"""The names and rows under which transformers stores the tensors of a model: experts one by one.

    experts.gate_up_proj [experts, 2 * inner, hidden] <-> experts.0.gate_proj.weight [inner, hidden], 0.up_proj, ...

A model has its experts in one parameter; files of other programs have a tensor for each, under the published names.
transformers knows how to split one into the other (`revert_weight_conversion`). It is asked with the numbers of the
rows in place of the tensor, in two columns, since some versions drop a dimension of one: what it does to rows is then
done to elements and scales alike.
"""

import copy
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import is_pretrained, named_tensors
from mxcompile.tensor.weight import MXWeight

RowsOf = dict[str, Tensor | None]
"""Stored name -> the rows stored there, counted over all leading dimensions: int64 `[rows]`; None: the whole tensor."""
_COLUMNS: Final = 2
_CONVERSIONS: Final = "_weight_conversions"  # of the files a model was loaded from, which may have had other names


def stored_rows(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, RowsOf]:
    """Where the tensors of these names and shapes are stored; a module of your own has them under its own names.

    A tensor that transformers stores in another way than by rows keeps its own name.
    """
    if not is_pretrained(module):
        return {name: {name: None} for name in shapes}
    from transformers.core_model_loading import revert_weight_conversion

    fresh: Any = copy.copy(module)
    vars(fresh).pop(_CONVERSIONS, None)
    stored: dict[str, RowsOf] = {}
    for name, shape in shapes.items():
        leading = shape[:-1] if len(shape) > 1 else (1,)
        numbers = torch.arange(torch.Size(leading).numel()).view(*leading, 1).repeat_interleave(_COLUMNS, -1)
        parts: dict[str, Tensor] = revert_weight_conversion(fresh, {name: numbers})
        stored[name] = {name: None}
        if all(part.shape == numbers.shape and torch.equal(part, numbers) for part in parts.values()):
            stored[name] = {next(iter(parts)): None}
        elif all(_keeps_rows(part) for part in parts.values()):
            stored[name] = {part: rows.view(-1, _COLUMNS)[:, 0] for part, rows in parts.items()}
    return stored


def _keeps_rows(part: Tensor) -> bool:
    """Whether a part is `[rows, columns]`, or `[columns]` of one row, and each row is one of the tensor's."""
    return part.dim() in (1, 2) and part.shape[-1] == _COLUMNS and bool((part == part[..., :1]).all())


def take_rows(value: Tensor, rows: Tensor | None) -> Tensor:
    """Those rows of a tensor `[..., width]`, as `[rows, width]`; the tensor itself for None."""
    return value if rows is None else value.flatten(0, -2)[rows]


def join_experts(source: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors under the model's own names: experts joined to one parameter, MX weights to one MXWeight.

    Raises CheckpointError if one of several experts is missing, or if they differ in format or shape.
    """
    own = named_tensors(model)
    if all(name in own for name in tensors):
        return dict(tensors)
    available = sum(torch.Size(tensor.shape[:-1]).numel() for tensor in tensors.values())
    shapes = {name: tensor.shape for name, tensor in own.items() if name not in tensors}
    shapes = {name: shape for name, shape in shapes.items() if torch.Size(shape[:-1]).numel() <= available}
    joined = dict(tensors)
    for name, rows_of in stored_rows(model, shapes).items():
        parts = {part: joined[part] for part in rows_of if part in joined}
        if parts and set(rows_of) != {name}:
            missing = [part for part in rows_of if part not in parts]
            if missing:
                raise CheckpointError(f"{source} does not hold {missing[0]}, which belongs to {name}")
            joined = {key: value for key, value in joined.items() if key not in parts}
            joined[name] = _join(f"{source}: {name}", parts, rows_of, own[name].shape)
    return joined


def _join(name: str, parts: Mapping[str, Tensor], rows_of: RowsOf, shape: torch.Size) -> Tensor:
    first = next(iter(parts.values()))
    rows = {part: numbers for part, numbers in rows_of.items() if numbers is not None}
    if not rows:
        return first
    for part, value in parts.items():
        expected = (len(rows[part]), shape[-1])
        if type(value) is not type(first) or value.dtype != first.dtype or tuple(value.shape) != expected:
            raise CheckpointError(
                f"{name}: {part} is {list(value.shape)} ({value.dtype}, {type(value).__name__}), which does not fit "
                "the others that belong there"
            )
        if isinstance(value, MXWeight) and isinstance(first, MXWeight) and value.layout_ != first.layout_:
            raise CheckpointError(f"{name}: {part} is in {value.layout_.format}, others that belong there are not")
    weights = [value for value in parts.values() if isinstance(value, MXWeight)]
    if not weights:
        return _placed(list(parts.values()), rows, shape)
    elements = _placed([weight.elements for weight in weights], rows, shape)
    scales = _placed([weight.scales for weight in weights], rows, shape)
    return MXWeight(elements, scales, weights[0].layout_, weights[0].dtype)


def _placed(parts: list[Tensor], rows_of: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    joined = torch.empty(torch.Size(shape[:-1]).numel(), parts[0].shape[-1], dtype=parts[0].dtype)
    for part, rows in zip(parts, rows_of.values(), strict=True):
        joined[rows] = part
    return joined.view(*shape[:-1], -1)
