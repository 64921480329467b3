"""A weight that autograd saves for the backward pass -> how it was made, and it is made again when it is read.

Otherwise a forward pass with gradients would keep all experts of a model in float, and a model that is larger than a
GPU's memory on the GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from mxcompile.tensor.weight import MXWeight


@dataclass(frozen=True)
class _View:
    """A view of a weight's values. make: returns these."""

    make: Callable[[], Tensor]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def values(self) -> Tensor:
        return self.make().as_strided(self.shape, self.stride, self.offset)


class SavedWeights:
    """The weights that one forward pass decodes or fetches; `hooks` must be in force while it runs."""

    def __init__(self) -> None:
        self._made: dict[StorageWeakRef, Callable[[], Tensor]] = {}

    def decode(self, weight: MXWeight) -> Tensor:
        """The weight's values."""
        return self.make(weight.dequantize)

    def make(self, make: Callable[[], Tensor]) -> Tensor:
        """The values of a weight. make: returns them, equal ones at each call."""
        values = make()
        # While a weak reference to a freed storage is held, no other storage gets its identity.
        self._made[StorageWeakRef(values.untyped_storage())] = make
        return values

    def hooks(self) -> saved_tensors_hooks:
        """The context in which autograd saves packed weights."""
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        make = self._made.get(StorageWeakRef(tensor.untyped_storage())) if self._made else None
        return tensor if make is None else _View(make, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: Tensor | _View) -> Tensor:
    return saved.values() if isinstance(saved, _View) else saved
