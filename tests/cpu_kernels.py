"""Shared by tests of the CPU kernels: packed weights, an empty cache folder, a skip without a compiler."""

from contextlib import contextmanager

import pytest
import torch

from mxcompile.formats import MXINT8, ScaleRule
from mxcompile.kernels.cpu import build
from mxcompile.numerics import packing, reference

needs_compiler = pytest.mark.skipif(build.why_not(MXINT8) is not None, reason=str(build.why_not(MXINT8)))


def packed(fmt, rows, size, seed=0):
    """Elements, scales and their values in float32, within the range of float16."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-6, 4, (rows, size), generator=generator)
    x = torch.randn(rows, size, generator=generator) * torch.exp2(exponents)
    codes, scales = reference.quantize(x, fmt, ScaleRule.FLOOR)
    return packing.pack(codes, fmt), scales, reference.dequantize(codes, scales, fmt, size, torch.float32)


@contextmanager
def building_in(folder):
    """Clear the cached libraries and build in an empty folder."""
    functions = (build.library, build._why_not)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.platformdirs, "user_cache_dir", lambda *_, **__: str(folder))
        for function in functions:
            function.cache_clear()
        yield
    for function in functions:
        function.cache_clear()
