"""find_matmuls: every op that multiplies by a parameter is found, with its orientation, and attention is not."""

import pytest
import torch
from found_matmuls import FLAT, IN, OUT, Weighted, find, the_matmul, the_refusal
from models import build, inputs
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.analysis.matmuls import Matmul, find_matmuls, finite_rows
from mxcompile.errors import WeightError
from mxcompile.graph.trace import trace

FORMS = {  # shape of the parameter, how it is used, inputs, contracted dimension, first reader
    "linear": ((OUT, IN), lambda m, x: F.linear(x, m.weight), None, -1, "aten.linear.default"),
    "linear with bias": ((OUT, IN), lambda m, x: F.linear(x, m.weight, m.bias), None, -1, "aten.linear.default"),
    "matmul": ((IN, OUT), lambda m, x: x @ m.weight, None, -2, "aten.matmul.default"),
    "x @ w.t()": ((OUT, IN), lambda m, x: x @ m.weight.t(), None, -1, "aten.t.default"),
    "x @ w.T": ((OUT, IN), lambda m, x: x @ m.weight.T, None, -1, "aten.numpy_T.default"),
    "x @ w.mT": ((OUT, IN), lambda m, x: x @ m.weight.mT, None, -1, "aten.mT.default"),
    "x @ transpose": ((OUT, IN), lambda m, x: x @ m.weight.transpose(0, 1), None, -1, "aten.transpose.int"),
    "x @ permute": ((OUT, IN), lambda m, x: x @ m.weight.permute(1, 0), None, -1, "aten.permute.default"),
    "twice transposed": ((IN, OUT), lambda m, x: x @ m.weight.t().t(), None, -2, "aten.t.default"),
    "linear by w.t()": ((IN, OUT), lambda m, x: F.linear(x, m.weight.t()), None, -2, "aten.t.default"),
    "contiguous": ((OUT, IN), lambda m, x: x @ m.weight.t().contiguous(), None, -1, "aten.t.default"),
    "idle cast": ((IN, OUT), lambda m, x: x @ m.weight.to(x.dtype), None, -2, "aten.to.dtype"),
    "mm": ((IN, OUT), lambda m, x: torch.mm(x, m.weight), FLAT, -2, "aten.mm.default"),
    "addmm": ((IN, OUT), lambda m, x: torch.addmm(m.bias, x, m.weight), FLAT, -2, "aten.addmm.default"),
    "bmm": ((2, IN, OUT), lambda m, x: torch.bmm(x, m.weight), None, -2, "aten.bmm.default"),
    "bmm by transpose": ((2, OUT, IN), lambda m, x: torch.bmm(x, m.weight.mT), None, -1, "aten.mT.default"),
    "baddbmm": ((2, IN, OUT), lambda m, x: torch.baddbmm(m.bias, x, m.weight), None, -2, "aten.baddbmm.default"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_matmul(form):
    shape, function, args, axis, reader = FORMS[form]
    model = Weighted(shape, function)
    program, matmul = the_matmul(model, *(args or ()))
    assert matmul.parameter == "weight"
    assert matmul.axis == axis
    assert matmul.in_features == IN
    assert str(matmul.reader.target) == reader
    assert matmul.activation.op == "placeholder"
    assert not matmul.is_lowered
    has_bias = form in ("linear with bias", "addmm", "baddbmm")
    assert (matmul.bias is not None and matmul.bias.target == "bias") == has_bias
    rows = finite_rows(program, matmul)
    assert rows.shape == (*shape[:-2], OUT, IN)
    # The found parts are the product: this is what "activation @ weight" means.
    x = (args or (torch.randn(2, 5, IN),))[0]
    product = x @ rows.mT + (model.bias if has_bias else 0)
    torch.testing.assert_close(product, model(x), rtol=0, atol=1e-4)  # sums of 64 float32 products of size 1


@pytest.mark.parametrize("axis", [-1, -2])
def test_rows_is_its_own_inverse(axis):
    _, matmul = the_matmul(Weighted((OUT, IN), FORMS["linear"][1]))
    matmul = Matmul(matmul.node, matmul.activation, matmul.root, matmul.reader, axis, None)
    weight = torch.randn(3, OUT, IN)
    assert torch.equal(matmul.rows(matmul.rows(weight)), weight)
    assert (matmul.rows(weight).shape == weight.shape) == (axis == -1)


def test_module_path():
    program, found, _ = find(nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, 8)))
    assert [(m.module_path, m.parameter) for m in found] == [("0", "0.weight"), ("2", "2.weight")]
    assert [m.node for m in found] == [n for n in program.graph.nodes if n.name.startswith("linear")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", ["up.weight", "down.weight"]),
        ("cnn", ["hidden.weight", "classifier.weight"]),
        ("bert", [*(f"attention.self.{n}" for n in ("query", "key", "value")), "attention.output.dense",
                  "intermediate.dense", "output.dense", "pooler.dense.weight"]),
        ("vit", [*(f"attention.{n}_proj" for n in "qkvo"), "mlp.fc1", "mlp.fc2", "pooler.dense.weight"]),
        ("llama", [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
                   "lm_head.weight"]),
        ("mixtral", [*(f"self_attn.{n}_proj" for n in "qkvo"), "mlp.gate", "mlp.experts.gate_up_proj",
                     "mlp.experts.down_proj", "lm_head.weight"]),
    ],
)  # fmt: skip
def test_every_weight_of_a_model_and_nothing_else(name, expected, traced):
    found, _ = find_matmuls(traced(name))
    assert len(found) == len(expected)
    for matmul, name_part in zip(found, expected, strict=True):
        assert name_part in matmul.parameter


def test_conv1d_of_gpt2(traced):
    found, refusals = find_matmuls(traced("gpt2"))
    assert refusals == []
    assert [(m.parameter.removeprefix("transformer.h.0."), m.axis, str(m.node.target)) for m in found] == [
        ("attn.c_attn.weight", -2, "aten.addmm.default"),
        ("attn.c_proj.weight", -2, "aten.addmm.default"),
        ("mlp.c_fc.weight", -2, "aten.addmm.default"),
        ("mlp.c_proj.weight", -2, "aten.addmm.default"),
        ("lm_head.weight", -1, "aten.linear.default"),
    ]
    assert found[0].in_features == 64
    assert found[0].bias.target == "transformer.h.0.attn.c_attn.bias"


def test_grouped_experts_of_mixtral(traced):
    program = traced("mixtral")
    experts = [m for m in find_matmuls(program)[0] if "experts" in m.parameter]
    assert [(m.axis, m.in_features, tuple(m.root.meta["val"].shape)) for m in experts] == [
        (-1, 64, (4, 256, 64)),
        (-1, 128, (4, 64, 128)),
    ]
    assert [m.reader.op for m in experts] == ["call_function"] * 2
    assert all("grouped_mm" in str(m.node.target) for m in experts)
    assert finite_rows(program, experts[0]).shape == (4, 256, 64)


def test_one_of_several_weights_in_a_parameter():
    """Each is a matmul; the weight is packed as a whole."""

    def by_number(m: Weighted, x: Tensor) -> Tensor:
        return F.linear(x, m.weight[0]) + x @ m.weight[-1].T

    def in_turn(m: Weighted, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x, weight) for weight in m.weight]).sum(0)

    for function, readers in ((by_number, ["select", "select"]), (in_turn, ["unbind"] * 3)):
        program, found, refusals = find(Weighted((3, OUT, IN), function))
        assert refusals == []
        assert [(m.parameter, m.axis, m.in_features, m.is_one_of_several) for m in found] == [
            ("weight", -1, IN, True) for _ in readers
        ]
        assert [m.reader.target.overloadpacket.__name__ for m in found] == readers
        assert finite_rows(program, found[0]).shape == (3, OUT, IN)


def test_one_of_several_that_the_data_choose_or_along_another_dimension():
    chosen = Weighted((3, IN, OUT), lambda m, x: x @ m.weight[x[:, 0, 0].long() * 0])
    across = Weighted((IN, 3, OUT), lambda m, x: x @ m.weight[:, 1])
    for model, name in ((chosen, "index"), (across, "select")):
        assert f"aten.{name}." in the_refusal(model).reason


# Weights that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite(value):
    model = build("mlp")
    with torch.no_grad():
        model.up.weight[3, :2] = value
    program = trace(model, inputs("mlp"))
    up, down = find_matmuls(program)[0]
    with pytest.raises(WeightError) as caught:
        finite_rows(program, up)
    assert str(caught.value) == (
        "parameter 'up.weight' (%linear in up) holds 2 NaN or Inf values and cannot be quantized: repair the "
        "checkpoint, or keep the layer in float with exclude"
    )
    assert torch.equal(finite_rows(program, down), model.down.weight)
