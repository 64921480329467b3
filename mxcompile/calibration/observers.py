"""Observers: what calibration measures of a value, batch by batch.

An observer holds plain tensors and can be merged with another of its kind, so that batches may be split over devices.
"""

from typing import Protocol

import torch
from torch import Tensor


class Observer(Protocol):
    """Sees a value `[..., channels]` once a batch."""

    def update(self, x: Tensor) -> None:
        """Take one batch into account."""
        ...

    def merge(self, other: "Observer") -> None:
        """Take everything into account that another observer of the same kind has seen."""
        ...

    @property
    def value(self) -> Tensor:
        """The statistic so far."""
        ...


class ChannelAbsMax:
    """Largest magnitude of each channel (last dimension), float32 `[channels]`."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """x: `[..., channels]`; an empty batch changes nothing."""
        if x.numel():
            self._take(x.detach().abs().reshape(-1, x.shape[-1]).amax(0).to(torch.float32))

    def merge(self, other: Observer) -> None:
        """The larger of the two, channel by channel."""
        if not isinstance(other, ChannelAbsMax) or other._value is not None:
            self._take(other.value)

    @property
    def value(self) -> Tensor:
        """Float32 `[channels]`; raises if nothing has been seen."""
        if self._value is None:
            raise RuntimeError("the observer has seen no data")
        return self._value

    def _take(self, value: Tensor) -> None:
        self._value = value if self._value is None else torch.maximum(self._value, value)
