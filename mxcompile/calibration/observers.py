"""Observers: what calibration measures of a value, batch by batch.

An observer holds plain tensors and can be merged with another of its kind, so that batches may be split over devices.
"""

from typing import Protocol

import torch
from torch import Tensor

from mxcompile.numerics.hadamard import rotate_input
from mxcompile.numerics.importance import floored, token_weights
from mxcompile.numerics.row_slices import row_slices


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


class _ChannelMean:
    """Mean of something over all tokens, for each channel, float32 `[channels]`."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def update(self, x: Tensor) -> None:
        """x: `[..., channels]`; an empty batch changes nothing."""
        if x.numel():
            rows = x.detach().reshape(-1, x.shape[-1])
            self._take(self._total(rows), len(rows))

    def merge(self, other: Observer) -> None:
        """The mean over what both have seen."""
        if isinstance(other, type(self)) and other._sum is not None:
            self._take(other._sum, other._count)

    @property
    def value(self) -> Tensor:
        """Float32 `[channels]`; raises if nothing has been seen."""
        if self._sum is None:
            raise RuntimeError("the observer has seen no data")
        return (self._sum / self._count).float()

    def _total(self, rows: Tensor) -> Tensor:
        """The sum over rows `[tokens, channels]`, float64."""
        raise NotImplementedError

    def _take(self, total: Tensor, count: int) -> None:
        self._sum = total if self._sum is None else self._sum + total
        self._count += count


class ChannelMeanAbs(_ChannelMean):
    """Mean magnitude of each channel (last dimension) over all tokens, float32 `[channels]`."""

    def _total(self, rows: Tensor) -> Tensor:
        return torch.stack([part.abs().double().sum(0) for (part,) in row_slices(rows)]).sum(0)


class ChannelImportance(_ChannelMean):
    """Mean square of each channel (last dimension), float32 `[channels]`, nowhere 0, tokens of great energy capped.

    A token counts with at most four times the median energy of its batch (`importance.token_weights`).
    """

    @property
    def value(self) -> Tensor:
        """Float32 `[channels]`, at least a little everywhere; raises if nothing has been seen."""
        return floored(super().value)

    def _total(self, rows: Tensor) -> Tensor:
        slices = row_slices(rows, token_weights(rows.float()))
        return torch.stack([(part.float().square() * counts).double().sum(0) for part, counts in slices]).sum(0)


class RotatedObserver:
    """Shows another observer the value rotated over blocks of its channels (`hadamard.py`)."""

    def __init__(self, inner: Observer, block: int) -> None:
        self.inner, self.block = inner, block

    def update(self, x: Tensor) -> None:
        """x: `[..., channels]`."""
        self.inner.update(rotate_input(x, self.block))

    def merge(self, other: Observer) -> None:
        """What the other one has shown too."""
        if isinstance(other, RotatedObserver) and other.block == self.block:
            self.inner.merge(other.inner)

    @property
    def value(self) -> Tensor:
        """The inner one's."""
        return self.inner.value


class TokenSample:
    """Up to 512 of a value's tokens, float32 `[tokens, channels]`: the 32 of largest norm, the others drawn evenly.

    The largest are those that attention sinks make; a model breaks if they come out wrong, and few as they are, an even
    draw would miss them. Every token has a key, its norm or a random number, and those with the best keys are kept, so
    that samples of parts of the data merge into a sample of the whole.
    """

    SIZE, LARGEST = 512, 32

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._keys = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        """x: `[..., channels]`; an empty batch changes nothing."""
        if x.numel():
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            self._take(rows, torch.rand(len(rows), generator=self._generator))

    def merge(self, other: Observer) -> None:
        """A sample of what both have seen."""
        if isinstance(other, TokenSample) and other._rows is not None:
            self._take(other._rows, other._keys)

    @property
    def value(self) -> Tensor:
        """Float32 `[tokens, channels]`; raises if nothing has been seen."""
        if self._rows is None:
            raise RuntimeError("the observer has seen no data")
        return self._rows

    def _take(self, rows: Tensor, keys: Tensor) -> None:
        if self._rows is not None:
            rows, keys = torch.cat((self._rows, rows)), torch.cat((self._keys, keys))
        norms = rows.square().sum(-1).cpu()
        order = keys.clone()
        order[norms.argsort(descending=True)[: self.LARGEST]] = -1.0
        kept = order.argsort(stable=True)[: self.SIZE]
        self._rows, self._keys = rows[kept.to(rows.device)], keys[kept]
