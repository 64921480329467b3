"""Functions that round activations, values that are hard to round, and how their results are compared."""

import torch
from torch.nn import functional as F

from mxcompile.formats import FORMATS, MXFP4, MXINT8, ScaleRule, floating, integer
from mxcompile.ops import QUANTIZE_DEQUANTIZE

RULES = [rule for rule in ScaleRule if rule not in (ScaleRule.MSE, ScaleRule.T725)]


# A format that no kernel serves has operations, too.
OTHERS = [integer(2), integer(3), floating(1, 2), floating(3, 0), floating(5, 1)]


CASES = [(fmt, rule) for fmt in (*FORMATS.values(), *OTHERS) for rule in RULES] + [(MXFP4, ScaleRule.T725)]


MANY = [*CASES[: len(FORMATS) * len(RULES) : 3], CASES[-1]]
"""Every format of kernels with one or two of the rules: what one compilation takes."""


def rounded(x, fmt, rule):
    return QUANTIZE_DEQUANTIZE(x, str(fmt), str(rule))


def rounded_in_many_ways(x):
    return [rounded(x, fmt, rule) for fmt, rule in MANY]


def hard_values(size, dtype):
    """Rows `[..., size]` of everything that float32 holds: subnormals, huge values, both zeros, Inf and NaN."""
    generator = torch.Generator().manual_seed(0)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    powers = torch.exp2(torch.arange(-149, 128).double()).float()[:, None]
    patterns = integers(-(2**31), 2**31, 200, size).to(torch.int32).view(torch.float32)
    signs = 1.0 - 2.0 * integers(0, 2, 277, size)
    zeros = torch.zeros(8, size)
    zeros[1::2] *= -1
    zeros[0, 0], zeros[1, 1], zeros[2, 2], zeros[3, -1] = float("inf"), float("nan"), float("-inf"), 1e-40
    parts = [
        torch.randn(277, size, generator=generator) * powers,
        powers * signs * integers(0, 65, 277, size) / 32,  # halfway between elements, on thresholds
        (integers(0, 2**24, 277, size).to(torch.int32).view(torch.float32) * signs),
        patterns,
        patterns.nan_to_num(1.0, 1.0, 1.0),
        zeros,
    ]
    return torch.cat(parts).to(dtype)


def assert_same_bits(given, wanted):
    """NaN where NaN is; zeros have their sign."""
    bits = torch.int32 if wanted.dtype == torch.float32 else torch.int16
    assert (given.dtype, given.shape) == (wanted.dtype, wanted.shape)
    assert ((given.view(bits) == wanted.view(bits)) | (given.isnan() & wanted.isnan())).all()


def gated(gate, up):
    return rounded(F.silu(gate) * up, MXINT8, ScaleRule.FLOOR)
