"""Gate: the gated activation of an expert, its text form, and how a module's own is recognized."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mxcompile.errors import MXCompileError
from mxcompile.numerics.gates import Gate, parse_gate, recognize_gate

GPT_OSS = Gate(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)
CPU = torch.device("cpu")
FUNCTIONS = st.sampled_from(["swish", "gelu", "gelu_tanh", "relu"])


def channels(width: int = 64) -> torch.Tensor:
    return 6 * torch.randn(5, width, generator=torch.Generator().manual_seed(0))


@given(FUNCTIONS, st.floats(0.1, 4), st.none() | st.floats(1, 20), st.sampled_from([0.0, 1.0]), st.booleans())
def test_the_text_form_is_read_again(function, alpha, limit, shift, interleaved):
    gate = Gate(function, alpha, limit, shift, interleaved)
    assert parse_gate(str(gate)) == gate


@pytest.mark.parametrize("text", ["silu", "swish:beta=1.0", ""])
def test_an_unknown_text_is_refused(text):
    with pytest.raises(MXCompileError, match="is no gate"):
        parse_gate(text)


def test_swiglu_is_what_transformers_experts_compute():
    gate, up = channels().chunk(2, dim=-1)
    assert torch.equal(Gate()(channels()), F.silu(gate) * up)


def test_gpt_oss_is_what_its_experts_compute():
    gate, up = channels()[..., ::2], channels()[..., 1::2]
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    assert torch.equal(GPT_OSS(channels()), (up + 1) * (gate * torch.sigmoid(gate * 1.702)))


@pytest.mark.parametrize("width", [2, 64, 4096])
@pytest.mark.parametrize(
    "gate", [Gate(), GPT_OSS, Gate("gelu"), Gate("gelu_tanh"), Gate("relu"), Gate(limit=10.0), Gate(interleaved=True)]
)
def test_a_gate_is_recognized_by_what_it_computes(gate, width):
    recognized = recognize_gate(gate, width, CPU, (1.702, 7.0, 10.0))
    assert recognized is not None
    x = 10 * torch.randn(64, width, generator=torch.Generator().manual_seed(1))
    assert torch.equal(recognized(x), gate(x))
    assert width == 2 or recognized == gate  # of two channels, halves are pairs


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.silu(x[..., ::2]) * x[..., 1::2] * 1.001,
        lambda x: F.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0],
        F.silu,
        lambda x: F.silu(x.chunk(2, -1)[0]) * torch.tanh(x.chunk(2, -1)[1]),
        lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1].clamp(max=20.0),
    ],
)
def test_another_function_is_not_taken_for_a_gate(function):
    assert recognize_gate(function, 64, CPU, (7.0,)) is None
