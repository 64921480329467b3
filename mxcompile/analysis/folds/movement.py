"""Constraints of ops that only move elements: each element keeps its factor.

The op is run on a tensor of element indices; the result shows where every element came from, whatever the op.
"""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.factors import UNKNOWN, InconsistentSizesError, collapsed, compact, merged
from mxcompile.analysis.folds.region import Region
from mxcompile.graph.dataflow import TRANSPOSES, is_constant, swapped_axes

aten = torch.ops.aten

SPLITS = frozenset(
    {
        *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int),
        *(aten.split.sizes, aten.tensor_split.sections),
    }
)
MOVEMENTS = frozenset(
    {
        *TRANSPOSES,
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
        *(aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default),
        *(aten.expand.default, aten.expand_as.default, aten.view_as.default, aten.reshape_as.default),
        *(aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.movedim.int, aten.movedim.intlist),
        *(aten.cat.default, aten.stack.default, aten.repeat.default, aten.repeat_interleave.self_int),
        *(aten.roll.default, aten.flip.default, aten.constant_pad_nd.default, aten.pad.default),
        operator.getitem,
    }
)
LARGEST = 1 << 24
"""Values with more elements are not followed through a movement other than a transpose."""


def movement_constraint(region: Region, node: Node) -> None:
    """Every result element carries the factor of its source element."""
    call = node.args[0] if node.target is operator.getitem else node
    assert isinstance(call, Node)
    operands: Any = call.args[0] if isinstance(call.args[0], list | tuple) else [call.args[0]]
    sources: list[Node] = list(dict.fromkeys(operands))
    labelled = [value for value in (node, *sources) if region.get(value) is not None]
    if not labelled:
        return
    powers = {region.power[value] for value in labelled}
    reason = _why_not(region, node, call, sources, len(powers))
    if reason is not None:
        for value in labelled:
            region.pin(node, region.labels[value], reason)
        return
    axes = swapped_axes(node, len(region.sizes.shape(sources[0])))
    if axes is not None:
        _transposed(region, node, sources[0], axes)
    else:
        _mapped(region, node, call, sources, powers.pop())


def _why_not(region: Region, node: Node, call: Node, sources: list[Node], powers: int) -> str | None:
    if node is not call and call.target not in SPLITS:
        return f"is a result of {call.target}, which is not linear"
    if powers > 1:
        return "joins values scaled by a factor and by its inverse"
    if node.target in (aten.constant_pad_nd.default, aten.pad.default) and any(node.args[2:]):
        return "pads with something other than zero"
    if sum(torch.Size(region.sizes.shape(source)).numel() for source in sources) > LARGEST:
        return "moves too many elements to follow"
    return None


def _transposed(region: Region, node: Node, source: Node, axes: tuple[int, ...]) -> None:
    labels = region.get(source)
    if labels is not None:
        region.assign(node, labels.permute(axes), region.power[source])
    labels = region.get(node)
    if labels is not None:
        back = [axes.index(dim) for dim in range(len(axes))]
        region.assign(source, labels.permute(back), region.power[node])


def _mapped(region: Region, node: Node, call: Node, sources: list[Node], power: int) -> None:
    shapes = {source: region.sizes.shape(source) for source in sources}
    origin = _origin(region, node, call, shapes)
    flat = torch.cat([_full(region, source, shapes[source]).flatten() for source in sources])
    from_sources = torch.where(origin < 0, UNKNOWN, flat[origin.clamp(min=0)])
    own = region.get(node)
    joint = from_sources if own is None else merged(region.factors, from_sources, own)
    joint = region.factors.find(joint.expand(origin.shape))
    region.assign(node, compact(joint), power)
    inside = origin >= 0
    back = torch.full_like(flat, UNKNOWN).scatter_reduce(0, origin[inside], joint[inside], "amax")
    region.factors.unite(back[origin[inside]], joint[inside])
    start = 0
    for source in sources:
        size = torch.Size(shapes[source]).numel()
        labels = region.factors.find(back[start : start + size]).view(shapes[source])
        whole: Tensor | None = labels
        if _reads_by_size(call) and is_constant(source) and bool((labels == UNKNOWN).any()):
            whole = region.for_all_sizes(labels)
        if whole is None:
            region.pin(node, labels, f"reads as much of %{source.name} as the input is long")
        region.assign(source, compact(labels if whole is None else whole), power)
        start += size


def moved_from(region: Region, node: Node) -> tuple[Tensor, Tensor]:
    """Of an op that moves elements: the index of every result element's source (-1: padding), and the sources' labels.

    The sources of one op are counted through, and so are their labels `[elements]`.
    """
    call = node.args[0] if node.target is operator.getitem else node
    assert isinstance(call, Node)
    operands: Any = call.args[0] if isinstance(call.args[0], list | tuple) else [call.args[0]]
    shapes = {source: region.sizes.shape(source) for source in operands}
    return _origin(region, node, call, shapes), torch.cat(
        [_full(region, source, shape).flatten() for source, shape in shapes.items()]
    )


def _reads_by_size(call: Node) -> bool:
    """True if a size that is known only at run time determines which elements are moved."""
    return any(not isinstance(source.meta.get("val"), Tensor) for source in call.all_input_nodes)


def _origin(region: Region, node: Node, call: Node, shapes: dict[Node, tuple[int, ...]]) -> Tensor:
    """For every element of the result, the index of its source element; -1 for padding."""
    numbered: dict[Node, Tensor] = {}
    start = 0
    for source, shape in shapes.items():
        size = torch.Size(shape).numel()
        numbered[source] = torch.arange(start, start + size).view(shape)
        start += size

    def stand_in(value: Node) -> Any:
        return numbered[value] if value in numbered else torch.zeros(region.sizes.shape(value))

    args, kwargs = region.sizes.arguments(call, stand_in)
    if call.target is aten.constant_pad_nd.default:
        return aten.constant_pad_nd.default(*args[:2], -1)
    if call.target is aten.pad.default:
        return aten.pad.default(*args[:2], "constant", -1)
    try:
        result = call.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    except (RuntimeError, IndexError) as error:
        raise InconsistentSizesError(str(error)) from error
    origin = result[node.args[1]] if node is not call else result
    if tuple(origin.shape) != region.sizes.shape(node):
        raise InconsistentSizesError(f"{tuple(origin.shape)} for {region.sizes.shape(node)} at %{node.name}")
    return origin


def _full(region: Region, value: Node, shape: tuple[int, ...]) -> Tensor:
    labels = region.get(value)
    return torch.full(shape, UNKNOWN) if labels is None else labels.expand(shape)


def index_constraint(region: Region, node: Node) -> None:
    """x[:, index] with run-time indices: all elements that may be picked must carry one factor."""
    source = node.args[0]
    assert isinstance(source, Node)
    indexed = _indexed_dimensions(region, node)
    labels, own = region.get(source), region.get(node)
    if indexed is None:
        for value in (labels, own):
            if value is not None:
                region.pin(node, value, "picks elements with more than one index")
        return
    dim, before, after = indexed
    if labels is not None:
        for axis in range(dim, dim + before):
            labels = collapsed(region.factors, labels, axis)
        shape = (*labels.shape[:dim], *(1,) * after, *labels.shape[dim + before :])
        region.assign(node, labels.reshape(shape), region.power[source])
    if own is not None:
        for axis in range(dim, dim + after):
            own = collapsed(region.factors, own, axis)
        shape = (*own.shape[:dim], *(1,) * before, *own.shape[dim + after :])
        region.assign(source, own.reshape(shape), region.power[node])


def _indexed_dimensions(region: Region, node: Node) -> tuple[int, int, int] | None:
    """Of an indexing op: (first indexed dimension, number of indexed ones, number of dimensions that replace them)."""
    if node.target is aten.index_select.default:
        return int(node.args[1]) % len(region.sizes.shape(node.args[0])), 1, 1  # pyright: ignore
    indices = [(dim, index) for dim, index in enumerate(node.args[1]) if index is not None]  # pyright: ignore
    if len(indices) != 1:
        return None
    dim, index = indices[0]
    rank = len(region.sizes.shape(index))
    return (dim, rank, 1) if index.meta["val"].dtype == torch.bool else (dim, 1, rank)
