"""How much each input channel of a weight matters, and block scales chosen accordingly.

The error of a rounded weight in the output is, up to correlations between channels, sum_j h_j (w_j - q_j)^2, h_j the
mean square of input channel j. A token counts with at most four times the median energy: the first token of a sequence
can carry a thousand times the energy of others and would be all that counts; left out altogether it would break.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mxcompile.formats import SCALE_BIAS, SCALE_NAN, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.fast_rounding import round_steps_in_place, unit
from mxcompile.numerics.row_slices import row_wise

ENERGY_CAP = 4.0
OFFSETS = (-2, -1, 0, 1)


def token_weights(x: Tensor) -> Tensor:
    """`[tokens, 1]`: by how much the squares of each row of `[tokens, in]` count, at most 1.

    The median is that of tokens that are not zero: padding is no measure.
    """
    (energy,) = row_wise(_energy, x)
    median = energy.masked_fill(energy == 0, torch.nan).nanmedian().nan_to_num()
    return (ENERGY_CAP * median / energy.clamp(min=1e-30)).clamp(max=1.0)


def _energy(rows: Tensor) -> tuple[Tensor]:
    return (rows.square().sum(-1, keepdim=True),)


def floored(importance: Tensor) -> Tensor:
    """Mean squares `[in]`, at least a little everywhere: a channel that calibration never saw still has its weights."""
    return importance.clamp(min=float(importance.mean()) * 1e-6 + 1e-30)


def round_weighted(
    rows: Tensor, importance: Tensor, fmt: MXFormat, offsets: Sequence[int] = OFFSETS
) -> tuple[Tensor, Tensor]:
    """A weight as MX values, and the scales: of several scales a block, the one of least weighted squared error.

    rows: `[..., in]`; importance: `[in]`. Scales tried: the OCP one (floor) times 2^offset, by default 1/4, 1/2, 1 and
    2. Returns values `[..., in]` of the rows' dtype (NaN in a block that is not finite), E8M0 scales `[..., blocks]`.
    """
    blocks = reference.to_blocks(rows.float(), fmt)
    weights = reference.to_blocks(importance.float(), fmt)
    amax = blocks.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(amax)
    if not finite.all():
        amax, blocks = torch.where(finite, amax, 0.0), torch.where(finite, blocks, 0.0)
    floor = reference.scale_exponents(amax, fmt, ScaleRule.FLOOR)
    best, least = floor, torch.full_like(amax, torch.inf)
    for offset in offsets:
        candidate = (floor + offset).clamp(-SCALE_BIAS, SCALE_BIAS)
        v = _in_steps(blocks, candidate, fmt)
        error = round_steps_in_place(v.clone(), fmt).sub_(v).square_().mul_(weights).sum(-1, keepdim=True)
        error *= reference.power_of_two((candidate - floor).clamp(max=30)).square()
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    values = round_steps_in_place(_in_steps(blocks, best, fmt), fmt).mul_(reference.power_of_two(best) * unit(fmt))
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
    """A weight as MX values, and the scales, a few rows at a time.

    With the importance of its input channels `[in]`, the `mse` rule's squared error counts by it.
    """

    def convert(part: Tensor) -> tuple[Tensor, Tensor]:
        if importance is not None and rule is ScaleRule.MSE:
            return round_weighted(part, importance.to(part.device), fmt, offsets)
        codes, scales = reference.quantize(part, fmt, rule)
        return reference.dequantize(codes, scales, fmt, part.shape[-1], part.dtype), scales

    values, scales = row_wise(convert, rows)
    return values, scales


def _in_steps(blocks: Tensor, exponent: Tensor, fmt: MXFormat) -> Tensor:
    """Values over their block's scale and the format's unit."""
    return blocks * (reference.power_of_two(-exponent) * (1 / unit(fmt)))
