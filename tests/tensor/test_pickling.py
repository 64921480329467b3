"""torch.save and torch.load of MX weights, with torch's safe default; hostile files are refused."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from checkpoints import assert_same, deployed, skeleton
from models import build, inputs, output
from torch import nn

import mxcompile
from mxcompile.errors import MXCompileError, WeightError
from mxcompile.tensor.pickling import rebuild_weight
from mxcompile.tensor.weight import MXWeight


def weights(module):
    return [parameter for parameter in module.parameters() if isinstance(parameter, MXWeight)]


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"map_location": "cpu"}], ids=str)
@pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_state_dict_comes_back(name, options, tmp_path):
    torch.save(deployed(name).state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", **options)
    again = copy.deepcopy(deployed(name))
    again.load_state_dict(state)
    assert_same(again, deployed(name))
    fresh = build(name).eval().requires_grad_(False)
    fresh.load_state_dict(state, assign=True)
    assert_same(fresh, deployed(name))
    assert all(isinstance(weight, nn.Parameter) for weight in weights(fresh))


def test_without_values_for_a_skeleton(tmp_path):
    torch.save(deployed("mlp").state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", map_location="meta")
    module = skeleton("mlp").requires_grad_(False)
    module.load_state_dict(state, assign=True)
    assert [weight.layout_ for weight in weights(module)] == [weight.layout_ for weight in weights(deployed("mlp"))]
    assert all(part.is_meta for weight in weights(module) for part in weight.parts)


def test_multipliers_and_rotations(tmp_path):
    both = "{weight=mxfp4,activation=mxfp4}"
    recipe = f"awq-fold{both} | rotate{both} | round-weights{{format=mxfp4}} | lower-mx{both}"
    model = mxcompile.quantize_and_compile(build("gpt2"), inputs("gpt2"), recipe=recipe, compile=False)
    assert any(weight.layout_.rotation for weight in weights(model))
    assert any(weight.layout_.multiplier for weight in weights(model))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh = build("gpt2").eval().requires_grad_(False)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"), assign=True)
    assert_same(fresh, model)


def test_a_whole_module_and_copies(tmp_path):
    model = deployed("mlp")
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (again, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_same(other, model)
        assert list(dict(other.named_parameters())) == list(dict(model.named_parameters()))
        with torch.no_grad():
            assert torch.equal(output(other(**inputs("mlp"))), output(model(**inputs("mlp"))))


def test_a_float_model_needs_assign(tmp_path):
    with pytest.raises(RuntimeError, match=r"requires_grad_\(False\), then load_state_dict\(\.\.\., assign=True\)"):
        build("mlp").load_state_dict(deployed("mlp").state_dict())


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ({"size": 2**40}, {}),
        ({"size": 0}, {}),
        ({"size": 64.0}, {}),
        ({"rotation": 3}, {}),
        ({"multiplier": "absent"}, {}),
        ({"activation": None}, {}),
        ({"format": "mxint77"}, {}),
        ({"rule": "no such rule"}, {}),
        ({}, {"elements": torch.zeros(128, 1, dtype=torch.uint8)}),
        ({}, {"elements": torch.zeros(128, 32)}),
        ({}, {"scales": torch.zeros(2, dtype=torch.uint8)}),
        ({}, {"dtype": torch.int8}),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(layout, change):
    """A file that nobody vouches for must not make a kernel read memory that is not the weight's."""
    weight = weights(deployed("mlp"))[0]
    spec = replace(weight.layout_, **layout)
    fields = spec.format, spec.size, spec.transposed, spec.activation, spec.rule, spec.multiplier, spec.rotation
    values = {"elements": weight.elements, "scales": weight.scales, "dtype": weight.dtype} | change
    parts, dtype = (values["elements"], values["scales"]), values["dtype"]
    with pytest.raises(MXCompileError) as raised:
        rebuild_weight(parts, fields, dtype, False)
    assert "damaged" in str(raised.value) or not isinstance(raised.value, WeightError)
