"""What an op does to the mask of visible rows: the rules that `visibility.py` applies node by node.

A mask is a bool tensor with as many dimensions as its value, of size 1 where all are alike: `[batch, sequence, 1]`,
`[batch, 1, sequence, 1]`, `[tokens, 1]`. In this order:

- An op that moves values (view, transpose, slice, cat, x[index], ...) is applied to the mask.
- An elementwise op: what is visible in all operands, broadcast as the operands are.
- x @ y, attention: the rows of x, or of the queries, unless all that they are multiplied with is hidden.
- A reduction, a sort, a convolution: visible if one of the elements that go into it is.
- An op that writes into a value (index_add, scatter): the mask of that value.
- Any other op, also an unknown one: a dimension that keeps its place and size keeps its mask, the others are reduced.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F

from mxcompile.graph.dataflow import operand

Mask = Tensor | tuple[Tensor | None, ...] | None
"""A bool tensor, one for each of several outputs, or None where nothing is hidden."""

aten = torch.ops.aten
_MOVES: Final = frozenset(
    {"view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "repeat"}
    | {
        "transpose",
        "permute",
        "t",
        "mT",
        "numpy_T",
        "swapaxes",
        "movedim",
        "slice",
        "select",
        "narrow",
        "cat",
        "concat",
    }
    | {"stack", "split", "split_with_sizes", "chunk", "unbind", "flip", "roll", "unfold", "constant_pad_nd", "pad"}
    | {"repeat_interleave", "tile", "view_as", "unsafe_split", "unsafe_chunk", "diagonal", "hstack", "vstack"}
)
SELECTS: Final[frozenset[str]] = frozenset({"index", "index_select", "gather", "take_along_dim", "masked_select"})
_WRITES: Final = frozenset(
    {"index_add", "index_copy", "index_put", "_index_put_impl", "index_fill", "scatter", "scatter_add"}
    | {"scatter_reduce", "masked_scatter", "slice_scatter", "select_scatter", "copy"}
)
_PRODUCTS: Final = {"matmul": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # op -> position of the left operand
_PADS, _VIEWS = frozenset({"constant_pad_nd", "pad"}), frozenset({"view", "_unsafe_view"})
_SORTS: Final = frozenset({"sort", "argsort", "msort", "topk", "kthvalue"})
_CONVOLUTIONS: Final = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


def mask_after(node: Node, masks: Mapping[Node, Mask], values: Mapping[Node, Any]) -> Mask:
    """The mask of a node's value. masks: of what it reads, where something is hidden. values: of both."""
    name = op_name(node)
    single = {source: mask for source, mask in masks.items() if isinstance(mask, Tensor)}
    first = _first_operand(node)
    if not single:
        return None
    if node.target is not aten.view.dtype and (name in _MOVES or (name in SELECTS and first in single)):
        return _moved(node, name, single, values)
    if name in _WRITES:
        return single[first] if first in single else _aligned(node, _blurred(single), values)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _broadcast(single.values(), values[node].dim())
    return _mixed(node, name, single, values)


def _mixed(node: Node, name: str, single: Mapping[Node, Tensor], values: Mapping[Node, Any]) -> Mask:
    """The rules of ops that reduce or mix rows, and of all others."""
    first = _first_operand(node)
    if name in _PRODUCTS and _is_product(node, _PRODUCTS[name], values):
        return _product(node, _PRODUCTS[name], single, values[node].dim())
    if "scaled_dot_product" in name:
        return _each(_attention(node, single), values[node])
    if name in _SORTS:
        single = {source: _reduced(node, mask, keepdim=True) for source, mask in single.items()}
    elif first in single and (position := _position(node, "keepdim")) is not None:
        return _each(_reduced(node, single[first], bool(operand(node, position))), values[node])
    elif name in _CONVOLUTIONS and first in single and values[first].dim() == values[operand(node, 1)].dim():
        return _convolved(node, name, single[first], values)
    return _aligned(node, single, values)


def _first_operand(node: Node) -> Any:
    """The first operand, None if it is no single value."""
    first = operand(node, 0) if node.args or node.kwargs else None
    return first if isinstance(first, Node) else None


def op_name(node: Node) -> str:
    """Name of an op without its namespace and overload, the same for its in-place form; "" for what is no op."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.partition("::")[2].rstrip("_")


def compact(mask: Tensor) -> Tensor:
    """The same mask with size 1 along every dimension in which it does not change."""
    for dim in range(mask.dim()):
        first = mask.narrow(dim, 0, min(1, mask.shape[dim]))
        if mask.shape[dim] > 1 and (mask.stride(dim) == 0 or bool((mask == first).all())):
            mask = first
    return mask.contiguous()


def _moved(node: Node, name: str, masks: Mapping[Node, Tensor], values: Mapping[Node, Any]) -> Mask:
    """The op itself, on masks in place of the values that it moves; indices and sizes stay as they are."""
    has_indices = name in SELECTS or name == "repeat_interleave"
    moved = {operand(node, 0)} if has_indices else set(node.all_input_nodes)

    def argument(source: Node) -> Any:
        value = values[source]
        if source not in moved or not isinstance(value, Tensor):
            return value
        mask = masks.get(source)
        visible = torch.ones((), dtype=torch.bool) if mask is None else mask
        return visible.to(value.device).expand(value.shape)

    args, kwargs = map_arg(node.args, argument), map_arg(node.kwargs, argument)
    if name in _PADS:  # what the model adds is no token
        return aten.constant_pad_nd.default(*cast(Any, args[:2]), 0)
    target: Any = aten.reshape.default if name in _VIEWS else node.target
    result = target(*args, **kwargs)
    return tuple(map(compact, result)) if isinstance(result, tuple | list) else compact(result)


def _broadcast(masks: Iterable[Tensor], dims: int) -> Tensor:
    """What is visible in all masks, aligned at the last dimension."""
    visible = reduce(torch.logical_and, masks)
    return visible.reshape(*[1] * (dims - visible.dim()), *visible.shape)


def _is_product(node: Node, left: int, values: Mapping[Node, Any]) -> bool:
    return all(values[operand(node, index)].dim() > 1 for index in (left, left + 1))


def _product(node: Node, left: int, masks: Mapping[Node, Tensor], dims: int) -> Tensor:
    """Rows of the left operand; columns of the right one only where the left one holds no tokens."""
    x, y, bias = operand(node, left), operand(node, left + 1), cast(Node, operand(node, 0) if left else None)
    parts = [masks[x].any(-1, keepdim=True)] if x in masks else []
    if y in masks:
        columns = masks[y].any(-2, keepdim=True)
        parts.append(columns.any(-1, keepdim=True) if x in masks else columns)
    parts += [masks[bias]] if bias in masks else []
    return _broadcast(parts, dims)


def _attention(node: Node, masks: Mapping[Node, Tensor]) -> Tensor:
    query, *others = (operand(node, index) for index in range(3))
    parts = [masks[query].any(-1, keepdim=True)] if query in masks else []
    for mask in (masks[other] for other in others if other in masks):
        parts.append(mask.flatten(1).any(1).reshape(-1, *[1] * (mask.dim() - 1)))
    return reduce(torch.logical_and, parts) if parts else next(iter(masks.values())).any()


def _reduced(node: Node, mask: Tensor, keepdim: bool) -> Tensor:
    position = _position(node, "dim")
    dims = None if position is None else operand(node, position)
    dims = [dims] if isinstance(dims, int) else dims
    return mask.any(tuple(dims) if dims else tuple(range(mask.dim())), keepdim=keepdim)


def _convolved(node: Node, name: str, mask: Tensor, values: Mapping[Node, Any]) -> Tensor:
    """A frame is visible if a part of its field is, or its own position, where positions stay."""
    x, output = values[operand(node, 0)], values[node]
    mask = mask.any(1, keepdim=True)
    if all(mask.shape[dim] == 1 or x.shape[dim] == output.shape[dim] for dim in range(2, x.dim())):
        return mask
    fields = mask.expand(-1, -1, *x.shape[2:]).float()
    kernel = torch.ones(1, 1, *values[operand(node, 1)].shape[2:], device=fields.device)
    return _CONVOLUTIONS[name](fields, kernel, None, *(operand(node, index) for index in (3, 4, 5))) > 0


def _aligned(node: Node, masks: Mapping[Node, Tensor], values: Mapping[Node, Any]) -> Mask:
    """Dimensions that keep their place and size keep their mask; the others are reduced."""
    output, traced = values[node], node.meta.get("val")
    if isinstance(output, Tensor):
        return _aligned_to(output, traced, masks, values)
    if not isinstance(output, tuple | list):
        return None
    each = traced if isinstance(traced, tuple | list) else [None] * len(output)
    pairs = zip(cast(list[Any], output), cast(list[Any], each), strict=True)
    return tuple(_aligned_to(o, t, masks, values) if isinstance(o, Tensor) else None for o, t in pairs)


def _aligned_to(output: Tensor, traced: object, masks: Mapping[Node, Tensor], values: Mapping[Node, Any]) -> Tensor:
    parts: list[Tensor] = []
    for source, mask in masks.items():
        sizes, kept = _sizes(values[source], source.meta.get("val")), _sizes(output, traced)
        lost = [dim for dim in range(mask.dim()) if [sizes[dim]] != kept[dim : dim + 1]]
        part = mask.any(lost, keepdim=True) if lost else mask
        parts.append(part.reshape(*part.shape[: output.dim()], *[1] * (output.dim() - part.dim())))
    return reduce(torch.logical_and, parts)


def _sizes(value: Tensor, traced: object) -> list[Any]:
    """Sizes to compare: each with its traced one, a symbol where it is dynamic."""
    symbols = map(str, traced.shape) if isinstance(traced, Tensor) else [""] * value.dim()
    return list(zip(value.shape, symbols, strict=True))


def _blurred(masks: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
    return {node: mask.any().reshape([1] * mask.dim()) for node, mask in masks.items()}


def _position(node: Node, name: str) -> int | None:
    """Position of an op's argument of that name, None if it has none."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return names.index(name) if name in names else None


def _each(mask: Tensor, output: Any) -> Mask:
    """The mask of every output of an op."""
    return mask if isinstance(output, Tensor) else tuple(mask for _ in output)
