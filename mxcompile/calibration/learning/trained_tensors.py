"""Tensors in training: what an optimizer moves, and the tensors of the model that result."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxcompile.calibration.learning.latent_weights import LatentWeight, Trained
from mxcompile.graph.program import Rounding
from mxcompile.numerics.rounding_offsets import unrounded_by

SCALES = " scales"
_SMALLEST_UNIT = 1e-3
_LARGEST_GROUP = 1 << 26  # elements of weights that are rounded together: 256 MiB for each of the tensors on the way


class TrainedTensors(ABC):
    """parameters: what an optimizer moves, by name; float32, with gradients after `collect_gradients`."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.named = dict(parameters)

    @property
    def parameters(self) -> list[Tensor]:
        """What an optimizer moves."""
        return list(self.named.values())

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors as they are trained so far, by name; a loss that reads them can be differentiated."""

    def collect_gradients(self) -> None:  # noqa: B027 - autograd has given them already
        """Give the parameters their gradients, once the loss is differentiated by what `tensors` has returned."""

    def keep_bounds(self) -> None:  # noqa: B027 - there may be none
        """Move parameters that an optimizer has moved too far back to their bounds."""

    def detached(self) -> dict[str, Tensor]:
        """`tensors` without gradients; of rounded weights also the scales, as `name scales`."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}


class TrainedVectors(TrainedTensors):
    """Float tensors, each moved in units of its mean magnitude. bound: the largest move in these units, if any.

    pace: the units of an optimizer's step are so many of these.
    """

    def __init__(self, tensors: Mapping[str, Tensor], bound: float | None = None, pace: float = 1.0) -> None:
        self._tensors, self._bound = tensors, None if bound is None else bound / pace
        self._units = {name: t.abs().float().mean().clamp(min=_SMALLEST_UNIT) * pace for name, t in tensors.items()}
        super().__init__(
            {name: torch.zeros_like(t, dtype=torch.float32, requires_grad=True) for name, t in tensors.items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """Each tensor plus its move."""
        return {n: (t.float() + self._units[n] * self.named[n]).to(t.dtype) for n, t in self._tensors.items()}

    @torch.no_grad()
    def keep_bounds(self) -> None:
        """Bound every move."""
        if self._bound is not None:
            for move in self.parameters:
                move.clamp_(-self._bound, self._bound)


@dataclass(frozen=True)
class RoundedWeight:
    """rows: the MX values `[out, in]`, in the weight's dtype. axis: the dimension of the weight that is contracted."""

    rows: Tensor
    rounding: Rounding
    axis: int

    def unrounded(self) -> Tensor:
        """What was rounded to the rows, float32 `[out, in]`; the rows, if that is not kept."""
        fmt, scales, offsets = self.rounding.format, self.rounding.scales, self.rounding.offsets
        if offsets is None:
            return self.rows
        device = self.rows.device
        return unrounded_by(offsets.to(device), self.rows, scales.to(device), fmt)


class TrainedWeights(TrainedTensors):
    """Rounded weights, by name. Those of equal rows are one `LatentWeight`: a step takes a few launches for all of
    them, not for each. trained, bound: as of `LatentWeight`. groups: their names, by the first."""

    def __init__(self, weights: Mapping[str, RoundedWeight], trained: Trained, bound: float | None = None) -> None:
        self.weights, self.groups = weights, dict[str, list[str]]()
        self._latents, self._rows = dict[str, LatentWeight](), dict[str, Tensor]()
        for names in _alike(weights):
            rows = torch.cat([weights[name].rows for name in names])
            scales = torch.cat([weights[name].rounding.scales.to(rows.device) for name in names])
            fmt = weights[names[0]].rounding.format
            self.groups[names[0]] = names
            unrounded = torch.cat([weights[name].unrounded() for name in names])
            self._latents[names[0]] = LatentWeight(unrounded, rows, scales, fmt, trained, bound)
        super().__init__({first: latent.parameter for first, latent in self._latents.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The weights as they are rounded now."""
        self._rows = {name: rows.requires_grad_() for name, rows in self._parted(LatentWeight.values)}
        return {name: self._stored(name, rows) for name, rows in self._rows.items()}

    def collect_gradients(self) -> None:
        """Pass the gradients of the rounded weights on to their latents, and free those."""
        for first, names in self.groups.items():
            rows = [self._rows.pop(name) for name in names]
            self._latents[first].backward(torch.cat([torch.zeros_like(r) if r.grad is None else r.grad for r in rows]))

    def keep_bounds(self) -> None:
        """Bound all moves."""
        for latent in self._latents.values():
            latent.keep_bound()

    def detached(self) -> dict[str, Tensor]:
        """The weights, and their scales."""
        values = {name: self._stored(name, rows) for name, rows in self._parted(LatentWeight.values)}
        return values | {f"{name}{SCALES}": scales for name, scales in self._parted(LatentWeight.scales)}

    def _parted(self, of_latent: Callable[[LatentWeight], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What a group's latent gives, as parts of its weights."""
        for first, names in self.groups.items():
            sizes = [len(self.weights[name].rows) for name in names]
            yield from zip(names, of_latent(self._latents[first]).split(sizes), strict=True)

    def _stored(self, name: str, rows: Tensor) -> Tensor:
        return rows if self.weights[name].axis == -1 else rows.transpose(-1, -2)


def _alike(weights: Mapping[str, RoundedWeight]) -> list[list[str]]:
    """The names of weights whose rows can be one tensor, of bounded size."""
    groups, sizes = dict[tuple[object, ...], list[list[str]]](), dict[tuple[object, ...], int]()
    for name, weight in weights.items():
        rows = weight.rows
        key = (rows.shape[-1], rows.dtype, rows.device, weight.rounding.format)
        sizes[key] = sizes.get(key, _LARGEST_GROUP) + rows.numel()
        if sizes[key] > _LARGEST_GROUP:
            groups.setdefault(key, []).append([])
            sizes[key] = rows.numel()
        groups[key][-1].append(name)
    return [names for parts in groups.values() for names in parts]


class TrainedTogether(TrainedTensors):
    """Tensors of several kinds, of different names, that are trained at once."""

    def __init__(self, parts: Sequence[TrainedTensors]) -> None:
        self._parts = parts
        super().__init__(_merged(part.named for part in parts))

    def tensors(self) -> dict[str, Tensor]:
        """Those of all kinds."""
        return _merged(part.tensors() for part in self._parts)

    def collect_gradients(self) -> None:
        """Give all parameters their gradients."""
        for part in self._parts:
            part.collect_gradients()

    def keep_bounds(self) -> None:
        """Bound all moves."""
        for part in self._parts:
            part.keep_bounds()

    def detached(self) -> dict[str, Tensor]:
        """Those of all kinds, and the scales of rounded weights."""
        return _merged(part.detached() for part in self._parts)


def _merged(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}
