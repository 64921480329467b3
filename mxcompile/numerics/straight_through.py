"""Where the gradient passes a rounding unchanged (the straight-through estimator), and where it does not.

An element that its block's scale has put beyond the format's largest number does not follow a small change of its
value, so its gradient is zero. This happens under the scale rules that let the largest elements of a block saturate.
Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", with the mask of clipped values
that quantization-aware training uses (PACT, LSQ).
"""

from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.numerics import reference


def saturated(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """Bool `[..., size]`: the elements of x beyond the largest number of their block; those of NaN blocks are not."""
    scaled, _, _ = reference.scaled_blocks(x, fmt, rule)
    return (scaled.abs() > fmt.max_value).flatten(-2)[..., : x.shape[-1]]


def straight_through(gradient: Tensor, x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """The gradient of x, where `gradient` is that of `quantize_dequantize(x, fmt, rule)`; both `[..., size]`."""
    return gradient.masked_fill(saturated(x, fmt, rule), 0.0)
