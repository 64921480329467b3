"""Rounded weights of which a part is trained: the blocks that rounding costs most, or a low-rank change of all.

outliers   blocks with the largest expected error of the output (PreQuant, arXiv 2306.00014)
low rank   w -> round(u + b @ a), b @ a in units of latents' offsets (LoRA, merged at every step as in L4Q)
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mxcompile.calibration.learning.latent_weights import Trained
from mxcompile.calibration.learning.trained_tensors import RoundedWeight, TrainedTensors, TrainedWeights
from mxcompile.formats import SCALE_BIAS
from mxcompile.numerics import reference
from mxcompile.numerics.fast_rounding import steps


class TrainedOutliers(TrainedWeights):
    """blocks: the blocks of each weight that are trained, bool `[out, blocks]`, by name."""

    def __init__(
        self, weights: Mapping[str, RoundedWeight], blocks: Mapping[str, Tensor], bound: float | None = None
    ) -> None:
        super().__init__(weights, Trained.WEIGHTS, bound)
        groups = self.groups.items()
        self._blocks = {first: torch.cat([blocks[n] for n in names]).unsqueeze(-1) for first, names in groups}

    def collect_gradients(self) -> None:
        """Pass on the gradients of the chosen blocks alone."""
        super().collect_gradients()
        for first, blocks in self._blocks.items():
            gradient = self.named[first].grad
            assert gradient is not None
            gradient.mul_(blocks)


class TrainedLowRank(TrainedWeights):
    """The offsets of all elements of a weight are b @ a, `[out, rank]` times `[rank, in]`; b is zero at first."""

    def __init__(self, weights: Mapping[str, RoundedWeight], rank: int, bound: float | None = None) -> None:
        super().__init__(weights, Trained.WEIGHTS, bound)
        self._offsets, self._factors = dict(self.named), dict[str, tuple[Tensor, Tensor]]()
        generator = torch.Generator().manual_seed(0)
        for name, weight in weights.items():
            out, size = weight.rows.shape
            device = weight.rows.device
            a = (torch.randn(rank, size, generator=generator) * rank**-0.5).to(device).requires_grad_()
            self._factors[name] = a, torch.zeros(out, rank, device=device, requires_grad=True)
        factors = {
            f"{name} {part}": f for name, pair in self._factors.items() for part, f in zip("ab", pair, strict=True)
        }
        TrainedTensors.__init__(self, factors)

    def tensors(self) -> dict[str, Tensor]:
        """The weights as they are rounded now."""
        self._multiply()
        return super().tensors()

    def detached(self) -> dict[str, Tensor]:
        """The weights, and their scales."""
        self._multiply()
        return super().detached()

    def collect_gradients(self) -> None:
        """Pass the gradients of the offsets on to the factors."""
        super().collect_gradients()
        for first, names in self.groups.items():
            offsets, size = self._offsets[first], self.weights[first].rows.shape[-1]
            assert offsets.grad is not None
            gradients = offsets.grad.flatten(-2)[:, :size].split([len(self.weights[name].rows) for name in names])
            offsets.grad = None
            for name, gradient in zip(names, gradients, strict=True):
                a, b = self._factors[name]
                a.grad, b.grad = b.detach().mT @ gradient, gradient @ a.detach().mT

    def keep_bounds(self) -> None:
        """Nothing: offsets are bounded where they are computed."""

    @torch.no_grad()
    def _multiply(self) -> None:
        for first, names in self.groups.items():
            products = torch.cat([self._factors[name][1] @ self._factors[name][0] for name in names])
            self._offsets[first].copy_(reference.to_blocks(products, self.weights[first].rounding.format))
        super().keep_bounds()


def costly_blocks(
    weights: Mapping[str, RoundedWeight], importance: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """The share of the blocks of all weights that rounding costs most, bool `[out, blocks]`, by name.

    importance: mean square of each input channel `[in]`, by name. The squared error of an element is that of values
    spread evenly between two neighbours, a twelfth of their distance squared: float weights are not needed.
    """
    costs = {name: _block_costs(weight, importance[name]) for name, weight in weights.items()}
    every = torch.cat([cost.flatten() for cost in costs.values()])
    order = every.argsort(descending=True, stable=True)  # rows of equal scales cost the same
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[order[: max(1, round(share * every.numel()))]] = True
    parts = chosen.split([cost.numel() for cost in costs.values()])
    return {name: part.view_as(costs[name]) for name, part in zip(costs, parts, strict=True)}


def _block_costs(weight: RoundedWeight, importance: Tensor) -> Tensor:
    fmt, scales = weight.rounding.format, weight.rounding.scales.to(weight.rows.device)
    exponents = scales.to(torch.int32).unsqueeze(-1) - SCALE_BIAS
    elements = reference.to_blocks(weight.rows.float(), fmt) * reference.power_of_two(-exponents)
    distances = steps(elements, fmt) * reference.power_of_two(exponents)
    channels = reference.to_blocks(importance.float().to(weight.rows.device), fmt)
    return (distances.square() * channels).sum(-1) / 12
