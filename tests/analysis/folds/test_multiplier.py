"""insert_multiplier: an explicit multiply in front of matmuls, into which find_groups and fold put factors."""

import copy

import pytest
import torch
from models import build, inputs, output
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import find_groups, fold, representable_factors
from mxcompile.analysis.folds.multiplier import insert_multiplier, multiplier_digest, multiplier_of
from mxcompile.errors import MXCompileError
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.pipeline.pipeline import Pipeline

SIZE = 32
REQUIRED_DB = 100  # rounding of the factors and of float32 sums leaves 120 dB and more, a missed reader about 0
LARGEST = 12  # factors are between 2**-12 and 2**12


class Net(nn.Module):
    """x -> function(module, x), with the given parts for it to use."""

    def __init__(self, function, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def linear() -> nn.Linear:
    return nn.Linear(SIZE, SIZE)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * SIZE**-0.5)


def net(function, x: Tensor, **parts) -> Program:
    return trace(Net(function, **parts).eval(), x)


def absorbers(group) -> str:
    """`divided parameters -> multiplied parameters`"""
    divided, multiplied = (sorted(a.parameter for a in group.absorbers if a.power == power) for power in (-1, 1))
    return f"{' '.join(divided)} -> {' '.join(multiplied)}"


BEFORE = """\
%x = input
%relu = aten.relu(%x)
%linear = aten.linear(%relu, %first_weight, %first_bias)
%linear_1 = aten.linear(%relu, %second_weight, %second_bias)
%mul = aten.mul.Tensor(%linear, %linear_1)
%add = aten.add.Tensor(%relu, %mul)
return (%add,)
"""
AFTER = """\
%x = input
%relu = aten.relu(%x)
%first_weight_input_multiplier = tensor "first.weight_input_multiplier" absmax=1
%relu_multiplied = aten.mul.Tensor(%relu, %first_weight_input_multiplier)
%linear = aten.linear(%relu_multiplied, %first_weight, %first_bias)
%linear_1 = aten.linear(%relu_multiplied, %second_weight, %second_bias)
%mul = aten.mul.Tensor(%linear, %linear_1)
%add = aten.add.Tensor(%relu, %mul)
return (%add,)
"""


def branches() -> Program:
    """Two linears and a residual read one value."""
    return net(
        lambda m, x: (h := F.relu(x)) + m.first(h) * m.second(h), torch.randn(3, SIZE), first=linear(), second=linear()
    )


def graph_text(program: Program) -> str:
    """The graph from its input on, without types, hashes and module paths."""
    lines = [line.partition(" #")[0].partition(" sha=")[0] for line in print_program(program).splitlines()]
    begin = next(i for i, line in enumerate(lines) if line.startswith("%x "))
    calls = [line.split(" = ", 1) for line in lines[begin:] if "_guards_fn" not in line]
    heads = [" = ".join([call[0].split()[0], *call[1:]]) if len(call) > 1 else call[0] for call in calls]
    return "".join(f"{line.rstrip()}\n" for line in heads if line)


def test_graph_before_and_after():
    program = branches()
    assert graph_text(program) == BEFORE
    insert_multiplier(program, choose(program).matmuls)
    assert graph_text(program) == AFTER


def test_ones_change_nothing_and_twice_is_once():
    program, x = branches(), torch.randn(5, SIZE)
    before = program(x)
    product = insert_multiplier(program, choose(program).matmuls)
    text = print_program(program)
    assert torch.equal(program(x), before)
    assert insert_multiplier(program, choose(program).matmuls) is product
    assert print_program(program) == text


IDS, TOKENS = torch.randint(10, (2, 5)), torch.randn(2, 5, SIZE)
VALUES = {
    "an embedding that the residual stream reads": (
        (lambda m, x: (h := m.table(x)) + m.w(h), IDS),
        {"table": nn.Embedding(10, SIZE), "w": linear()},
    ),
    "gelu": ((lambda m, x: m.w(F.gelu(x)), TOKENS), {"w": linear()}),
    "silu, 2-D": ((lambda m, x: m.w(F.silu(x)), TOKENS[0]), {"w": linear()}),
    "softmax": ((lambda m, x: m.w(x.softmax(-1)), TOKENS), {"w": linear()}),
    "an input": ((lambda m, x: m.w(x), TOKENS), {"w": linear()}),
    "addmm": ((lambda m, x: torch.addmm(m.b, F.gelu(x), m.w), TOKENS[0]), {"w": weight(SIZE, 8), "b": weight(8)}),
    "addmm of a residual": ((lambda m, x: torch.addmm(x, x, m.w), TOKENS[0]), {"w": weight(SIZE, SIZE)}),
    "matmul": ((lambda m, x: F.gelu(x) @ m.w, TOKENS), {"w": weight(SIZE, 8)}),
    "bmm": ((lambda m, x: torch.bmm(F.gelu(x), m.w), TOKENS), {"w": weight(2, SIZE, 8)}),
}


@pytest.mark.parametrize("name", VALUES)
def test_find_groups_sees_it_and_extreme_factors_keep_the_function(name):
    (function, x), parts = VALUES[name]
    program = net(function, x, **copy.deepcopy(parts))
    before = program(x)
    product = insert_multiplier(program, choose(program).matmuls)
    (group,), misses = find_groups(program, choose(program).matmuls, through_linears=False)
    weights = sorted(matmul.parameter for matmul in choose(program).matmuls)
    assert absorbers(group) == f"{multiplier_of(program, product)} -> {' '.join(weights)}"
    assert (group.value, group.count, misses) == (product, SIZE, [])
    fold(program, group, torch.exp2((torch.rand(SIZE) * 2 - 1) * LARGEST))
    assert sqnr_db(before, program(x)) >= REQUIRED_DB


def test_experts_of_a_grouped_matmul_share_one_vector(traced):
    program, example = traced("mixtral"), inputs("mixtral")
    before = output(program(**example))
    matmuls = [matmul for matmul in choose(program).matmuls if matmul.parameter.endswith("experts.down_proj")]
    product = insert_multiplier(program, matmuls)
    assert program.tensor(str(multiplier_of(program, product))).shape == (128,)
    (group,) = (g for g in find_groups(program, choose(program).matmuls)[0] if g.value is product)
    assert absorbers(group) == f"{multiplier_of(program, product)} -> {matmuls[0].parameter}"
    fold(program, group, torch.exp2((torch.rand(group.count) * 2 - 1) * LARGEST))
    assert sqnr_db(before, output(program(**example))) >= REQUIRED_DB


def test_another_reader_s_group_may_undo_its_factors_in_a_multiplier():
    """The norm is divided for one linear; the multiplier in front of the other gives the factors back."""
    function, x = lambda m, x: m.one(h := m.norm(x)) + m.two(h), torch.randn(3, SIZE)
    program = net(function, x, norm=nn.RMSNorm(SIZE), one=linear(), two=linear())
    before = program(x)
    insert_multiplier(program, [m for m in choose(program).matmuls if m.parameter == "two.weight"])
    groups, _ = find_groups(program, choose(program).matmuls)
    assert [absorbers(group) for group in groups] == [
        "norm.weight -> one.weight two.weight_input_multiplier",
        "two.weight_input_multiplier -> two.weight",
    ]
    for group in groups:
        fold(program, group, torch.exp2((torch.rand(SIZE) * 2 - 1) * 5))
    assert sqnr_db(before, program(x)) >= REQUIRED_DB


def test_half_precision_takes_powers_of_two_without_any_rounding():
    model, x = Net(lambda m, x: m.w(F.gelu(x)), w=linear()).bfloat16().eval(), torch.randn(3, SIZE).bfloat16()
    program = trace(model, x)
    before = program(x)
    product = insert_multiplier(program, choose(program).matmuls)
    assert program.tensor(str(multiplier_of(program, product))).dtype == torch.bfloat16
    ((group,), _) = find_groups(program, choose(program).matmuls)
    assert group.in_half_precision
    fold(program, group, representable_factors(group, torch.rand(SIZE) + 0.1, power_of_two=False))
    assert torch.equal(program(x), before)


def test_a_user_s_own_multiply_is_none():
    function = lambda m, x: m.w(x * m.scale) + m.v(x * m.gain)  # noqa: E731
    program = net(function, TOKENS, w=linear(), v=linear(), scale=torch.rand(SIZE), gain=weight(SIZE))
    matmuls = choose(program).matmuls
    assert [multiplier_of(program, matmul.activation) for matmul in matmuls] == [None, None]
    own = [matmul.activation for matmul in matmuls]
    for matmul in matmuls:
        product = insert_multiplier(program, [matmul])
        assert product not in own
        assert multiplier_of(program, product) == f"{matmul.parameter}_input_multiplier"


def test_a_name_that_is_taken_gets_a_number():
    program = branches()
    program.set_tensor("first.weight_input_multiplier", torch.zeros(3))
    product = insert_multiplier(program, choose(program).matmuls)
    assert multiplier_of(program, product) == "first.weight_input_multiplier_2"


def test_copies_of_a_program_know_it_too():
    program = branches()
    name = multiplier_of(program, insert_multiplier(program, choose(program).matmuls))
    deep = program.copy()
    deep.graph_module = copy.deepcopy(program.graph_module)
    deep.graph_module.recompile()
    for copied in (program.copy(), deep):
        assert {multiplier_of(copied, matmul.activation) for matmul in choose(copied).matmuls} == {name}


def test_a_multiplier_found_on_a_copy_is_inserted_into_the_program():
    """A pass may try it on a copy, and a fold may be applied again to the program as it was."""
    program = branches()
    trial, matmuls = program.copy(), choose(program).matmuls
    insert_multiplier(trial, matmuls)
    ((group,), _) = find_groups(trial, choose(trial).matmuls)
    fold(trial, group, factors := torch.rand(SIZE) + 0.1)
    assert not any("multiplier" in name for name in program.parameter_names())
    insert_multiplier(program, matmuls)
    fold(program, group, factors)
    assert print_program(program) == print_program(trial)


@pytest.mark.parametrize("pick", [lambda found: found, lambda found: ()], ids=["two values", "none"])
def test_matmuls_of_different_values_are_refused(pick):
    program = net(lambda m, x: m.second(F.relu(m.first(x))), TOKENS, first=linear(), second=linear())
    with pytest.raises(
        MXCompileError, match=r"in front of float matmuls that read one value, these are: (%linear .*|none)"
    ):
        insert_multiplier(program, pick(choose(program).matmuls))


def test_lowered_matmuls_are_refused():
    lowered = Pipeline.parse("lower-mx{weight=mxint4}").run(branches())
    with pytest.raises(MXCompileError, match="in front of float matmuls"):
        insert_multiplier(lowered, choose(lowered).matmuls)


def test_digests_tell_values_apart():
    ones = torch.ones(SIZE, dtype=torch.bfloat16)
    assert multiplier_digest(ones) == multiplier_digest(ones.clone())
    assert multiplier_digest(ones) != multiplier_digest(-ones)


def test_nothing_of_the_model_changes():
    model = build("mlp")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = trace(model, inputs("mlp"))
    insert_multiplier(program, choose(program).matmuls[-1:])
    (*_, group) = find_groups(program, choose(program).matmuls)[0]
    fold(program, group, torch.full((group.count,), 2.0))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
