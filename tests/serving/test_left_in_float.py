"""Layers that an engine builds without asking how they run get float weights."""

import pytest
import torch
from interop_mixtures import quantized_mixture

import mxcompile
from mxcompile.serving.stored_model import StoredModel

GATE = "model.layers.1.mlp.shared_expert_gate"


@pytest.fixture
def model():
    return quantized_mixture("qwen2", dtype=torch.float32, num_hidden_layers=3, exclude=())


@pytest.fixture
def stored(model, tmp_path):
    model.model.layers[1].mlp.shared_expert_gate = quantized_gate(model)
    mxcompile.save(model, tmp_path / "model")
    return StoredModel(tmp_path / "model")


def quantized_gate(model):
    """A layer with an MX weight; routers are excluded by `quantized_mixture`."""
    projection = model.model.layers[0].self_attn.q_proj
    return (
        torch.nn.utils.skip_init(type(projection), 64, 64, bias=False)
        .requires_grad_(False)
        .apply(lambda layer: setattr(layer, "weight", projection.weight))
    )


def asked_for(stored, layers):
    names = (name.removesuffix(".weight") for name in stored.checkpoint.names.weights)
    return {name for name in names if any(f".layers.{layer}." in name for layer in layers) and name != GATE}


def test_only_layers_that_were_built_here_and_not_asked_for_are_left_in_float(stored):
    assert stored.left_in_float(asked_for(stored, [0, 1, 2])) == {}  # the gate shares a weight that was asked for
    assert stored.left_in_float(asked_for(stored, [1])) == {GATE: f"{GATE}.weight"}
    assert stored.left_in_float(asked_for(stored, [2])) == {}


def test_their_weights_are_decoded_and_their_components_skipped(stored, model):
    (layer,) = stored.left_in_float(asked_for(stored, [1])).values()
    expected = model.get_submodule(GATE).weight.dequantize()
    assert torch.equal(stored.float_weight(layer), expected)
    skipped = [pattern for pattern, new in stored.patterns([layer]).items() if new is None]
    assert any(pattern.search(f"{layer}.scales") for pattern in skipped)
    assert not any(pattern.search(layer) for pattern in skipped)
