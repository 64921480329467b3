"""trace_without_values and give_values: the program of the module with values, without its values at first."""

import pytest
import torch
from models import build, inputs, llama

from mxcompile.graph.trace import trace
from mxcompile.graph.trace_without_values import give_values, trace_without_values
from mxcompile.tensor.copying import copy_module
from mxcompile.tensor.modules import named_tensors, set_tensors


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_same_program(kind):
    model = llama(2) if kind == "llama" else build(kind)
    expected = trace(model, inputs(kind))
    empty = copy_module(model)
    parameters = dict(empty.named_parameters())
    set_tensors(empty, [(name, torch.empty_like(value, device="meta")) for name, value in parameters.items()])
    program = trace_without_values(empty, inputs(kind), device=torch.device("cpu"))
    weights = [name for name in program.parameter_names() if program.is_parameter(name)]
    assert all(program.stored(name).is_meta for name in weights)
    give_values(program, model)
    assert str(program.graph) == str(expected.graph)
    assert all(program.stored(name).data_ptr() == named_tensors(model)[name].data_ptr() for name in weights)
    assert torch.equal(program(**inputs(kind))["logits"], expected(**inputs(kind))["logits"])
