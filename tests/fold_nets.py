"""Small networks for tests of folds, and a check that a fold preserves their function."""

import torch
from models import output
from torch import Tensor, nn

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import ScaleGroup, find_groups, fold
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.numerics.metrics import sqnr_db

SIZE = 32


REQUIRED_DB = 100  # rounding of the factors and of float32 sums leaves 120 dB and more, a missed reader about 0


LARGEST = 5  # factors are between 2**-5 and 2**5


SHAPES = ((2, 7), (3, 11), (1, 5))


def tokens(batch: int, length: int, *features: int) -> Tensor:
    return torch.randn(batch, length, *(features or (SIZE,)))


def reasons_of(program: Program) -> dict[str, str]:
    """The reason of every matmul that is in no group, by module path (by parameter, in the top module)."""
    misses = find_groups(program, choose(program).matmuls)[1]
    return {miss.matmul.module_path or miss.matmul.parameter: miss.reason for miss in misses}


def folded(program: Program, exponents) -> list[ScaleGroup]:
    """Fold every group found, with factors 2**exponents(count)."""
    groups, _ = find_groups(program, choose(program).matmuls)
    for group in groups:
        fold(program, group, torch.exp2(exponents(group.count)))
    return groups


def any_exponents(count: int) -> Tensor:
    return (torch.rand(count) * 2 - 1) * LARGEST


def whole_exponents(count: int) -> Tensor:
    return torch.randint(-LARGEST, LARGEST + 1, (count,)).float()


def prove(program: Program, *calls) -> list[ScaleGroup]:
    """Fold all groups and check that no call's outputs change. Every output counts on its own."""
    before = [_outputs(program, call) for call in calls]
    groups = folded(program, any_exponents)
    for call, wanted in zip(calls, before, strict=True):
        for one, other in zip(wanted, _outputs(program, call), strict=True):
            assert sqnr_db(one, other) >= REQUIRED_DB
    return groups


def _outputs(program: Program, call) -> list[Tensor]:
    result = program(**call) if isinstance(call, dict) else program(call)
    return list(result) if isinstance(result, tuple) else [output(result)]


def described(group: ScaleGroup) -> str:
    """`64: norm.weight norm.bias -> k.weight v.weight`: number of factors, divided and multiplied parameters."""
    divided, multiplied = (
        [a.parameter + f"+{a.offset:g}" * bool(a.offset) for a in group.absorbers if a.power == power]
        for power in (-1, 1)
    )
    return f"{group.count}: {' '.join(sorted(divided))} -> {' '.join(sorted(multiplied))}"


class Net(nn.Module):
    """x -> function(module, x); the function finds `parts` as attributes of the module. All parameters differ."""

    def __init__(self, function, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def linear(out: int = SIZE, width: int = SIZE, bias: bool = True) -> nn.Linear:
    return nn.Linear(width, out, bias=bias)


def net(function, **parts) -> Program:
    return trace(Net(function, **parts).eval(), tokens(*SHAPES[0]))


def proven(function, **parts) -> list[str]:
    """The groups of such a module, after `prove`."""
    return [described(group) for group in prove(net(function, **parts), *(tokens(*shape) for shape in SHAPES))]


def one(divided: str, multiplied: str, count: int = SIZE) -> list[str]:
    return [f"{count}: {divided} -> {multiplied}"]
