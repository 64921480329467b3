"""An order region: the values whose channels must change places together if those of one of them do.

Labels (`factors.py`) say which channel an element belongs to. Channels with one label move together. `cells` are the
sets of channels that may change places: all ops treat the channels of a cell alike.

A matrix that only matmuls, convolutions and embeddings read can be ordered along both dimensions, each for itself
(`axes`); every other value along one.
"""

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.factors import ONE, UNKNOWN, collapsed, merged
from mxcompile.analysis.folds.products import MATMUL_OPERANDS, channels_of, from_channels
from mxcompile.analysis.folds.region import Region
from mxcompile.graph.dataflow import CASTS, SAME_VALUE, TRANSPOSES, effective_readers, operand, swapped_axes
from mxcompile.tensor.weight import MXWeight

aten = torch.ops.aten
CONVOLUTIONS: Final = frozenset(
    {
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
        *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    }
)
MATRIX_OPERAND: Final[dict[str, int]] = {
    **{str(target): operands["w"] for target, operands in MATMUL_OPERANDS.items()},
    **{str(target): 1 for target in CONVOLUTIONS},
    "transformers.grouped_mm_fallback.default": 1,
    "aten.embedding.default": 0,
}
"""Of each op that reads a matrix: the matrix's position among its operands."""
End = tuple[Node, int]
"""(value, dimension): where a contraction reads or writes channels."""


class OrderRegion(Region):
    """Labels of values, and what holds the channels apart.

    axes: labels of a matrix along one of its dimensions, with the matrix's rank.
    """

    maximum_values = 20000

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.axes: dict[End, Tensor] = {}
        self._apart: dict[tuple[Node, int], tuple[Tensor, Tensor]] = {}
        self._matrices: dict[Node, Node | None] = {}

    def keep_apart(self, node: Node, labels: Tensor, dims: Iterable[int], slot: int = 0) -> None:
        """Only channels with equal indices along these dimensions of `labels` may change places.

        slot: tells the node's operands apart.
        """
        index = torch.zeros((1,) * labels.dim(), dtype=torch.long)
        for dim in dims:
            shape = [-1 if axis == dim % labels.dim() else 1 for axis in range(labels.dim())]
            index = index * labels.shape[dim] + torch.arange(labels.shape[dim]).view(shape)
        self._apart.pop((node, slot), None)
        if index.numel() > 1:
            self._apart[node, slot] = labels, index.expand(labels.shape)

    def for_all_sizes(self, labels: Tensor) -> Tensor | None:
        """Rows that the example does not read are in the order of those that it reads."""
        for dim in range(labels.dim()):
            unread = (labels == UNKNOWN).movedim(dim, 0).reshape(labels.shape[dim], -1).all(1)
            labels = collapsed(self.factors, labels, dim) if bool(unread.any()) else labels
        return None if bool((labels == UNKNOWN).any()) else labels

    def channels(self, end: End, batch: int = 0) -> Tensor | None:
        """The labels along a dimension: `[channels]`, with `batch` leading dimensions in front; None if there are none.

        A value that is labelled along other dimensions gets one label along them.
        """
        axis = self._axis(end)
        labels = self.get(end[0]) if axis is None else self.axes.get(axis)
        if labels is None:
            return None
        dim = end[1] if axis is None else axis[1]
        return channels_of(self, self.factors.find(labels), dim, batch)

    def set_channels(self, end: End, channels: Tensor, batch: int = 0) -> None:
        """Require these labels along a dimension."""
        axis = self._axis(end)
        value, dim = end if axis is None else axis
        labels = from_channels(self, channels, self.sizes.shape(value), dim, batch)
        if axis is None:
            self.assign(value, labels, 1)
            return
        before = self.axes.get(axis)
        after = self.factors.find(labels) if before is None else merged(self.factors, before, labels)
        old = None if before is None else self.factors.find(before)
        if old is None or after.shape != old.shape or not torch.equal(after, old):
            self.axes[axis] = after
            roots = [root for root, canonical in self._matrices.items() if canonical is value]
            readers = {reader: None for root in roots for reader in effective_readers(root)}
            self._queue.extend(reader for reader in readers if reader not in self._queue)

    def matrix_names(self, matrix: Node) -> set[str]:
        """The names of a matrix that has labels in `axes`."""
        return {str(root.target) for root, canonical in self._matrices.items() if canonical is matrix}

    def is_matrix(self, value: Node) -> bool:
        """True for a matrix, possibly transposed, of which each dimension has an order of its own."""
        return self._axis((value, 0)) is not None

    def _axis(self, end: End) -> End | None:
        """(matrix, dimension): the axis that a dimension of a matmul's right operand is; None for another value."""
        value, dim = end
        dim %= len(self.sizes.shape(value))
        while value.target in TRANSPOSES or value.target in SAME_VALUE or value.target in CASTS:
            source = value.args[0]
            assert isinstance(source, Node)
            axes = swapped_axes(value, len(self.sizes.shape(source)))
            value, dim = source, dim if axes is None else axes[dim]
        matrix = self._matrix(value)
        return None if matrix is None else (matrix, dim)

    def _matrix(self, root: Node) -> Node | None:
        """The first node that reads the same matrix, if each dimension may get an order of its own."""
        if root not in self._matrices:
            twins = self._twins(root) if root.op == "get_attr" else []
            whole = bool(twins) and all(self._only_contracted(twin) for twin in twins)
            self._matrices |= dict.fromkeys(twins or [root], twins[0] if whole else None)
        return self._matrices[root]

    def _twins(self, root: Node) -> list[Node]:
        name = str(root.target)
        if not self.program.has_tensor(name) or not self.program.is_parameter(name):
            return []
        tensor = self.program.stored(name)
        nodes = [n for n in root.graph.find_nodes(op="get_attr") if self.program.has_tensor(str(n.target))]
        twins = {node: self.program.stored(str(node.target)) for node in nodes}
        return [node for node, twin in twins.items() if node.target == root.target or _shares_memory(twin, tensor)]

    def _only_contracted(self, root: Node) -> bool:
        """True if each reader treats both dimensions as channels, and reads the matrix once."""
        if root.meta["val"].dim() < 2:
            return False
        for reader in effective_readers(root):
            if matrix_of(reader) is None or _passed_on(matrix_of(reader)) is not root:
                return False
            others = [value for value in reader.all_input_nodes if value is not matrix_of(reader)]
            if any(_passed_on(value) is root for value in others):
                return False
        return True

    def cells(self) -> list[Tensor]:
        """The sets of two and more labels that may change places, each ascending; by their first label."""
        count = len(self.factors)
        cell = self.factors.find(torch.arange(count)).eq(torch.arange(count)).long()
        cell[: ONE + 1] = 0
        for labels in (*self.labels.values(), *self.axes.values()):
            cell = _split(cell, self._counts(labels))
        for labels, index in self._apart.values():
            held = labels != UNKNOWN
            _, context = index[held].unique(return_inverse=True)
            ids = self.factors.find(labels)[held]
            pairs = torch.stack((ids, context), 1)
            table = torch.zeros(count, int(context.max()) + 1 if len(context) else 1, dtype=torch.long)
            table.index_put_((pairs[:, 0], pairs[:, 1]), torch.tensor(1), accumulate=True)
            cell = _split(cell, table)
        sets = [torch.nonzero(cell == number).flatten() for number in cell[cell > 0].unique().tolist()]
        return sorted((members for members in sets if len(members) > 1), key=lambda members: int(members[0]))

    def _counts(self, labels: Tensor) -> Tensor:
        ids = self.factors.find(labels).flatten()
        return torch.bincount(ids[ids != UNKNOWN], minlength=len(self.factors))


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, MXWeight) or isinstance(other, MXWeight):
        return one is other
    return one.shape == other.shape and one.data_ptr() == other.data_ptr() != 0  # 0: a meta tensor


def moved(labels: Tensor, source: Tensor) -> Tensor:
    """For every element of a value, the flat index of the element that takes its place.

    labels: of all elements. source: for every label, the label whose elements come to its places; -1 in `labels`:
    stays. The k-th element of one label goes to the place of the k-th element of another.
    """
    flat = labels.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat + 1, minlength=len(source) + 1)
    start = torch.cumsum(counts, 0) - counts
    nth = torch.empty_like(order)
    nth[order] = torch.arange(len(flat)) - start[flat[order] + 1]
    places = order[(start[source[flat.clamp(min=0)] + 1] + nth).clamp(max=len(flat) - 1)]
    return torch.where(flat < 0, torch.arange(len(flat)), places)


def matrix_of(node: Node) -> Node | None:
    """The operand of an op that it reads as a matrix: a matmul's right one, a convolution's weight, an embedding."""
    position = MATRIX_OPERAND.get(str(node.target))
    value = None if position is None else operand(node, position)
    return value if isinstance(value, Node) else None


def _passed_on(value: Node | None) -> Node | None:
    while value is not None and (value.target in TRANSPOSES or value.target in SAME_VALUE or value.target in CASTS):
        value = value.args[0]  # pyright: ignore[reportAssignmentType]
    return value


def _split(cell: Tensor, table: Tensor) -> Tensor:
    """Divide cells by rows of a table `[labels]` or `[labels, n]`; 0 stays the cell of what does not move."""
    table = table.view(len(cell), -1)
    if bool((table[cell > 0] == table[cell > 0][:1]).all()):
        return cell
    _, divided = torch.cat((cell.unsqueeze(1), table), 1).unique(dim=0, return_inverse=True)
    return torch.where(cell > 0, divided + 1, 0)
