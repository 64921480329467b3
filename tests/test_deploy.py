"""deploy: the lowered program's decisions, carried into a copy of the user's module, compute the same thing."""

import pytest
import torch
from models import LANGUAGE_MODELS, MODELS, build, inputs, output
from torch import nn

import mxcompile
from mxcompile import Pipeline
from mxcompile.errors import DeployError
from mxcompile.passes.recipes import RECIPES
from mxcompile.storage import stored_bytes
from mxcompile.weight import MXWeight


def quantized(name, recipe="w4a8-mxint", **options):
    model, example = build(name), inputs(name)
    program = mxcompile.trace(model, example, **options)
    lowered = mxcompile.recipes()[recipe].run(program)
    return model, example, lowered, mxcompile.deploy(lowered, model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_agrees_with_its_lowered_program(recipe):
    """Equal: both run the same operators on the same operands."""
    _, example, lowered, deployed = quantized("llama", recipe)
    with torch.no_grad():
        assert torch.equal(output(deployed(**example)), output(lowered(**example)))


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_agrees_with_its_lowered_program(name):
    model, example, lowered, deployed = quantized(name)
    assert type(deployed) is type(model)
    with torch.no_grad():
        assert torch.equal(output(deployed(**example)), output(lowered(**example)))
        longer = inputs(name, batch=3, length=11, seed=1)
        assert torch.equal(output(deployed(**longer)), output(lowered(**longer)))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_only_the_output_head_and_embeddings_stay_float(name):
    _, _, _, deployed = quantized(name)
    float_matrices = [n for n, p in deployed.named_parameters() if p.dim() > 1 and not isinstance(p, MXWeight)]
    assert all("embed" in n or "wte" in n or "wpe" in n or "lm_head" in n for n in float_matrices)


def test_folds_reach_the_norms_of_the_module():
    model, example = build("llama"), inputs("llama")
    program = Pipeline.parse(f"smooth-quant | {RECIPES['w8a8-mxint']}").run(mxcompile.trace(model, example))
    deployed = mxcompile.deploy(program, model)
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(deployed.get_parameter(name), program.tensor(name))
    assert not torch.equal(deployed.get_parameter(name), model.get_parameter(name))


def test_nothing_is_shared_and_nothing_of_the_model_changes():
    model, example = build("llama-tied"), inputs("llama-tied")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lowered = mxcompile.recipes()["w4a8-mxint"].run(mxcompile.trace(model, example))
    deployed = mxcompile.deploy(lowered, model)
    with torch.no_grad():
        for parameter in deployed.parameters():
            if not isinstance(parameter, MXWeight):
                parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not deployed.training
    assert model.config.use_cache
    assert deployed.config.use_cache


def test_a_tied_head_can_be_quantized_alone_or_with_its_embedding():
    alone = quantized("llama-tied", include=["lm_head"])[3]
    assert isinstance(alone.lm_head.weight, MXWeight)
    assert not isinstance(alone.model.embed_tokens.weight, MXWeight)
    both = quantized("llama-tied", include=["lm_head", "model.embed_tokens"])[3]
    assert isinstance(both.model.embed_tokens.weight, MXWeight)
    assert both.model.embed_tokens.weight.elements.data_ptr() == both.lm_head.weight.elements.data_ptr()
    assert stored_bytes(both) < stored_bytes(quantized("llama-tied")[3]) < stored_bytes(alone)


def test_packed_bytes_in_memory():
    """14 % of float32 for the quantized part: 4.25 of 32 bits."""
    model, _, _, deployed = quantized("mlp")
    matrices = sum(p.numel() * 4 for p in model.parameters() if p.dim() == 2)
    assert stored_bytes(model) - stored_bytes(deployed) == matrices * (1 - 4.25 / 32)


def test_a_float_program_is_refused():
    model = build("mlp")
    with pytest.raises(DeployError, match=r"this one is float: end the pipeline with lower-mx"):
        mxcompile.deploy(mxcompile.trace(model, inputs("mlp")), model)


def test_another_model_is_refused():
    _, _, lowered, _ = quantized("mlp")
    with pytest.raises(DeployError, match=r"'up.weight'.*deploy into the model that was traced"):
        mxcompile.deploy(lowered, nn.Linear(3, 4))


def test_one_parameter_in_two_formats_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return self.linear(torch.relu(self.linear(x)))

    model, x = Twice(), torch.randn(2, 64)
    lowered = Pipeline.parse("lower-mx{weight=mxint4,activation=mxint8}").run(mxcompile.trace(model, x))
    assert torch.equal(mxcompile.deploy(lowered, model)(x), lowered(x))
    second = lowered.graph.find_nodes(op="call_function", target=torch.ops.mx.quantize.default)[1]
    second.update_arg(1, "mxint6")
    with pytest.raises(DeployError, match=r"'linear.weight' is used in two ways"):
        mxcompile.deploy(lowered, model)


def test_a_module_that_does_something_else_than_its_trace_is_found_out():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.flip = False

        def forward(self, x):
            y = self.linear(x)
            return -y if self.flip else y

    model, x = Moody(), torch.randn(2, 64)
    lowered = Pipeline.parse("lower-mx{weight=mxint4}").run(mxcompile.trace(model, x))
    model.flip = True
    with pytest.raises(DeployError, match=r"output 0 .* agrees with the lowered program's only to"):
        mxcompile.deploy(lowered, model)
