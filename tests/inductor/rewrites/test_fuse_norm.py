"""Norms, with the sum before them and the rounding after them, as one operator: which are, and what stays the same."""

import pytest
import torch
from fused_steps import compiled
from torch.nn import functional as F

from mxcompile.inductor import why_no_inductor
from mxcompile.ops import ADD_NORM, NORM, QUANTIZE_DEQUANTIZE

pytestmark = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")
SIZE = 64
OURS = (NORM, ADD_NORM, QUANTIZE_DEQUANTIZE)


def rounded(x):
    return QUANTIZE_DEQUANTIZE(x, "mxint8", "floor")


def llama(x, weight, bias=None):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma(x, weight, bias=None):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(x)


def layer(x, weight, bias):
    return F.layer_norm(x, (SIZE,), weight, bias, 1e-5)


def given(dtype=torch.bfloat16, rows=(2, 3)):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(*rows, SIZE, generator=generator).to(dtype) for _ in range(2))
    return x, residual, *torch.randn(2, SIZE, generator=generator).to(dtype)


def assert_close(actual, expected):
    """All but a few values are equal; these are off by a step of the element."""
    assert (actual != expected).double().mean() <= 0.01
    torch.testing.assert_close(actual, expected, rtol=0, atol=expected.abs().max().item() * 2**-6)


@pytest.mark.parametrize("norm", [llama, gemma, layer])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_with_the_sum_before_it(norm, dtype):
    def step(x, residual, weight, bias):
        total = x + residual
        return total, rounded(norm(total, weight, bias)), total * 2

    result, calls = compiled(step, *given(dtype))
    assert [call for call in calls if call in OURS] == [ADD_NORM]
    expected = step(*given(dtype))
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[2], expected[2])
    assert_close(result[1], expected[1])


def test_without_a_sum():
    result, calls = compiled(lambda x, _, weight, bias: rounded(layer(x, weight, bias)), *given())
    assert [call for call in calls if call in OURS] == [NORM]
    x, _, weight, bias = given()
    assert_close(result, rounded(layer(x, weight, bias)))


@pytest.mark.parametrize("norm", [llama, gemma])
def test_a_sum_of_other_shapes_or_dtypes_is_a_norm_alone(norm):
    def step(x, residual, weight, bias):
        return rounded(norm(x + residual[:, :1], weight, bias)), rounded(norm(x + 1.0, weight, bias))

    result, calls = compiled(step, *given())
    assert [call for call in calls if call in OURS] == [NORM, NORM]
    for actual, expected in zip(result, step(*given()), strict=True):
        assert_close(actual, expected)


def test_any_number_of_rows():
    def step(x, residual, weight, bias):
        return rounded(llama(x + residual, weight))

    args = given(rows=(5, 7))
    for part in args[:2]:
        torch._dynamo.mark_dynamic(part, [0, 1])
    result, calls = compiled(step, *args)
    assert [call for call in calls if call in OURS] == [ADD_NORM]
    assert_close(result, step(*given(rows=(5, 7))))


def other_axis(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + 1e-6)).to(x.dtype)


def cubes(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(3).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def of_another(x, weight):
    wide = x.float()
    return weight * (wide.sin() * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def computed_weight(x, weight):
    return llama(x, weight.sin())


def read_twice(x, weight):
    y = llama(x, weight)
    return y + (y.sum() * 0)


@pytest.mark.parametrize("norm", [other_axis, cubes, of_another, computed_weight, read_twice])
def test_other_computations_stay(norm):
    _, calls = compiled(lambda x, _, weight, bias: rounded(norm(x, weight)), *given())
    assert not {NORM, ADD_NORM} & set(calls)


def test_a_norm_that_is_read_unrounded_stays():
    def step(x, residual, weight, bias):
        y = llama(x, weight)
        return rounded(y), y

    _, calls = compiled(step, *given())
    assert not {NORM, ADD_NORM} & set(calls)


def test_on_a_cpu_inductor_keeps_them():
    _, calls = compiled(lambda x, _, weight, bias: rounded(llama(x, weight)), *given(), on_a_gpu=False)
    assert [call for call in calls if call in OURS] == [QUANTIZE_DEQUANTIZE]
