"""Importance of each input channel of a weight, and block scales that minimize the importance-weighted error.

Ignoring correlations between channels, rounding a weight changes the output by sum_j h_j (w_j - q_j)^2, where h_j is
the mean square of input channel j. The energy of a token is capped at four times the median: the first token of a
sequence can have a thousand times the energy of the others and would dominate; ignored altogether, it would break.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mxcompile.formats import SCALE_BIAS, SCALE_NAN, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.fast_rounding import in_steps, round_steps_in_place, unit
from mxcompile.numerics.row_slices import row_wise

ENERGY_CAP = 4.0
OFFSETS = (-2, -1, 0, 1)


def token_weights(x: Tensor) -> Tensor:
    """Weights `[tokens, 1]`, at most 1, for the squares of each row of x `[tokens, in]`.

    The median is taken over nonzero tokens, so that padding does not count.
    """
    (energy,) = row_wise(_energy, x)
    if x.numel() and not (torch.isfinite(energy).all() and energy.any()):  # squares beyond float32
        largest = x.abs().amax()
        if torch.isfinite(largest) and largest > 0:
            (energy,) = row_wise(_energy, x.double() / largest.double())
            energy = energy.float()
    median = energy.masked_fill(energy == 0, torch.nan).nanmedian().nan_to_num()
    return (ENERGY_CAP * median / energy.clamp(min=1e-30)).clamp(max=1.0)


def _energy(rows: Tensor) -> tuple[Tensor]:
    return (rows.square().sum(-1, keepdim=True),)


def floored(importance: Tensor) -> Tensor:
    """Mean squares `[in]` with a small lower bound, so that channels unseen in calibration keep sensible weights."""
    return importance.clamp(min=float(importance.mean()) * 1e-6 + 1e-30)


def round_weighted(
    rows: Tensor, importance: Tensor, fmt: MXFormat, offsets: Sequence[int] = OFFSETS
) -> tuple[Tensor, Tensor]:
    """Round a weight to MX values; each block uses the candidate scale with the least weighted squared error.

    rows: `[..., in]`; importance: `[in]`. Candidates: the OCP scale (floor) times 2^offset, by default 1/4, 1/2, 1, 2.
    Returns values `[..., in]` in the dtype of rows (NaN in blocks that are not finite) and E8M0 scales `[..., blocks]`.
    """
    blocks = reference.to_blocks(rows.float(), fmt)
    weights = reference.to_blocks(importance.float(), fmt)
    amax = blocks.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(amax)
    if not finite.all():
        amax, blocks = torch.where(finite, amax, 0.0), torch.where(finite, blocks, 0.0)
    floor = reference.scale_exponents(amax, fmt, ScaleRule.FLOOR)
    largest = reference.largest_exponent(rows.dtype) - fmt.emax
    best, least = floor, torch.full_like(amax, torch.inf)
    for offset in offsets:
        candidate = (floor + offset).clamp(-SCALE_BIAS, largest)  # a larger scale could round up to infinity
        v = in_steps(blocks, candidate, fmt)
        error = round_steps_in_place(v.clone(), fmt).sub_(v).square_().mul_(weights).sum(-1, keepdim=True)
        error *= reference.power_of_two((candidate - floor).clamp(max=30)).square()
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    values = round_steps_in_place(in_steps(blocks, best, fmt), fmt).mul_(reference.power_of_two(best) * unit(fmt))
    if not finite.all():
        values.masked_fill_(~finite, torch.nan)
    scales = torch.where(finite, best + SCALE_BIAS, SCALE_NAN).to(torch.uint8).squeeze(-1)
    return values.flatten(-2)[..., : rows.shape[-1]].to(rows.dtype), scales


def round_rows(
    rows: Tensor,
    fmt: MXFormat,
    rule: ScaleRule,
    importance: Tensor | None = None,
    offsets: Sequence[int] = OFFSETS,
) -> tuple[Tensor, Tensor]:
    """Round a weight to MX values, a few rows at a time; returns the values and the E8M0 scales.

    importance: of the input channels, `[in]`; weights the squared error of the `mse` rule. On the meta device, only the
    shapes of the results.
    """
    if rows.is_meta:
        blocks = fmt.blocks(rows.shape[-1])
        return torch.empty_like(rows), rows.new_empty((*rows.shape[:-1], blocks), dtype=torch.uint8)

    def convert(part: Tensor) -> tuple[Tensor, Tensor]:
        if importance is not None and rule is ScaleRule.MSE:
            return round_weighted(part, importance.to(part.device), fmt, offsets)
        codes, scales = reference.quantize(part, fmt, rule)
        return reference.dequantize(codes, scales, fmt, part.shape[-1], part.dtype), scales

    values, scales = row_wise(convert, rows)
    return values, scales
