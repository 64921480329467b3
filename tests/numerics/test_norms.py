"""Norm: the norms of transformer layers as values, against torch's and transformers' own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mxcompile.errors import MXCompileError
from mxcompile.numerics.norms import Norm, parse_norm

DTYPES = [torch.float32, torch.bfloat16]


def rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(3, 4, 96, generator=generator) + 2
    return tuple(part.to(dtype) for part in (x, *torch.randn(2, 96, generator=generator)))


@given(st.floats(1e-12, 1e-3), st.booleans(), st.booleans(), st.sampled_from([0.0, 1.0, 0.5]))
def test_the_text_form_is_read_again(eps, centered, narrowed, offset):
    norm = Norm(eps, centered, narrowed, offset)
    assert parse_norm(str(norm)) == norm


@pytest.mark.parametrize("text", ["", "rms", "rms{narrowed}", "batch{eps=1e-05}", "rms{eps=1e-05,weight=2}"])
def test_an_unknown_text_is_refused(text):
    with pytest.raises(MXCompileError, match="is no norm"):
        parse_norm(text)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_llama(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight, _ = rows(dtype)
    module = LlamaRMSNorm(96, 1e-5).to(dtype)
    module.weight.data = weight
    torch.testing.assert_close(Norm(1e-5, narrowed=True)(x, weight, None), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemma(dtype):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    x, weight, _ = rows(dtype)
    module = Gemma2RMSNorm(96, 1e-5).to(dtype)
    module.weight.data = weight
    torch.testing.assert_close(Norm(1e-5, offset=1.0)(x, weight, None), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(dtype):
    x, weight, bias = rows(dtype)
    eps = torch.finfo(dtype).eps
    expected = F.layer_norm(x, (96,), weight, bias, 1e-5)
    torch.testing.assert_close(Norm(1e-5, centered=True)(x, weight, bias), expected, rtol=eps, atol=8e-7)
