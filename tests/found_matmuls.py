"""A module made of a function, and what `find_matmuls` finds in it."""

import torch
from torch import Tensor, nn

from mxcompile.analysis.matmuls import Matmul, UnquantizedNode, find_matmuls
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace

IN, OUT = 64, 48
FLAT = (torch.randn(10, IN),)


class Weighted(nn.Module):
    """A parameter of the given shape, another of the output's size, and a forward given as a function."""

    def __init__(self, shape, function) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(OUT))
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def find(model: nn.Module, *args: Tensor) -> tuple[Program, list[Matmul], list[UnquantizedNode]]:
    program = trace(model, args or (torch.randn(2, 5, IN),))
    return program, *find_matmuls(program)


def the_matmul(model: nn.Module, *args: Tensor) -> tuple[Program, Matmul]:
    program, found, refusals = find(model, *args)
    assert refusals == []
    (matmul,) = found
    return program, matmul


def the_refusal(model: nn.Module, *args: Tensor) -> UnquantizedNode:
    _, found, refusals = find(model, *args)
    assert found == []
    (refusal,) = refusals
    return refusal
