"""Constants of a graph: a parameter read by another path keeps its name; one of another model is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.errors import TraceError
from mxcompile.graph.trace import trace

X = torch.randn(4, 32)
OUTSIDE = nn.Linear(32, 32)
TABLE = torch.randn(32)


class Listed(nn.Module):
    """Reads its weights from a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.weights = [self.up.weight, self.down.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weights[0]), self.down.weight) + TABLE


class Outside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OUTSIDE(x)


def test_a_parameter_in_a_list_has_its_name():
    model = Listed()
    program = trace(model, X)
    assert [matmul.parameter for matmul in find_matmuls(program)[0]] == ["up.weight", "down.weight"]
    assert program.tensor("up.weight") is model.up.weight
    assert torch.equal(program(X), model(X))


def test_two_reads_of_one_parameter_are_one_node():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    plain, weight = model[1].forward, model[1].weight
    model[1].forward = lambda x: plain(x) @ weight
    program = trace(model, X)
    assert sorted(program.parameter_names()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert len(program.graph.find_nodes(op="get_attr")) == 4
    assert torch.equal(program(X), model(X))


def test_a_module_outside_of_the_model_is_named():
    with pytest.raises(TraceError) as caught:
        trace(nn.Sequential(nn.Linear(32, 32), Outside()), X)
    assert str(caught.value) == (
        "Sequential cannot be traced: Outside.forward -> OUTSIDE.weight (float32 (32, 32)) is no parameter or buffer "
        "of the model, so that it would stay float, and the result would go on reading it. Assign the module that "
        "holds it to an attribute, and read it from self"
    )
