"""Models prepared for training: equal to the deployed ones to the bit, before training and after it."""

import copy

import pytest
import torch
from models import build, inputs, output, two_layers
from torch import nn

import mxcompile
from mxcompile.errors import ArgumentError, TrainingError, WeightError
from mxcompile.tensor.weight import MXWeight, unfused_matmuls

QUICK = "w4a4-mxfp-quick"
KINDS = ("mlp", "llama", "gpt2", "opt")  # gpt2 has Conv1D, opt and gpt2 biases


def made(name):
    return (two_layers("opt"), inputs("llama")) if name == "opt" else (build(name), inputs(name))


def logits(model, x):
    with torch.no_grad(), unfused_matmuls():
        return output(model(**x))


def train(prepared, x, target, steps=8):
    """Losses of a plain loop."""
    optimizer = torch.optim.AdamW([p for p in prepared.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = (output(prepared(**x)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_the_deployed_model_to_the_bit_before_and_after_training(name):
    model, x = made(name)
    before = copy.deepcopy(model.state_dict())
    prepared = mxcompile.prepare_training(model, x, QUICK)
    assert type(prepared) is type(model)
    assert not any(isinstance(value, MXWeight) for value in prepared.parameters())
    untrained = mxcompile.finish_training(prepared)
    usual = mxcompile.quantize_and_compile(model, x, recipe=QUICK, compile=False)
    expected = logits(prepared, x)
    assert torch.equal(logits(untrained, x), expected)
    assert torch.equal(logits(usual, x), expected)

    losses = train(prepared, x, logits(model, x))
    assert min(losses[1:]) < 0.95 * losses[0]
    trained = mxcompile.finish_training(prepared)
    assert {n for n, p in trained.named_parameters() if isinstance(p, MXWeight)} == {
        n for n, p in usual.named_parameters() if isinstance(p, MXWeight)
    }
    assert torch.equal(logits(trained, x), logits(prepared, x))
    assert not torch.equal(logits(trained, x), expected)
    assert torch.equal(logits(untrained, x), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "recipe",
    [
        "lower-mx{weight=mxint4,activation=mxint8}",  # starts from the float weights
        "smooth-quant | rotate{weight=mxfp4,activation=mxfp4} | lower-mx{weight=mxfp4,activation=mxfp4}",
        "awq-fold{weight=mxint4} | gptq{format=mxint4} | lower-mx{weight=mxint4}",
    ],
)
def test_recipes_that_fold_rotate_and_round(recipe):
    model, x = made("llama")
    prepared = mxcompile.prepare_training(model, x, recipe, calibration=[x])
    usual = mxcompile.quantize_and_compile(model, x, recipe=recipe, calibration=[x], compile=False)
    assert torch.equal(logits(prepared, x), logits(usual, x))
    train(prepared, x, logits(model, x), steps=2)
    assert torch.equal(logits(mxcompile.finish_training(prepared), x), logits(prepared, x))


def test_training_starts_from_float_weights_where_no_pass_rounds_them():
    model, x = made("mlp")
    prepared = mxcompile.prepare_training(model, x, "lower-mx{weight=mxfp4}")
    start = prepared.up.parametrizations.weight.original
    assert torch.equal(start, model.up.weight)
    assert start.data_ptr() != model.up.weight.data_ptr()
    assert not torch.equal(prepared.up.weight, model.up.weight)


def test_gradients_are_those_of_float_linears_of_the_rounded_values():
    model, x = made("mlp")
    prepared = mxcompile.prepare_training(model, x, "lower-mx{weight=mxfp4}").up
    value = torch.randn(5, 64)
    prepared(value).square().sum().backward()
    weight = prepared.weight.detach().requires_grad_()
    nn.functional.linear(value, weight, prepared.bias.detach()).square().sum().backward()
    start = prepared.parametrizations.weight
    beyond = (start.original.abs() > weight.abs()) & (start.original.grad == 0) & (weight.grad != 0)  # saturated
    assert beyond.float().mean() < 0.05
    assert torch.equal(start.original.grad[~beyond], weight.grad[~beyond])


def test_its_state_is_loaded_into_another_one():
    model, x = made("llama")
    one, other = (mxcompile.prepare_training(model, x, QUICK) for _ in range(2))
    train(one, x, logits(model, x), steps=1)
    other.load_state_dict(one.state_dict())
    assert torch.equal(logits(other, x), logits(one, x))


def test_modes_and_frozen_parameters_are_those_of_the_model():
    model, x = made("mlp")
    model.train()
    model.norm.weight.requires_grad_(False)
    prepared = mxcompile.prepare_training(model, x, QUICK)
    assert prepared.training
    assert prepared.up.training
    assert not prepared.norm.weight.requires_grad
    assert prepared.up.parametrizations.weight.original.requires_grad
    deployed = mxcompile.finish_training(prepared)
    assert not deployed.training
    assert prepared.training
    assert not any(value.requires_grad for value in deployed.parameters())
    assert not deployed.up._forward_pre_hooks
    assert type(deployed.up) is nn.Linear


def test_experts_whose_input_is_rounded_are_refused_by_name():
    model, x = made("mixtral")
    with pytest.raises(TrainingError, match=r"experts\.\w+_proj' is multiplied inside the forward of MixtralExperts"):
        mxcompile.prepare_training(model, x, QUICK)
    prepared = mxcompile.prepare_training(model, x, QUICK, exclude=["*.experts.*"], allow_partial=True)
    assert torch.equal(logits(mxcompile.finish_training(prepared), x), logits(prepared, x))


def test_experts_train_where_only_weights_are_rounded():
    model, x = made("mixtral")
    prepared = mxcompile.prepare_training(model, x, "w4a16-mxfp-quick")
    experts = prepared.model.layers[0].mlp.experts
    train(prepared, x, logits(model, x), steps=1)
    assert all(steps.original.grad.abs().max() > 0 for steps in experts.parametrizations.values())
    deployed = mxcompile.finish_training(prepared)
    assert torch.equal(logits(deployed, x), logits(prepared, x))
    assert type(deployed.model.layers[0].mlp.experts) is type(model.model.layers[0].mlp.experts)


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x):
        return self.up(x).argmax(-1)


def test_what_cannot_be_trained_is_named():
    model, x = made("mlp")
    quantized = mxcompile.quantize_and_compile(model, x, recipe=QUICK, compile=False)
    with pytest.raises(TrainingError, match="is quantized already: prepare the float model"):
        mxcompile.prepare_training(quantized, x, QUICK)
    with pytest.raises(TrainingError, match="is compiled: prepare the float model"):
        mxcompile.prepare_training(torch.compile(model), x, QUICK)
    exported = torch.export.export(model, (x["x"],))
    with pytest.raises(TrainingError, match=r"is a graph, as torch\.export makes them"):
        mxcompile.prepare_training(exported.module(), x, QUICK)
    with pytest.raises(ArgumentError, match="model is an ExportedProgram"):
        mxcompile.prepare_training(exported, x, QUICK)
    with pytest.raises(TrainingError, match="no output of Ids is a float tensor"):
        mxcompile.prepare_training(Ids(), x, QUICK)
    with pytest.raises(TrainingError, match="does not lower: end it with lower-mx"):
        mxcompile.prepare_training(model, x, "round-weights{format=mxfp4}")
    with pytest.raises(TrainingError, match="has no weight that rounds"):
        mxcompile.finish_training(model)


def test_weights_that_became_nan_are_named():
    model, x = made("mlp")
    prepared = mxcompile.prepare_training(model, x, QUICK)
    with torch.no_grad():
        prepared.up.parametrizations.weight.original[3, 4] = torch.nan
    with pytest.raises(WeightError, match=r"'up.weight' holds NaN or Inf after training, .* smaller learning rate"):
        mxcompile.finish_training(prepared)


def test_a_model_in_bfloat16_is_warned_of():
    with pytest.warns(UserWarning, match="in which small steps are lost: load the model in float32"):
        prepared = mxcompile.prepare_training(
            build("mlp", torch.bfloat16), {"x": torch.randn(1, 3, 64).bfloat16()}, QUICK
        )
    x = {"x": torch.randn(2, 5, 64).bfloat16()}
    assert torch.equal(logits(mxcompile.finish_training(prepared), x), logits(prepared, x))
