"""Observers: statistics of a value, accumulated batch by batch.

An observer holds plain tensors. `merge` adds the batches of another observer of the same kind, so that calibration can
be split over devices or processes and the statistics combined afterwards.

Where tokens of some batches count more than those of others (`WeightedBatch`), `update` gets their weight, too: a mean
is weighted, a sample draws tokens in proportion to their weights, and a maximum is what it is.
"""

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mxcompile.errors import InputError, NoDataError
from mxcompile.numerics.hadamard import rotate_input
from mxcompile.numerics.importance import floored, token_weights
from mxcompile.numerics.row_slices import row_slices


class Observer(Protocol):
    """Accumulates a statistic of a value `[..., channels]`.

    Where a mask hides tokens of a batch, `update` gets the rows of the others, `[tokens, channels]`.
    """

    def update(self, x: Tensor) -> None:
        """Add one batch. All built-in observers also take `weight`, how much each of its tokens counts."""
        ...

    def merge(self, other: "Observer") -> None:
        """Add all batches of another observer of the same kind, which stays as it is.

        For calibration split over devices: each device feeds its share of the batches to its own observer, and the
        merged observer has the statistic of all batches.
        """
        ...

    @property
    def value(self) -> Tensor:
        """The statistic of all batches so far; raises NoDataError if there is none."""
        ...


class ChannelAbsMax:
    """Largest magnitude of each channel (last dimension), float32 `[channels]`."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def update(self, x: Tensor, weight: float = 1.0) -> None:
        """x: `[..., channels]`; an empty batch changes nothing, and neither does a weight."""
        if x.numel():
            self._take(x.detach().abs().reshape(-1, x.shape[-1]).amax(0).to(torch.float32))

    def merge(self, other: Observer) -> None:
        """Combine with the abs-max over another device's batches: the elementwise maximum."""
        if not isinstance(other, ChannelAbsMax) or other._value is not None:
            self._take(other.value)

    @property
    def value(self) -> Tensor:
        """Float32 `[channels]`; raises NoDataError if nothing has been seen."""
        if self._value is None:
            raise NoDataError("the observer has seen no data")
        return self._value

    def _take(self, value: Tensor) -> None:
        self._value = value if self._value is None else torch.maximum(self._value, value)


class _ChannelMean:
    """Weighted mean over all tokens of a quantity of each channel, float32 `[channels]`."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0.0

    def update(self, x: Tensor, weight: float = 1.0) -> None:
        """x: `[..., channels]`; an empty batch changes nothing."""
        if x.numel():
            rows = x.detach().reshape(-1, x.shape[-1])
            self._take(self._total(rows) * weight, len(rows) * weight)

    def merge(self, other: Observer) -> None:
        """Combine with the mean over another device's batches: the mean over all tokens of both."""
        if isinstance(other, type(self)) and other._sum is not None:
            self._take(other._sum, other._count)

    @property
    def value(self) -> Tensor:
        """Float32 `[channels]`; raises NoDataError if nothing has been seen."""
        if self._sum is None:
            raise NoDataError("the observer has seen no data")
        return (self._sum / self._count).float()

    def _total(self, rows: Tensor) -> Tensor:
        """The sum over rows `[tokens, channels]`, float64."""
        raise NotImplementedError

    def _take(self, total: Tensor, count: float) -> None:
        self._sum = total if self._sum is None else self._sum + total
        self._count += count


class ChannelMeanAbs(_ChannelMean):
    """Mean magnitude of each channel (last dimension) over all tokens, float32 `[channels]`."""

    def _total(self, rows: Tensor) -> Tensor:
        return torch.stack([part.abs().double().sum(0) for (part,) in row_slices(rows)]).sum(0)


class ChannelImportance(_ChannelMean):
    """Mean square of each channel (last dimension), float32 `[channels]`, above 0; high-energy tokens are capped.

    A token counts with at most four times the median energy of its batch (`importance.token_weights`).
    """

    @property
    def value(self) -> Tensor:
        """Float32 `[channels]`, with a floor above 0; raises NoDataError if nothing has been seen."""
        return floored(super().value)

    def _total(self, rows: Tensor) -> Tensor:
        slices = row_slices(rows, token_weights(rows.float()))
        return torch.stack([(part.float().square() * counts).double().sum(0) for part, counts in slices]).sum(0)


class BlockMoments(_ChannelMean):
    """Mean of x_b x_b^T over tokens for each run of channels, float32 `[channels / run, run, run]`.

    High-energy tokens are capped as in `ChannelImportance`.
    """

    def __init__(self, run: int) -> None:
        super().__init__()
        self.run = run

    def _total(self, rows: Tensor) -> Tensor:
        def of(part: Tensor, counts: Tensor) -> Tensor:
            runs = part.float().unflatten(-1, (-1, self.run))
            return torch.einsum("tbi,tbj->bij", runs * counts.unsqueeze(-1), runs).double()

        return torch.stack([of(*each) for each in row_slices(rows, token_weights(rows.float()))]).sum(0)


class RotatedObserver:
    """Feeds another observer with the value rotated over blocks of channels (`hadamard.py`)."""

    def __init__(self, inner: Observer, block: int) -> None:
        self.inner, self.block = inner, block

    def update(self, x: Tensor, weight: float = 1.0) -> None:
        """x: `[..., channels]`."""
        observe(self.inner, rotate_input(x, self.block), weight)

    def merge(self, other: Observer) -> None:
        """Merge the inner observers, if both rotate over blocks of the same size."""
        if isinstance(other, RotatedObserver) and other.block == self.block:
            self.inner.merge(other.inner)

    @property
    def value(self) -> Tensor:
        """The value of the inner observer."""
        return self.inner.value


class TokenSample:
    """Up to 512 tokens of a value, float32 `[tokens, channels]`: the 32 of largest norm, the others drawn uniformly.

    The largest tokens are those of attention sinks: a model breaks if they are wrong, and a uniform draw would miss
    them, as they are few. Every token has a random key; the largest tokens and those with the smallest keys are kept,
    so that merged samples are a sample of all the data. A key of u in [0, 1) becomes 1 - (1 - u)^(1 / weight), so that
    tokens are drawn in proportion to their weights (Efraimidis and Spirakis, 2006).
    """

    SIZE, LARGEST = 512, 32

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._keys = torch.empty(0, dtype=torch.float32)
        self._generator = torch.Generator().manual_seed(0)
        self._before = 0.0

    def follow(self, batches: float) -> None:
        """Draw the keys that come after so many batches like the first that is not empty: other processes sample those.

        So the merged samples are the tokens that one observer of all batches would sample, if all are of one kind, and
        masks hide rows of the value as they hide tokens of the batches.
        """
        self._before = batches

    def update(self, x: Tensor, weight: float = 1.0) -> None:
        """x: `[..., channels]`; an empty batch changes nothing."""
        if x.numel():
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            if self._before:
                torch.rand(round(self._before * len(rows)), generator=self._generator, dtype=torch.float32)
                self._before = 0.0
            keys = torch.rand(len(rows), generator=self._generator, dtype=torch.float32)
            self._take(rows, keys if weight == 1 else -torch.expm1(torch.log1p(-keys.double()) / weight).float())

    def merge(self, other: Observer) -> None:
        """Combine with the sample of another device's batches: a sample of all tokens of both."""
        if isinstance(other, TokenSample) and other._rows is not None:
            self._take(other._rows, other._keys)

    @property
    def value(self) -> Tensor:
        """Float32 `[tokens, channels]`; raises NoDataError if nothing has been seen."""
        if self._rows is None:
            raise NoDataError("the observer has seen no data")
        return self._rows

    def _take(self, rows: Tensor, keys: Tensor) -> None:
        if self._rows is not None:
            rows, keys = torch.cat((self._rows, rows)), torch.cat((self._keys, keys))
        norms, order = rows.square().sum(-1).cpu(), keys.clone()
        by_key = keys.argsort(stable=True)  # of equal rows, as of one token, the same are the largest however merged
        largest = by_key[norms[by_key].argsort(descending=True, stable=True)[: self.LARGEST]]
        order[largest] = -1.0
        kept = order.argsort(stable=True)[: self.SIZE]
        self._rows, self._keys = rows[kept.to(rows.device)], keys[kept]


def observe(observer: Observer, rows: Tensor, weight: float) -> None:
    """Add rows `[tokens, channels]` of one batch to an observer, each counted `weight` times.

    Raises InputError for a weight other than 1 if the observer takes none.
    """
    if weight == 1:
        observer.update(rows)
    elif "weight" in inspect.signature(observer.update).parameters:
        cast(Any, observer).update(rows, weight)
    else:
        raise InputError(
            f"calibration batches have weights, and the observer {type(observer).__name__} takes none: give its "
            "`update` a parameter `weight`, or calibrate on windows of one length"
        )


def values_of(observers: Sequence[Observer]) -> list[Tensor]:
    """The values of observers of one value of the graph; empty if no token has reached it."""
    with suppress(NoDataError):
        return [observer.value for observer in observers]
    return []
