"""The choice of the next token."""

import pytest
import torch

from mxcompile.inductor.generation.sequences import argmax, argmax_of_parts


@pytest.mark.parametrize("parts", [1, 8, 64])
@pytest.mark.parametrize(
    "special", [[], [3.0, 3.0, 3.0], [torch.nan, torch.nan], [torch.inf, torch.nan], [-torch.inf] * 128]
)
def test_argmax_of_parts_is_argmax(parts, special):
    """Of equal ones and of NaN the first, wherever they are."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 128, generator=generator).clamp(max=2)
    for row in scores:
        places = torch.randperm(128, generator=generator)[: len(special)]
        row[places] = torch.tensor(special)
    assert torch.equal(argmax_of_parts(scores.unflatten(-1, (parts, -1))), scores.argmax(-1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [128256, 49152, 50257, 32000 + 4])
def test_argmax_on_a_gpu(size):
    scores = torch.randn(3, size, device="cuda", dtype=torch.bfloat16)  # with many equal ones
    scores[1, size // 3 :: 7] = torch.nan
    assert torch.equal(argmax(scores).cpu(), scores.cpu().argmax(-1))
