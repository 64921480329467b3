"""Factors and labels: which elements of a value are scaled by which factor.

A label tensor holds, for every element of a value, the id of the factor that it carries, or UNKNOWN if nothing requires
one. It has the value's rank; a dimension along which all elements carry the same factor may have size 1. Ids that turn
out to be the same factor are united. ONE is the constant 1: a factor united with it is pinned and cannot be chosen.
"""

import torch
from torch import Tensor

UNKNOWN = -1
ONE = 0


class InconsistentSizesError(Exception):
    """Labels of one value differ in shape: the sizes assumed for the graph are inconsistent."""


class Factors:
    """A union-find over factor ids; the smallest id names a set. reasons: why each pinned factor is pinned."""

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.long)
        self.reasons: dict[int, str] = {}

    def copy(self) -> "Factors":
        """An independent copy."""
        other = Factors()
        other._parent, other.reasons = self._parent.clone(), dict(self.reasons)
        return other

    def new(self, count: int) -> Tensor:
        """Ids `[count]` of fresh factors."""
        ids = torch.arange(len(self._parent), len(self._parent) + count)
        self._parent = torch.cat((self._parent, ids))
        return ids

    def __len__(self) -> int:
        """The number of ids, ONE included."""
        return len(self._parent)

    def find(self, labels: Tensor) -> Tensor:
        """The labels with every id replaced by the name of its set."""
        return torch.where(labels == UNKNOWN, UNKNOWN, self._parent[labels.clamp(min=0)])

    def unite(self, one: Tensor, other: Tensor) -> None:
        """Unite the factors of elements at the same index; UNKNOWN in either is skipped. Shapes broadcast."""
        try:
            one, other = torch.broadcast_tensors(self.find(one), self.find(other))
        except RuntimeError as error:
            raise InconsistentSizesError(str(error)) from error
        differ = (one != other) & (one != UNKNOWN) & (other != UNKNOWN)
        if not differ.any():
            return
        pairs = torch.stack((one[differ], other[differ]), 1).unique(dim=0).tolist()
        for first, second in pairs:
            low, high = sorted((self._root(first), self._root(second)))
            self._parent[high] = low
        while not torch.equal(flat := self._parent[self._parent], self._parent):
            self._parent = flat

    def pin(self, labels: Tensor, reason: str) -> None:
        """Require that these factors are 1; reason: why."""
        ids = self.find(labels).unique()
        for name in ids[ids > ONE].tolist():
            self.reasons.setdefault(name, reason)
        self.unite(labels, torch.tensor(ONE))

    def _root(self, name: int) -> int:
        while (parent := int(self._parent[name])) != name:
            name = parent
        return name


def merged(factors: Factors, one: Tensor, other: Tensor) -> Tensor:
    """Labels of a value that must carry both: UNKNOWN takes the other's id, two ids are united. Shapes broadcast."""
    factors.unite(one, other)
    return compact(factors.find(torch.maximum(factors.find(one), factors.find(other))))


def collapsed(factors: Factors, labels: Tensor, dim: int) -> Tensor:
    """The labels with size 1 along `dim`; unites the factors of all elements along it."""
    if labels.shape[dim] == 1:
        return labels
    factors.unite(labels, factors.find(labels).amax(dim, keepdim=True))
    return factors.find(labels).amax(dim, keepdim=True)


def compact(labels: Tensor) -> Tensor:
    """The same labels with size 1 along every dimension where they do not vary."""
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, 1) if labels.shape[dim] > 0 else labels
        if labels.shape[dim] > 1 and bool((labels == first).all()):
            labels = first
    return labels


def to_shape(factors: Factors, labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Labels of a broadcast result as labels of an operand of that shape, right-aligned."""
    while labels.dim() > len(shape):
        labels = collapsed(factors, labels, 0).squeeze(0)
    labels = labels.reshape((1,) * (len(shape) - labels.dim()) + tuple(labels.shape))
    for dim, size in enumerate(shape):
        if size == 1:
            labels = collapsed(factors, labels, dim)
    return labels


def from_shape(labels: Tensor, rank: int) -> Tensor:
    """Labels of an operand as labels of a broadcast result of that rank, right-aligned."""
    return labels.reshape((1,) * (rank - labels.dim()) + tuple(labels.shape))
