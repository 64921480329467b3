"""A decoded weight that autograd saves for the backward pass -> the packed one, decoded again when it is read.

Otherwise a forward pass with gradients would keep all experts of a model in float.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from mxcompile.tensor.weight import MXWeight


@dataclass(frozen=True)
class _View:
    """A view of a weight's decoded values."""

    weight: MXWeight
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def values(self) -> Tensor:
        return self.weight.dequantize().as_strided(self.shape, self.stride, self.offset)


class SavedWeights:
    """The weights that one forward pass decodes; `hooks` must be in force while it runs."""

    def __init__(self) -> None:
        self._decoded: dict[StorageWeakRef, MXWeight] = {}

    def decode(self, weight: MXWeight) -> Tensor:
        """The weight's values."""
        values = weight.dequantize()
        # While a weak reference to a freed storage is held, no other storage gets its identity.
        self._decoded[StorageWeakRef(values.untyped_storage())] = weight
        return values

    def hooks(self) -> saved_tensors_hooks:
        """The context in which autograd saves packed weights."""
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        weight = self._decoded.get(StorageWeakRef(tensor.untyped_storage())) if self._decoded else None
        return tensor if weight is None else _View(weight, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: Tensor | _View) -> Tensor:
    return saved.values() if isinstance(saved, _View) else saved
