"""What else is done with a quantized mixture of experts: copied, stored, loaded, cast, trained and exported."""

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from models import build, inputs, output
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM

import mxcompile
from mxcompile.checkpoint.hf.experts import IMPLEMENTATION
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.tensor.weight import MXWeight

RECIPES = ("w4a16-mxfp-quick", "w4a8-mxint-quick")
OTHERS = ("eager", "batched_mm", "grouped_mm")
_IN_A_NEW_PROCESS = """
import sys, torch, {first}
model = {load}
torch.save(model(torch.arange(5)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module", params=RECIPES)
def model(request):
    return mxcompile.quantize_and_compile(build("mixtral"), inputs("mixtral"), recipe=request.param, compile=False)


@torch.no_grad()
def logits(module):
    return output(module(**inputs("mixtral", batch=3, length=11, seed=1)))


def experts(module):
    return module.model.layers[0].mlp.experts


def implementation(module):
    (value,) = set(module.get_experts_implementation().values())
    return value


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(module, folder):
    mxcompile.save(module, folder)
    return mxcompile.load(folder)


def from_pretrained(module, folder):
    module.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


COPIES = {
    "deepcopy": lambda module, folder: copy.deepcopy(module),
    "pickled": lambda module, folder: pickled(module),
    "loaded": loaded,
    "from_pretrained": from_pretrained,
    "cast and back": lambda module, folder: copy.deepcopy(module).to(torch.float64).to(torch.float32),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_runs_our_experts_and_has_the_same_bits(kind, model, tmp_path):
    other = COPIES[kind](model, tmp_path / "model")
    assert implementation(other) == implementation(model) == IMPLEMENTATION
    assert experts(other).mx_gate == "swish"
    assert torch.equal(logits(other), logits(model))
    other.set_experts_implementation("eager")
    assert implementation(model) == IMPLEMENTATION


def test_a_checkpoint_does_not_say_how_its_experts_are_called(model, tmp_path):
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert "experts_implementation" not in path.read_text()
    assert "mx_gate" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mixtral"
    assert AutoConfig.from_pretrained(tmp_path)._experts_implementation is None


@pytest.mark.parametrize("chosen", ["eager", "batched_mm"])
def test_from_pretrained_takes_the_implementation_that_it_is_told(chosen, model, tmp_path):
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=chosen)
    assert implementation(other) == chosen
    assert sqnr_db(logits(model), logits(other)) > 50
    other.set_experts_implementation(IMPLEMENTATION)
    assert torch.equal(logits(other), logits(model))


def test_the_model_of_the_user_and_its_config_stay_as_they_are():
    model = build("mixtral")
    before = copy.deepcopy(vars(model.config)), set(vars(experts(model)))
    deployed = mxcompile.quantize_and_compile(model, inputs("mixtral"), recipe=RECIPES[0], compile=False)
    assert (vars(model.config), set(vars(experts(model)))) == before
    deployed.set_experts_implementation("eager")
    deployed.dequantize()
    assert (vars(model.config), set(vars(experts(model)))) == before


def test_dequantized_it_is_a_model_of_transformers_again(model):
    other = copy.deepcopy(model).dequantize()
    assert implementation(other) == implementation(build("mixtral"))
    assert not hasattr(experts(other), "mx_gate")
    assert not any(isinstance(weight, MXWeight) for weight in other.parameters())
    assert torch.equal(logits(pickled(other)), logits(other))


def test_a_model_made_from_its_config_is_one_of_transformers(model):
    """The config says "mx", which computes with float weights what transformers' own does."""
    other = MixtralForCausalLM(copy.deepcopy(model.config)).eval()
    expected = copy.deepcopy(other)
    expected.set_experts_implementation("grouped_mm")
    assert torch.equal(logits(other), logits(expected))


class Wrapper(nn.Module):
    """Calls a model of transformers."""

    def __init__(self, model) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids):
        return self.inner(input_ids, use_cache=False).logits


def test_a_module_that_holds_a_model_of_transformers(tmp_path):
    ids = inputs("mixtral")["input_ids"]
    deployed = mxcompile.quantize_and_compile(Wrapper(build("mixtral")), ids, recipe=RECIPES[0], compile=False)
    assert implementation(deployed.inner) == IMPLEMENTATION
    mxcompile.save(deployed, tmp_path)
    other = mxcompile.load(tmp_path, model=Wrapper(build("mixtral")))
    assert implementation(other.inner) == IMPLEMENTATION
    with torch.no_grad():
        assert torch.equal(other(ids), deployed(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mx", *OTHERS])
def test_cast_to_half_precision(kind, dtype, model):
    other = copy.deepcopy(model).to(dtype)
    other.set_experts_implementation(kind)
    result = logits(other)
    assert result.dtype == dtype
    error = (result.float() - logits(model)).norm(dim=-1) / logits(model).norm(dim=-1)
    assert error.median() < 0.05  # of tokens whose experts are the same ones


def gradients(module, trained):
    """Of the loss, for the parameters whose names contain `trained`."""
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, MXWeight):
            parameter.requires_grad_(trained in name)
    example = inputs("mixtral", seed=2)
    module.train()(**example, labels=example["input_ids"]).loss.backward()
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
@pytest.mark.parametrize("kind", ["mx", *OTHERS])
def test_adapters_and_routers_learn_through_experts(kind):
    """Their gradients are those of the dequantized model."""
    from peft import LoraConfig, get_peft_model

    recipe = "lower-mx{weight=mxfp4}"
    model = mxcompile.quantize_and_compile(build("mixtral"), inputs("mixtral"), recipe=recipe, compile=False)
    dequantized = copy.deepcopy(model).dequantize()
    model.set_experts_implementation(kind)
    for trained in ("lora_", "gate.weight"):
        wanted, given = (_with_router(copy.deepcopy(module)) for module in (dequantized, model))
        if trained == "lora_":
            options = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            wanted, given = (_same_adapters(get_peft_model(module, options)) for module in (wanted, given))
        expected = gradients(wanted, trained)
        assert expected
        for name, value in gradients(given, trained).items():
            torch.testing.assert_close(value, expected.pop(name), rtol=1e-3, atol=1e-5)
        assert not expected


def _with_router(module):
    """The module with its router in float, as a parameter that can be trained."""
    gate = module.model.layers[0].mlp.gate
    if isinstance(gate.weight, MXWeight):
        gate.weight = nn.Parameter(gate.weight.dequantize())
    return module


def _same_adapters(module):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return module


def test_exported(model, tmp_path):
    path = mxcompile.export(model, inputs("mixtral"), tmp_path / "model.pt2")
    program = torch.export.load(path)
    assert "mx.experts" in str(program.graph)
    example = inputs("mixtral", batch=3, length=11, seed=1)
    assert torch.equal(output(program.module()(**example)), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("model", RECIPES[1:], indirect=True)
@pytest.mark.parametrize(
    ("first", "load"),
    [
        ("transformers", "torch.load(sys.argv[1] + '.pt', weights_only=False)"),
        ("mxcompile, transformers", "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"),
        ("transformers, mxcompile", "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"),
        ("mxcompile", "mxcompile.load(sys.argv[1])"),
    ],
)
def test_in_a_new_process(first, load, model, tmp_path):
    folder, result = tmp_path / "model", tmp_path / "logits.pt"
    model.save_pretrained(folder)
    torch.save(model, f"{folder}.pt")
    code = _IN_A_NEW_PROCESS.format(first=first, load=load)
    subprocess.run([sys.executable, "-c", code, folder, result], check=True, timeout=300)
    with torch.no_grad():
        expected = model(torch.arange(5)[None]).logits
    assert sqnr_db(expected, torch.load(result)) > 50
