"""find_groups: what divides a matmul's input, what absorbs the factors, and what keeps a value from being divided.

In every case random factors are folded, and the program must compute the same as before on inputs of three sizes.
Ops are in test_constraints.py, random graphs in test_random_graphs.py.
"""

import re
from pathlib import Path

import pytest
import torch
from fold_nets import (
    SHAPES,
    SIZE,
    Net,
    any_exponents,
    described,
    folded,
    linear,
    net,
    prove,
    proven,
    reasons_of,
    tokens,
    whole_exponents,
)
from models import build, inputs, output
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import find_groups, representable_factors
from mxcompile.graph.name_patterns import Selection
from mxcompile.graph.trace import trace

ROOT = Path(__file__).parents[3]


class RMS(nn.Module):
    """RMS norm in plain PyTorch: x / rms(x) * gain(weight)."""

    def __init__(self, gain, width: int = SIZE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain(self.weight)


# Models


L = "model.layers.0."
RMS_MODEL = [
    f"64: {L}input_layernorm.weight -> " + " ".join(f"{L}self_attn.{n}_proj.weight" for n in "kqv"),
    f"32: {L}self_attn.v_proj.weight -> {L}self_attn.o_proj.weight",
    f"64: {L}post_attention_layernorm.weight -> {L}mlp.gate_proj.weight {L}mlp.up_proj.weight",
    f"128: {L}mlp.up_proj.weight -> {L}mlp.down_proj.weight",
]
H = "transformer.h.0."
V = "layers.0."
MIXED = f"{L}mlp.experts"
EXPECTED = {
    "mlp": ["64: norm.bias norm.weight -> up.weight", "128: up.bias up.weight -> down.weight"],
    "cnn": [
        "16: features.2.bias features.2.weight -> hidden.weight",
        "64: hidden.bias hidden.weight -> classifier.weight",
    ],
    "llama": RMS_MODEL,
    "llama-tied": RMS_MODEL,
    "gemma": [line.replace("norm.weight ->", "norm.weight+1 ->") for line in RMS_MODEL],
    "gpt2": [
        f"64: {H}ln_1.bias {H}ln_1.weight -> {H}attn.c_attn.weight",
        f"64: {H}attn.c_attn.bias {H}attn.c_attn.weight -> {H}attn.c_proj.weight",
        f"64: {H}ln_2.bias {H}ln_2.weight -> {H}mlp.c_fc.weight",
    ],
    "bert": [
        "64: encoder.layer.0.attention.self.value.bias encoder.layer.0.attention.self.value.weight -> "
        "encoder.layer.0.attention.output.dense.weight"
    ],
    "vit": [
        f"64: {V}layernorm_before.bias {V}layernorm_before.weight -> "
        + " ".join(f"{V}attention.{n}_proj.weight" for n in "kqv"),
        f"64: {V}attention.v_proj.bias {V}attention.v_proj.weight -> {V}attention.o_proj.weight",
        f"64: {V}layernorm_after.bias {V}layernorm_after.weight -> {V}mlp.fc1.weight",
    ],
    "mixtral": [
        *RMS_MODEL[:2],
        f"64: {L}post_attention_layernorm.weight -> {MIXED}.gate_up_proj {L}mlp.gate.weight",
        f"128: {MIXED}.gate_up_proj -> {MIXED}.down_proj",
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_models(name, traced):
    calls = [inputs(name, *shape, seed=1) for shape in ((2, 8), (3, 5), (1, 11))]
    program = traced(name)
    wanted = choose(program).matmuls
    reasons = find_groups(program, wanted)[1]
    groups = prove(program, *calls)
    assert [described(group) for group in groups] == EXPECTED[name]
    grouped = {node for group in groups for node in group.nodes}
    assert grouped | {miss.matmul.node for miss in reasons} == {matmul.node for matmul in wanted}
    assert not grouped & {miss.matmul.node for miss in reasons}


def test_reasons_of_models(traced):
    assert "aten.pow.Tensor_Scalar, which is not linear" in reasons_of(traced("gpt2"))["transformer.h.0.mlp.c_proj"]
    bert = reasons_of(traced("bert"))
    assert bert["encoder.layer.0.intermediate.dense"] == "%layer_norm_2 normalizes it"
    assert bert["encoder.layer.0.output.dense"] == "%gelu is aten.gelu.default, which is not linear in it"
    assert bert["pooler.dense"] == "%layer_norm_2 is read by %output, the output of the model"


def test_looking_changes_nothing(traced):
    program = traced("llama")
    before = str(program.graph)
    tensors = {name: program.tensor(name) for name in program.parameter_names()}
    find_groups(program, choose(program).matmuls)
    assert str(program.graph) == before
    assert all(program.tensor(name) is tensor for name, tensor in tensors.items())


def test_fold_replaces_tensors_and_writes_to_none(traced):
    model = build("llama")
    program, before = trace(model, inputs("llama")), {n: p.clone() for n, p in model.named_parameters()}
    assert folded(program, any_exponents)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_fold_without_any_rounding(name, dtype):
    program = trace(build(name, dtype), inputs_of(name, dtype))
    folded(program, torch.zeros)  # replaced parameters need no gradient: the same kernels before and after
    before = output(program(**inputs_of(name, dtype)))
    assert folded(program, whole_exponents)
    assert torch.equal(output(program(**inputs_of(name, dtype))), before)


def inputs_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(name).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_half_precision_models_are_powers_of_two(dtype):
    program = trace(build("mlp", dtype), inputs_of("mlp", dtype))
    for group in find_groups(program, choose(program).matmuls)[0]:
        factors = representable_factors(group, torch.rand(group.count) + 0.1, power_of_two=False)
        assert torch.equal(factors.log2(), factors.log2().round())


# Which matmuls


def test_the_output_head_is_in_no_wanted_group(traced):
    program = traced("llama")
    assert not [g for g in find_groups(program, choose(program).matmuls)[0] if "lm_head" in str(g)]
    program.selection = Selection(include=("lm_head",))
    assert described(prove(program, inputs("llama"))[-1]) == "64: model.norm.weight -> lm_head.weight"


def test_excluded_matmuls_take_factors_up_all_the_same(traced):
    program = traced("llama")
    program.selection = Selection(exclude=("*.k_proj", "*.mlp.*", "*.o_proj"))
    (group,) = prove(program, inputs("llama"), inputs("llama", 3, 5))
    assert described(group) == RMS_MODEL[0]
    assert [matmul.module_path[-6:] for matmul, _ in group.matmuls] == ["q_proj", "v_proj"]


def test_the_largest_of_every_factor_s_channels(traced):
    program = traced("llama")
    group = find_groups(program, choose(program).matmuls)[0][1]
    (matmul, numbers), *_ = group.matmuls
    assert (group.count, len(numbers)) == (32, 64)
    channels = torch.rand(64)
    wanted = [channels[numbers == number].max() for number in range(32)]
    assert group.largest(lambda m: channels).tolist() == wanted
    assert matmul.module_path == f"{L}self_attn.o_proj"


# Norms


NORMS = {
    "nn.RMSNorm": (lambda: nn.RMSNorm(SIZE), "norm.weight"),
    "nn.LayerNorm": (lambda: nn.LayerNorm(SIZE), "norm.bias norm.weight"),
    "nn.LayerNorm without bias": (lambda: nn.LayerNorm(SIZE, bias=False), "norm.weight"),
    "plain": (lambda: RMS(lambda w: w), "norm.weight"),
    "plain, cast": (lambda: RMS(lambda w: w.double().float()), "norm.weight"),
    "1.0 + w": (lambda: RMS(lambda w: 1.0 + w), "norm.weight+1"),
    "w + 1": (lambda: RMS(lambda w: w + 1), "norm.weight+1"),
    "w + 2": (lambda: RMS(lambda w: w + 2), "norm.weight+2"),
    "cast 1 + w": (lambda: RMS(lambda w: (1.0 + w.double()).float()), "norm.weight+1"),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms_with_several_readers(norm):
    make, divided = NORMS[norm]
    groups = proven(lambda m, x: m.first(h := m.norm(x)) + m.second(h), norm=make(), first=linear(), second=linear())
    assert groups == [f"{SIZE}: {divided} -> first.weight second.weight"]


REFUSED_NORMS = {
    "no weight": lambda: nn.LayerNorm(SIZE, elementwise_affine=False),
    "exp": lambda: RMS(torch.exp),
    "1 - w": lambda: RMS(lambda w: 1 - w),
    "1 + (1 + w)": lambda: RMS(lambda w: 1 + (1 + w)),
    "a learned scalar": lambda: RMS(lambda w: w, width=1),
}


@pytest.mark.parametrize("norm", REFUSED_NORMS)
def test_norms_that_cannot_be_divided(norm):
    program = net(lambda m, x: m.first(m.norm(x.tanh())), norm=REFUSED_NORMS[norm](), first=linear())
    assert [g for g in prove(program, *(tokens(*shape) for shape in SHAPES)) if g.count > 1] == []


def test_a_norm_without_parameters_is_the_reason():
    norm = nn.LayerNorm(SIZE, elementwise_affine=False)
    program = net(lambda m, x: m.first(m.norm(x)), norm=norm, first=linear())
    assert reasons_of(program) == {"first": "%layer_norm is a norm without a weight per channel"}


def test_a_product_of_two_norms():
    groups = proven(lambda m, x: m.o(m.one(x) * m.two(x)), one=nn.RMSNorm(SIZE), two=nn.RMSNorm(SIZE), o=linear())
    assert groups in ([f"{SIZE}: {norm}.weight -> o.weight"] for norm in ("one", "two"))


def test_attention_and_mlp_beside_each_other():
    """One norm feeds both, as in GPT-J."""
    parts = {"norm": nn.LayerNorm(SIZE), "v": linear(), "up": linear(), "down": linear(), "o": linear()}

    def function(m: Net, x: Tensor) -> Tensor:
        h = m.norm(x)
        return x + m.o(F.scaled_dot_product_attention(x, x, m.v(h))) + m.down(F.relu(m.up(h)))

    assert proven(function, **parts) == [
        f"{SIZE}: norm.bias norm.weight -> up.weight v.weight",
        f"{SIZE}: v.bias v.weight -> o.weight",
        f"{SIZE}: up.bias up.weight -> down.weight",
    ]


# Tied


def shared_weight() -> dict[str, nn.Linear]:
    first, second = linear(), linear()
    second.weight = first.weight
    return {"first": first, "second": second}


TIED = {
    "a linear on two values of a norm": (lambda m, x: m.first((h := m.one(x))[:, :1]) + m.first(h), "one.weight"),
    "a linear on two norms": (lambda m, x: m.first(m.one(x)) + m.first(m.two(x)), "one.weight two.weight"),
    "one weight under two names": (lambda m, x: m.first(m.one(x)) + m.second(m.two(x)), "one.weight two.weight"),
    "a linear on a norm and another value": (lambda m, x: m.first(m.one(x)) + m.first(x.tanh()), None),
    "one weight under two names, read elsewhere": (lambda m, x: m.first(m.one(x)) + m.second(x), None),
    "a linear on its own result": (lambda m, x: m.first(F.relu(m.first(F.relu(m.first(x))))), None),
    "a norm of two values": (lambda m, x: m.first(m.one(x)) + m.first(m.one(x + 1)), "one.weight"),
    "a norm of two values, one read elsewhere": (lambda m, x: m.first(m.one(x)) + m.one(x + 1), None),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_weights(name):
    function, divided = TIED[name]
    (*groups,) = proven(function, one=nn.RMSNorm(SIZE), two=nn.RMSNorm(SIZE), **shared_weight())
    assert [group.split(" -> ")[0] for group in groups] == ([] if divided is None else [f"{SIZE}: {divided}"])


def test_a_head_tied_to_the_embedding_scales_with_it():
    def function(m: Net, x: Tensor) -> Tensor:
        return F.linear(m.norm(m.o(F.embedding((x[..., 0] > 0).long(), m.table))), m.table)

    parts = {"norm": nn.RMSNorm(SIZE), "o": linear(), "table": nn.Parameter(torch.ones(2, SIZE))}
    assert proven(function, **parts) == [f"{SIZE}: table -> norm.weight o.weight"]


# Names


WORDS = [
    "llama",
    "gemma",
    "gpt",
    "mistral",
    "mixtral",
    "qwen",
    "bert",
    "opt_",
    "phi",
    "falcon",
    "bloom",
    "mamba",
    "smollm",
]
NAMES = ["layernorm", "rmsnorm", "mlp", "attn", "lm_head", "embed_tokens", "experts", "fc1", "fc2", "c_attn"]
PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "in", "out", "qkv")]


@pytest.mark.parametrize(
    "path", [*(ROOT / "mxcompile/analysis").rglob("*.py"), *(ROOT / "passes").glob("*.py")], ids=lambda path: path.name
)
def test_nothing_is_recognised_by_name(path):
    """Data flow alone decides, no name of an architecture, a class or a parameter; comments may give examples."""
    code = re.sub(r'"""(.|\n)*?"""|#.*', "", path.read_text()).lower()
    code = re.sub(
        r"gptq|(self\.|of_)experts|experts(: experttokens|tatistics)", "", code
    )  # an algorithm and its option
    assert not [word for word in (*WORDS, *NAMES, *PROJECTIONS) if word in code]
