"""rotations.py: on channels of very different sizes, matrices for blocks leave the smallest errors."""

import rotations
import torch

from mxcompile.formats import MXFP4


def test_errors_by_kind():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 64, generator=generator) * torch.exp(torch.randn(64, generator=generator))
    weight = torch.randn(48, 64, generator=generator) * torch.exp(torch.randn(64, generator=generator))
    errors = rotations.errors_of(x, weight, MXFP4, MXFP4)
    assert {kind for _, kind in errors} == {*rotations.KINDS}
    for rounding in ("rtn", "gptq"):
        assert 0 < errors[rounding, "wush"] < 0.9 * min(errors[rounding, "none"], errors[rounding, "hadamard"])
