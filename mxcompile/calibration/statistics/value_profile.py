"""The profile of a value: how unevenly its energy lies in channels, blocks and tokens.

MX pays for large values beside small ones: a block of 32 channels has one scale, set by its largest element. So the
*in-block ratio*, the mean of a block's largest square over the mean square of its elements, is what the error of an
integer format is proportional to: 1 if all elements are equally large, 32 if one element has all the energy.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from mxcompile.calibration.statistics.observers import Observer
from mxcompile.errors import NoDataError
from mxcompile.numerics.importance import token_weights
from mxcompile.numerics.row_slices import row_slices

BLOCK = 32
_TOP_SHARE = 0.01
_TINY = 1e-300


@dataclass(frozen=True)
class Profile:
    """channel_ratio: the largest magnitude of the largest channel over that of the median channel.

    channel_kurtosis, token_kurtosis: excess kurtosis, E[(x - mu)^4] / var^2 - 3, over the channels of a token (mean
    over tokens), and over the tokens of a channel (median over channels); 0 for a normal distribution.
    top_share: share of the energy in the 1 % of channels that have most of it. in_block: the in-block ratio, from 1 to
    32. first_token: energy of the first token of a sequence over that of the median token; 0 where rows are not
    sequences.
    All but the last are of tokens whose energy is capped at four times the median (`importance.token_weights`).
    """

    channel_ratio: float
    channel_kurtosis: float
    token_kurtosis: float
    top_share: float
    in_block: float
    first_token: float

    @classmethod
    def of(cls, statistic: Tensor) -> Self:
        """From the value of a `ValueProfile`."""
        return cls(*statistic.tolist())


class ValueProfile:
    """Observes the `Profile` of a value; its `value` has the profile's fields in order, float64 `[6]`."""

    def __init__(self) -> None:
        self._absmax: Tensor | None = None
        self._moments = torch.empty(0, dtype=torch.float64)  # [4, channels]: sums of the first four powers, float64
        self._sums = torch.zeros(6, dtype=torch.float64)

    def update(self, x: Tensor, weight: float = 1.0) -> None:
        """x: `[..., channels]`, or `[batch, tokens, channels]` for the first token's energy; an empty one adds nothing.

        weight: how much each token counts.
        """
        if not x.numel():
            return
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        capped = token_weights(rows).sqrt()
        moments = torch.zeros(4, rows.shape[-1], dtype=torch.float64, device=rows.device)
        absmax = torch.zeros(rows.shape[-1], dtype=torch.float32, device=rows.device)
        sums = torch.zeros(6, dtype=torch.float64)
        for part, scale in row_slices(rows, capped):
            values = part * scale
            absmax = torch.maximum(absmax, values.abs().amax(0))
            wide = values.double()
            powers = torch.stack([wide, wide.square(), wide**3, wide**4])
            moments += powers.sum(1)
            sums[:3] += torch.stack([*_block_energies(wide), _kurtosis(wide)]).cpu()
        sums[3] = len(rows)
        sums[4:] = _first_tokens(x.detach())
        self._take(absmax, moments * weight, sums * weight)

    def merge(self, other: Observer) -> None:
        """Combine with the profile of another device's batches."""
        if isinstance(other, ValueProfile) and other._absmax is not None:
            self._take(other._absmax, other._moments, other._sums)

    @property
    def value(self) -> Tensor:
        """Float64 `[6]`; raises NoDataError if nothing has been seen."""
        if self._absmax is None:
            raise NoDataError("the observer has seen no data")
        largest, mean, kurtosis, tokens, first, sequences = self._sums.tolist()
        energy = self._moments[1]
        top = energy.topk(max(1, round(_TOP_SHARE * len(energy)))).values.sum()
        profile = Profile(
            channel_ratio=_over_median(self._absmax),
            channel_kurtosis=kurtosis / tokens,
            token_kurtosis=float(_kurtosis_of(self._moments / tokens).median()),
            top_share=float(top / energy.sum().clamp(min=_TINY)),
            in_block=largest / mean if mean else 1.0,
            first_token=first / sequences if sequences else 0.0,
        )
        return torch.tensor([getattr(profile, field.name) for field in fields(profile)], dtype=torch.float64)

    def _take(self, absmax: Tensor, moments: Tensor, sums: Tensor) -> None:
        if self._absmax is None:
            self._absmax, self._moments, self._sums = absmax, moments, sums
        else:
            self._absmax = torch.maximum(self._absmax, absmax)
            self._moments, self._sums = self._moments + moments, self._sums + sums


def _block_energies(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens and blocks: of a block's largest square, and of its mean square. A last block may be shorter."""
    channels = rows.shape[-1]
    blocks = pad(rows.square(), (0, -channels % BLOCK)).unflatten(-1, (-1, BLOCK))
    sizes = torch.full((blocks.shape[-2],), float(BLOCK), dtype=torch.float64, device=rows.device)
    sizes[-1] = channels - BLOCK * (len(sizes) - 1)
    return blocks.amax(-1).sum(), (blocks.sum(-1) / sizes).sum()


def _over_median(absmax: Tensor) -> float:
    """The largest of some magnitudes over the median of those that are not 0; 1 if all are."""
    live = absmax[absmax > 0]
    return float(live.max() / live.median()) if len(live) else 1.0


def _kurtosis(rows: Tensor) -> Tensor:
    """Sum over tokens of the excess kurtosis of each token's channels."""
    centered = rows - rows.mean(-1, keepdim=True)
    variance = centered.square().mean(-1)
    return torch.where(variance > 0, centered.pow(4).mean(-1) / variance.square().clamp(min=_TINY) - 3, 0.0).sum()


def _kurtosis_of(means: Tensor) -> Tensor:
    """Excess kurtosis `[channels]` from the means of the first four powers `[4, channels]`."""
    m1, m2, m3, m4 = means
    variance = (m2 - m1.square()).clamp(min=0)
    fourth = m4 - 4 * m1 * m3 + 6 * m1.square() * m2 - 3 * m1**4
    return torch.where(variance > _TINY, fourth / variance.square().clamp(min=_TINY) - 3, 0.0)


def _first_tokens(x: Tensor) -> Tensor:
    """(sum over sequences of the first token's energy over the median token's, number of sequences), float64 `[2]`."""
    if x.dim() != 3 or x.shape[1] < 2:
        return torch.zeros(2, dtype=torch.float64)
    energy = x.float().square().sum(-1).double()
    ratios = energy[:, 0] / energy.median(-1).values.clamp(min=_TINY)
    return torch.tensor([float(ratios.sum()), float(len(ratios))], dtype=torch.float64)
