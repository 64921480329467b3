"""Packing and unpacking of a cache, decomposed and compiled: bit for bit the operators."""

import pytest
import torch
from crossed import varied
from fused_steps import compiled

from mxcompile.formats import activation_rule
from mxcompile.inductor import why_no_inductor
from mxcompile.ops import DEQUANTIZE, QUANTIZE

pytestmark = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")


def states(dtype, tokens=5, size=64):
    torch.manual_seed(0)
    x = torch.randn(2, 3, tokens, size) * 10.0 ** torch.randint(-6, 7, (2, 3, tokens, 1))
    x[0, 0, 0, :32], x[0, 1, 0, 3], x[1, 0, 0, 40] = 0, torch.inf, torch.nan
    return x.to(dtype)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    varied(["mxint8", "mxint4", "mxint6", "mxfp8_e4m3", "mxfp4"], [torch.bfloat16, torch.float32]),
)
def test_bytes_and_values_are_those_of_the_operators(fmt, dtype):
    rule, x = str(activation_rule(fmt)), states(dtype)

    def there_and_back(x):
        elements, scales = QUANTIZE(x, fmt, rule)
        return elements, scales, DEQUANTIZE(elements, scales, fmt, x.shape[-1], x.dtype)

    results, calls = compiled(there_and_back, x, on_a_gpu=False)
    for result, expected in zip(results, there_and_back(x), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert not {QUANTIZE, DEQUANTIZE} & set(calls)


def test_weights_stay_operators():
    def pack(x):
        return QUANTIZE(x, "mxint8", "floor")[0]

    _, calls = compiled(pack, torch.randn(4, 64), on_a_gpu=False)
    assert QUANTIZE in calls


@pytest.mark.parametrize("fmt", ["mxint8", "mxint6"])
def test_a_prompt_of_any_length(fmt):
    rule = str(activation_rule(fmt))

    def there_and_back(x):
        elements, scales = QUANTIZE(x, fmt, rule)
        return elements, scales, DEQUANTIZE(elements, scales, fmt, x.shape[-1], x.dtype)

    x = states(torch.bfloat16, tokens=7)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 2)
    results, calls = compiled(there_and_back, x, on_a_gpu=False)
    assert not {QUANTIZE, DEQUANTIZE} & set(calls)
    for result, expected in zip(results, there_and_back(x), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
