"""How much each input channel of a weight matters, and block scales chosen accordingly.

The error of a rounded weight in the output is, up to correlations between channels, sum_j h_j (w_j - q_j)^2, h_j the
mean square of input channel j. A token counts with at most four times the median energy: the first token of a sequence
can carry a thousand times the energy of others and would be all that counts; left out altogether it would break.
"""

import torch
from torch import Tensor

from mxcompile import reference
from mxcompile.formats import MXFormat, ScaleRule

ENERGY_CAP = 4.0
_OFFSETS = (-2, -1, 0, 1)


def token_weights(x: Tensor) -> Tensor:
    """`[tokens, 1]`: by how much the squares of each row of `[tokens, in]` count, at most 1."""
    energy = x.square().sum(-1, keepdim=True)
    return (ENERGY_CAP * energy.median() / energy.clamp(min=1e-30)).clamp(max=1.0)


def channel_importance(x: Tensor) -> Tensor:
    """h `[in]` from sampled inputs `[tokens, in]`: mean squares, with capped tokens; at least a little everywhere."""
    mean = (x.square() * token_weights(x)).mean(0)
    return mean.clamp(min=float(mean.mean()) * 1e-6 + 1e-30)


def quantize_weighted(rows: Tensor, importance: Tensor, fmt: MXFormat) -> tuple[Tensor, Tensor]:
    """Codes and scales as `reference.quantize` gives them; of four scales, the one of least weighted squared error.

    rows: `[..., in]`; importance: `[in]`. Scales tried: the OCP one (floor) times 1/4, 1/2, 1 and 2.
    """
    _, floor = reference.quantize(rows, fmt, ScaleRule.FLOOR)
    blocks = reference.to_blocks(rows.float(), fmt)
    weights = reference.to_blocks(importance.float(), fmt)
    best: Tensor | None = None
    chosen = floor
    for offset in _OFFSETS:
        scales = torch.where(floor == 255, floor, (floor.int() + offset).clamp(0, 254).to(torch.uint8))
        codes = reference.quantize_on_scales(rows, scales, fmt)
        values = reference.to_blocks(reference.dequantize(codes, scales, fmt, rows.shape[-1], torch.float32), fmt)
        error = ((values - blocks).square() * weights).sum(-1).nan_to_num(nan=torch.inf)
        better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
        best = error if best is None else torch.where(better, error, best)
        chosen = torch.where(better, scales, chosen)
    return reference.quantize_on_scales(rows, chosen, fmt), chosen
