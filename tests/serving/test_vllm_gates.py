"""The activations of vLLM's experts, by its own definitions, are the gates that our kernels compute."""

from types import SimpleNamespace

import engines
import pytest
import torch

from mxcompile.errors import CheckpointError

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(engines.why_no_engine), reason=engines.why_no_engine)]
LIMITED = {"swiglu_limit": 3.0, "alpha": 1.5, "beta": 1.0}


def native(kind, x, **fields):
    """What a class of vLLM's layers/activation.py computes in PyTorch."""
    from vllm.model_executor.layers import activation

    layer = object.__new__(getattr(activation, kind))
    vars(layer).update(fields)
    return layer.forward_native(x)


def gate(activation, **fields):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from mxcompile.serving.experts import gate_of

    return gate_of(
        SimpleNamespace(path="model.experts"), SimpleNamespace(activation=MoEActivation(activation), **fields)
    )


@pytest.mark.parametrize(
    ("activation", "options", "kind", "fields"),
    [
        ("silu", {}, "SiluAndMul", {}),
        ("silu", {"swiglu_limit": 3.0}, "SiluAndMulWithClamp", {**LIMITED, "alpha": 1.0, "beta": 0.0}),
        ("gelu", {}, "GeluAndMul", {"approximate": "none"}),
        ("gelu_tanh", {}, "GeluAndMul", {"approximate": "tanh"}),
        ("swigluoai", {}, "SwigluOAIAndMul", {"alpha": 1.702, "limit": 7.0}),
        (
            "swigluoai_uninterleave",
            {"swiglu_limit": 3.0, "swiglu_alpha": 1.5, "swiglu_beta": 1.0},
            "SiluAndMulWithClamp",
            LIMITED,
        ),
    ],
)
def test_a_gate_computes_what_vllm_does(activation, options, kind, fields):
    x = torch.randn(5, 64) * 6
    torch.testing.assert_close(gate(activation, **options)(x), native(kind, x, **fields), rtol=1e-5, atol=1e-5)


def test_an_activation_without_a_gate_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"model\.experts cannot be served: .* the activation relu2_no_mul"):
        gate("relu2_no_mul")
