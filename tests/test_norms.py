"""find_norm_groups: a norm's scale, its offset, and every matmul that reads it, proven by moving a scale across;
whatever else reads the value keeps the group from being found, with the reason.
"""

import pytest
import torch
from models import inputs, output
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.analysis.choice import choose
from mxcompile.analysis.norms import NormGroup, find_norm_groups
from mxcompile.ledger import Miss
from mxcompile.program import Program
from mxcompile.selection import Selection
from mxcompile.trace import trace

SIZE = 64
# Powers of two move through float32 arithmetic without rounding, but (1 + w) / s - 1 is rounded once, and torch may sum
# in another order for a replaced parameter (it needs no gradient). A missed reader shows as a difference of about 1.
ROUNDING = 1e-5


def groups_of(program: Program) -> tuple[list[NormGroup], list[Miss]]:
    return find_norm_groups(program, choose(program).matmuls)


def described(group: NormGroup) -> tuple[str, str | None, float, list[str]]:
    return group.weight, group.bias, group.offset, [matmul.module_path for matmul in group.consumers]


def move_a_scale(program: Program, group: NormGroup) -> None:
    """Divide the norm's channels by powers of two and multiply the consumers' columns: a group says this is allowed."""
    scale = 2.0 ** torch.randint(-2, 3, (SIZE,))
    program.set_tensor(group.weight, (program.tensor(group.weight) + group.offset) / scale - group.offset)
    if group.bias is not None:
        program.set_tensor(group.bias, program.tensor(group.bias) / scale)
    for matmul in group.consumers:
        rows = matmul.rows(program.tensor(matmul.parameter)) * scale
        program.set_tensor(matmul.parameter, matmul.rows(rows))


class Norm(nn.Module):
    """x -> function(module, module.norm(x)), with two square linears for it to use."""

    def __init__(self, function, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.RMSNorm(SIZE)
        self.first = nn.Linear(SIZE, SIZE)
        self.second = nn.Linear(SIZE, SIZE)
        self.function = function
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.norm(x))


def traced_norm(function, norm: nn.Module | None = None) -> Program:
    return trace(Norm(function, norm), torch.randn(2, 5, SIZE))


def reason_of(function, norm: nn.Module | None = None) -> str:
    """The reason why `first` is in no group."""
    groups, misses = groups_of(traced_norm(function, norm))
    assert groups == []
    (reason,) = {miss.reason for miss in misses if miss.where.endswith("first")}
    return reason


# Groups


LAYER = "model.layers.0."
QKV = [f"{LAYER}self_attn.{n}_proj" for n in "qkv"]
GATED = [f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.up_proj"]
RMS = [
    (f"{LAYER}input_layernorm.weight", None, 0.0, QKV),
    (f"{LAYER}post_attention_layernorm.weight", None, 0.0, GATED),
]
EXPECTED = {
    "mlp": [("norm.weight", "norm.bias", 0.0, ["up"])],
    "llama": RMS,
    "gemma": [(weight, bias, 1.0, readers) for weight, bias, _, readers in RMS],
    "gpt2": [
        ("transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias", 0.0, ["transformer.h.0.attn.c_attn"]),
        ("transformer.h.0.ln_2.weight", "transformer.h.0.ln_2.bias", 0.0, ["transformer.h.0.mlp.c_fc"]),
    ],
    "vit": [
        (
            "layers.0.layernorm_before.weight",
            "layers.0.layernorm_before.bias",
            0.0,
            [f"layers.0.attention.{n}_proj" for n in "qkv"],
        ),
        ("layers.0.layernorm_after.weight", "layers.0.layernorm_after.bias", 0.0, ["layers.0.mlp.fc1"]),
    ],
    "mixtral": RMS[:1],
    "bert": [],
    "cnn": [],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_models(name, traced):
    groups, misses = groups_of(traced(name))
    assert [described(group) for group in groups] == EXPECTED[name]
    grouped = {matmul.node for group in groups for matmul in group.consumers}
    assert len(misses) + len(grouped) == len(choose(traced(name)).matmuls)


@pytest.mark.parametrize("name", [name for name, groups in EXPECTED.items() if groups])
def test_a_scale_can_be_moved_across(name, traced):
    program, x = traced(name), inputs(name, 3, 5, seed=1)
    before = output(program(**x))
    weights = {name: program.tensor(name) for name in program.parameter_names()}
    for group in groups_of(program)[0]:
        move_a_scale(program, group)
    assert sum(program.tensor(name) is not tensor for name, tensor in weights.items()) > 1
    torch.testing.assert_close(output(program(**x)), before, rtol=0, atol=ROUNDING)


NORMS = {
    "nn.RMSNorm": nn.RMSNorm(SIZE),
    "nn.LayerNorm": nn.LayerNorm(SIZE),
    "nn.LayerNorm without bias": nn.LayerNorm(SIZE, bias=False),
}
READERS = {
    "two readers": lambda m, h: m.first(h) + m.second(h),
    "other tokens": lambda m, h: m.first(h[:, 1:]) + m.second(h[:, :1]),
    "one token": lambda m, h: m.first(h[:, -1]),
    "reshaped": lambda m, h: m.first(h.reshape(-1, SIZE)),
    "flattened": lambda m, h: m.first(h.flatten(0, 1)),
    "cast there and back": lambda m, h: m.first(h.double().float()),
    "unsqueezed": lambda m, h: m.first(h.unsqueeze(1)),
    "dropped out": lambda m, h: m.first(F.dropout(h, 0.5, m.training)),
    "functional": lambda m, h: h @ m.first.weight.t(),
}


@pytest.mark.parametrize(
    ("norm", "readers"),
    [*(("nn.RMSNorm", readers) for readers in READERS), *((norm, "two readers") for norm in NORMS if "Layer" in norm)],
)
def test_readers_that_keep_channels_last(norm, readers):
    model = Norm(READERS[readers], NORMS[norm]).eval()
    program, x = trace(model, torch.randn(2, 5, SIZE)), torch.randn(3, 7, SIZE)
    (group,), misses = groups_of(program)
    assert misses == []
    assert (group.weight, group.bias) == ("norm.weight", "norm.bias" if norm == "nn.LayerNorm" else None)
    before = program(x)
    move_a_scale(program, group)
    torch.testing.assert_close(program(x), before, rtol=0, atol=ROUNDING)


class Scale(nn.Module):
    """weight -> factor of x."""

    def __init__(self, factor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * self.factor(self.weight)


@pytest.mark.parametrize(
    ("factor", "offset"),
    [
        (lambda w: w, 0.0),
        (lambda w: w.double().float(), 0.0),
        (lambda w: 1.0 + w, 1.0),
        (lambda w: w + 1, 1.0),
        (lambda w: (1.0 + w.double()).float(), 1.0),
    ],
    ids=["w", "cast", "1.0 + w", "w + 1", "cast 1 + w"],
)
def test_factors_that_are_a_weight(factor, offset):
    (group,), _ = groups_of(traced_norm(lambda m, h: m.first(h), Scale(factor)))
    assert (group.weight, group.offset) == ("norm.weight", offset)


@pytest.mark.parametrize(
    "factor",
    [lambda w: w + 2, lambda w: 1 + (1 + w), lambda w: 1 - w, lambda w: w.exp(), lambda w: torch.add(w, 1, alpha=2)],
    ids=["w + 2", "1 + (1 + w)", "1 - w", "exp", "alpha"],
)
def test_factors_that_are_none(factor):
    assert reason_of(lambda m, h: m.first(h), Scale(factor)) == (
        "its input %mul comes from aten.mul.Tensor, not from a norm with a weight"
    )


def test_a_matrix_is_no_channel_weight():
    norm = Scale(lambda w: w)
    norm.weight = nn.Parameter(torch.ones(5, SIZE))
    assert "not from a norm with a weight" in reason_of(lambda m, h: m.first(h), norm)


def test_a_learned_scalar_is_no_channel_weight():
    norm = Scale(lambda w: w)
    norm.weight = nn.Parameter(torch.ones(1))
    assert "not from a norm with a weight" in reason_of(lambda m, h: m.first(h), norm)


# Which groups


def test_the_final_norm_is_in_no_wanted_group(traced):
    program = traced("llama")
    assert "model.norm.weight" not in [group.weight for group in groups_of(program)[0]]
    program.selection = Selection(include=("lm_head",))
    assert described(groups_of(program)[0][-1]) == ("model.norm.weight", None, 0.0, ["lm_head"])


def test_a_group_holds_its_unwanted_readers_too(traced):
    program = traced("llama")
    program.selection = Selection(exclude=("*.k_proj", "*.mlp.*"))
    groups, _ = groups_of(program)
    assert [described(group) for group in groups] == RMS[:1]


# Reasons


def test_a_residual_reader():
    assert reason_of(lambda m, h: h + m.first(h)) == (
        "%rms_norm is also read by aten.add.Tensor (%add), which cannot absorb a scale"
    )


def test_a_residual_reader_behind_a_view():
    reason = reason_of(lambda m, h: h[:, :1].abs() + m.first(h))
    assert reason == "%rms_norm is also read by aten.abs.default (%abs_1), which cannot absorb a scale"


def test_the_output_is_a_reader():
    reason = reason_of(lambda m, h: (m.first(h), h))
    assert reason == "%rms_norm is also read by output (%output), which cannot absorb a scale"


def test_the_index_reader_of_mixtral(traced):
    reasons = {miss.where: miss.reason for miss in groups_of(traced("mixtral"))[1]}
    assert reasons["%linear_4 in model.layers.0.mlp.gate"] == (
        "%mul_18 is also read by aten.index.Tensor (%index_1 in model.layers.0.mlp.experts), which cannot absorb a "
        "scale"
    )
    experts = [reason for where, reason in reasons.items() if where.endswith("mlp.experts")]
    assert experts[0] == "its input %index_1 comes from aten.index.Tensor, not from a norm with a weight"


def test_the_norms_of_bert_are_read_by_the_residual(traced):
    reasons = [miss.reason for miss in groups_of(traced("bert"))[1]]
    assert reasons[0] == (
        "%layer_norm is also read by aten.add.Tensor (%add_6 in encoder.layer.0.attention.output), which cannot absorb "
        "a scale"
    )


def test_an_activation_in_between():
    assert reason_of(lambda m, h: m.first(h.relu())) == (
        "its input %relu comes from aten.relu.default, not from a norm with a weight"
    )


def test_the_input_of_the_model():
    program = trace(nn.Linear(SIZE, SIZE), torch.randn(2, SIZE))
    (miss,) = groups_of(program)[1]
    assert miss.reason == "its input %input_1 comes from placeholder, not from a norm with a weight"


@pytest.mark.parametrize(
    "view",
    [lambda h: h.mT.reshape(-1, 5, SIZE), lambda h: h.reshape(2, 5, 2, SIZE // 2).flatten(2), lambda h: h.flip(-1)],
    ids=["transposed", "split", "flipped"],
)
def test_a_view_that_moves_channels(view):
    groups, misses = groups_of(traced_norm(lambda m, h: m.first(view(h))))
    assert groups == []
    assert "not from a norm with a weight" in misses[0].reason


def test_a_weight_that_something_else_reads():
    reason = reason_of(lambda m, h: m.first(h) + m.first.weight.sum())
    assert reason == "the weight 'first.weight' of %linear in first is read elsewhere too"


def test_a_weight_on_two_values():
    groups, misses = groups_of(traced_norm(lambda m, h: m.first(m.first(h).relu())))
    assert groups == []
    assert misses[0] == Miss("%linear in first", "the weight 'first.weight' of %linear in first is read elsewhere too")


def test_a_norm_used_twice():
    reason = reason_of(lambda m, h: m.first(h) + m.norm(h + 1))
    assert reason == "the parameters of %rms_norm are read elsewhere too"


def test_a_scale_that_something_else_reads():
    reason = reason_of(lambda m, h: m.first(h) * m.norm.weight.sum(), Scale(lambda w: w))
    assert reason == "its input %mul comes from aten.mul.Tensor, not from a norm with a weight"


def test_a_factor_that_something_else_reads():
    class Factor(Scale):
        def forward(self, x: Tensor) -> Tensor:
            factor = 1 + self.weight
            return x.tanh() * factor, factor.sum()

    reason = reason_of(lambda m, h: m.first(h[0]) * h[1], Factor(None))
    assert reason == "its input %mul comes from aten.mul.Tensor, not from a norm with a weight"


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(SIZE, elementwise_affine=False), nn.LayerNorm((5, SIZE))], ids=["none", "per token"]
)
def test_a_norm_without_a_weight_per_channel(norm):
    assert reason_of(lambda m, h: m.first(h), norm) == "%layer_norm is a norm without a per-channel weight"


def test_a_residual_inside_addmm():
    def residual(m: Norm, h: Tensor) -> Tensor:
        flat = h.flatten(0, 1)
        return torch.addmm(flat, flat, m.first.weight)

    groups, _ = groups_of(traced_norm(residual))
    assert groups == []


def test_looking_changes_nothing(traced):
    program = traced("llama")
    before = str(program.graph)
    groups_of(program)
    assert str(program.graph) == before
