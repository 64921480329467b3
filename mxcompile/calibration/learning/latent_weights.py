"""Weights in training that are MX values at every step: a float latent behind each element, rounded when it is used.

    w -> 2^e * round(u + d v)        u: the latent in units of the scale 2^e; v: its offset, in units of d

d is the distance of neighbouring elements: around the latent where the direction of rounding is trained, else its mean
over the block. The latents of a block then move alike: by its own distance, the largest elements would move by four
times as much as the smallest in MXFP4, and noise cost more than training gains. Gradients reach the rounded weight
alone. Straight through the rounding, that is also the gradient of the latent, up to the factors 2^e and d.
"""

import math
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from mxcompile.formats import SCALE_BIAS, MXFormat
from mxcompile.numerics import reference
from mxcompile.numerics.fast_rounding import round_steps_in_place, steps, unit

NEAR, FAR = 0.49, 0.25
"""How far a latent may begin from the middle of its interval, in steps: as far as can be, or half as far."""
_EXPONENTS = (-1, 0, 1)


class Trained(Enum):
    """What of a weight is trained: the direction in which each element is rounded, within half a step of where it began
    (AutoRound); its latents, without a bound (LKD); or the exponents of the scales (learned clipping).
    """

    ROUNDING = "rounding"
    WEIGHTS = "weights"
    CLIP = "clip"


class LatentWeight:
    """One weight in training.

    rows: the float weight `[out, in]`. values, scales: how it is rounded at first: MX values `[out, in]` and E8M0 bytes
    `[out, blocks]`. Each latent begins at its float weight, but inside the interval that is rounded to `values`.

    parameter: what an optimizer moves; float32, with a gradient after `backward`.
    """

    def __init__(
        self,
        rows: Tensor,
        values: Tensor,
        scales: Tensor,
        fmt: MXFormat,
        trained: Trained,
        bound: float | None = None,
        inside: float = NEAR,
    ) -> None:
        self._bound = bound
        self._format, self._trained, self._size, self._dtype = fmt, trained, rows.shape[-1], values.dtype
        self._largest = reference.largest_exponent(values.dtype) - fmt.emax
        self._first = scales.to(torch.int32).unsqueeze(-1) - SCALE_BIAS
        self._exponents = self._first
        inverse = reference.power_of_two(-self._first)
        codes = reference.to_blocks(values.float(), fmt) * inverse
        step = steps(codes, fmt)
        moved = (reference.to_blocks(rows.float(), fmt) * inverse - codes).div_(step).clamp_(-inside, inside)
        latent = codes + moved.mul_(step)
        self._latent = torch.where(self._rounded(latent) == codes, latent, codes)
        shape = self._first.shape if trained is Trained.CLIP else self._latent.shape
        self.parameter = torch.zeros(shape, dtype=torch.float32, device=rows.device, requires_grad=True)
        self._means: Tensor | None = None

    def values(self) -> Tensor:
        """The weight as it is rounded now, `[out, in]` in its own dtype, without a gradient."""
        exponents = self._chosen()
        elements = self._rounded(self._moved(exponents)).mul_(reference.power_of_two(exponents))
        return elements.flatten(-2)[..., : self._size].to(self._dtype)

    def scales(self) -> Tensor:
        """E8M0 bytes `[out, blocks]` of `values`."""
        return (self._chosen() + SCALE_BIAS).to(torch.uint8).squeeze(-1)

    def backward(self, gradient: Tensor) -> None:
        """Give the parameter its gradient. gradient: of the loss by `values`, `[out, in]`.

        That of rounding is the sign alone: all offsets move by the same amount.
        """
        blocks = reference.to_blocks(gradient.float(), self._format)
        if self._trained is Trained.ROUNDING:
            self.parameter.grad = blocks.sign_()
        elif self._trained is Trained.WEIGHTS:
            self.parameter.grad = blocks * self._distances() * reference.power_of_two(self._exponents)
        else:
            exponents = self._chosen()
            moved, scale = self._moved(exponents), reference.power_of_two(exponents)
            inside = torch.where(moved.abs() < self._format.max_value, moved, 0.0)
            error = self._rounded(moved) - inside
            self.parameter.grad = (blocks * error * scale).sum(-1, keepdim=True) * math.log(2)

    @torch.no_grad()
    def keep_bound(self) -> None:
        """Move the parameter back to its bound, if it has one."""
        limit = self._bound
        if self._trained is Trained.CLIP:
            limit = 1.0 if limit is None else min(limit, 1.0)
        if limit is not None:
            self.parameter.clamp_(-limit, limit)

    @torch.no_grad()
    def choose_exponents(self, importance: Tensor, choices: Sequence[int] = _EXPONENTS) -> int:
        """Move each block to the scale, at most one power of two from its first, that rounds its latents best.

        importance: mean square of each input channel `[in]`, which weights the squared errors. A block whose scale
        changes begins again with offsets of zero. Returns how many changed.
        """
        weights = reference.to_blocks(importance.float(), self._format)
        moved, now = self._moved(self._exponents), self._exponents
        best, least = now, self._error(moved, now - now, weights)
        for choice in choices:
            candidate = (self._first + choice).clamp(-SCALE_BIAS, self._largest)
            error = self._error(moved, candidate - now, weights)
            best = torch.where(error < least, candidate, best)
            least = torch.minimum(error, least)
        changed = best != now
        self._latent = torch.where(changed, moved * reference.power_of_two(now - best), self._latent)
        self.parameter.masked_fill_(changed, 0.0)
        self._exponents, self._means = best, None
        return int(changed.sum())

    def _error(self, moved: Tensor, shift: Tensor, weights: Tensor) -> Tensor:
        """Weighted squared error of each block if its exponent is changed by `shift`, in units of its scale now."""
        rounded = self._rounded(moved * reference.power_of_two(-shift))
        return (rounded * reference.power_of_two(shift) - moved).square_().mul_(weights).sum(-1, keepdim=True)

    def _chosen(self) -> Tensor:
        """Exponents of the scales, `[out, blocks, 1]`."""
        if self._trained is not Trained.CLIP:
            return self._exponents
        offsets = self.parameter.detach().round().to(torch.int32)
        return (self._first + offsets).clamp(-SCALE_BIAS, self._largest)

    def _moved(self, exponents: Tensor) -> Tensor:
        """Latents with their offsets, in units of scales with these exponents."""
        if self._trained is Trained.CLIP:
            return self._latent * reference.power_of_two(self._first - exponents)
        return torch.addcmul(self._latent, self.parameter.detach(), self._distances())

    def _distances(self) -> Tensor:
        """Units of the offsets, in units of the scales. Means of blocks are kept: a thirty-second of the latents."""
        if self._means is not None:
            return self._means
        distances = steps(self._latent, self._format)
        if self._trained is not Trained.WEIGHTS or not distances.dim():
            return distances
        self._means = distances.mean(-1, keepdim=True)
        return self._means

    def _rounded(self, elements: Tensor) -> Tensor:
        """The nearest elements."""
        step = unit(self._format)
        if step == 1:
            return round_steps_in_place(elements.clone(), self._format)
        return round_steps_in_place(elements / step, self._format).mul_(step)
