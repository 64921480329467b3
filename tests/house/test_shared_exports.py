"""Tests share exports of models of one structure: the program is the one that the model's own export gives."""

import importlib

import pytest
import torch
from models import MODELS, build, inputs
from shared_exports import SharedExports
from torch import nn

from mxcompile.graph.printer import print_program
from mxcompile.graph.trace import trace

MODULE = importlib.import_module("mxcompile.graph.trace")


@pytest.fixture
def exported(monkeypatch):
    """The models that were exported themselves."""
    seen, export = [], MODULE._export.export

    def counting(model, inputs):
        seen.append(model)
        return export(model, inputs)

    monkeypatch.setattr(MODULE, "_export", SharedExports(counting))
    return seen


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("mlp", "llama-tied") else [pytest.mark.slow]) for n in MODELS]
)
def test_the_program_is_that_of_the_model_itself(name, exported):
    """Node by node, with the model's own tensors, of which the printed digests tell."""
    trace(build(name), inputs(name))
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    shared = trace(model, inputs(name))
    assert len(exported) == 1
    MODULE._export.active = False
    assert print_program(shared) == print_program(trace(model, inputs(name)))
    assert len(exported) == 2
    own = {name: tensor.data_ptr() for name, tensor in model.named_parameters(remove_duplicate=False)}
    names = own.keys() & set(shared.parameter_names())
    assert names
    assert all(shared.tensor(key).data_ptr() == own[key] for key in names)


def with_hook(model):
    model.up.register_forward_hook(lambda module, args, result: result * 2)


def with_its_own_forward(model):
    model.forward = lambda x, forward=model.forward: forward(x) * 2


def with_another_setting(model):
    model.norm.eps = 0.5


def with_another_class(model):
    model.norm = nn.RMSNorm(64)


def with_another_shape(model):
    model.up, model.down = nn.Linear(64, 96), nn.Linear(96, 64)


def with_one_tensor_twice(model):
    model.down.bias = model.norm.bias


def with_a_tensor_that_is_no_buffer(model):
    model.factor = torch.ones(3)


CHANGES = (
    with_hook,
    with_its_own_forward,
    with_another_setting,
    with_another_class,
    with_another_shape,
    with_one_tensor_twice,
    with_a_tensor_that_is_no_buffer,
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_exported_itself(change, exported):
    trace(build("mlp"), inputs("mlp"))
    model = build("mlp")
    change(model)
    trace(model, inputs("mlp"))
    assert len(exported) == 2


def test_other_inputs_are_exported_themselves(exported):
    for batch in (2, 3):
        trace(build("mlp"), inputs("mlp", batch))
    assert len(exported) == 2
