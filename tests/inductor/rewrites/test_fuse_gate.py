"""Gated products and the rounding after them as one operator: which are, and what stays."""

import pytest
import torch
from fused_steps import compiled
from torch.nn import functional as F

from mxcompile.inductor import why_no_inductor
from mxcompile.ops import GATE_PRODUCT, QUANTIZE_DEQUANTIZE

pytestmark = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")


def rounded(x):
    return QUANTIZE_DEQUANTIZE(x, "mxint8", "floor")


def given(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 96, generator=generator).to(dtype) for _ in range(2)]


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def test_the_gates_of_mlps():
    def step(gate, up):
        return [rounded(f(gate) * up) for f in (F.silu, F.gelu, gelu_tanh, F.relu)] + [rounded(up * F.silu(gate))]

    result, calls = compiled(step, *given())
    assert calls.count(GATE_PRODUCT) == 5
    assert QUANTIZE_DEQUANTIZE not in calls
    for actual, expected in zip(result, step(*given()), strict=True):
        assert torch.equal(actual, expected)


def test_other_products_stay():
    def step(gate, up):
        unrounded = F.silu(gate) * up
        return (
            rounded(F.mish(gate) * up),
            rounded(torch.sigmoid(gate) * up),
            rounded(gate * up),
            rounded(F.silu(gate) * up[:, :1]),
            rounded(F.silu(gate.float()).to(gate.dtype) * (up + gate.amax(-1, keepdim=True)) * 2),
            (rounded(unrounded), unrounded),
        )

    _, calls = compiled(step, *given())
    assert GATE_PRODUCT not in calls


def test_an_activation_that_is_read_again_stays():
    def step(gate, up):
        activated = F.silu(gate)
        return rounded(activated * up), activated

    result, calls = compiled(step, *given())
    expected = step(*given())
    assert torch.equal(result[1], expected[1])
    assert calls.count(GATE_PRODUCT) + calls.count(QUANTIZE_DEQUANTIZE) == 1
