"""3-D MX weights: every way to multiply by experts gives what their dequantized values give, and reads no others."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFP4, MXINT8, ScaleRule
from mxcompile.numerics import packing, reference
from mxcompile.numerics.experts import experts_of_rows
from mxcompile.numerics.gates import Gate
from mxcompile.ops import EXPERTS, GROUPED_LINEAR
from mxcompile.tensor.weight import MXLayout, MXWeight, unfused_matmuls

EXPERTS_COUNT, OUT, IN = 6, 64, 96
UNCHOSEN = 2


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack(values: Tensor, transposed: bool = False, activation: str | None = None) -> MXWeight:
    codes, scales = reference.quantize(values, MXFP4, ScaleRule.MSE)
    layout = MXLayout("mxfp4", values.shape[-1], transposed, activation, "floor" if activation else None)
    return MXWeight(packing.pack(codes, MXFP4), scales, layout, values.dtype)


def spoiled(weight: MXWeight, expert: int = UNCHOSEN) -> MXWeight:
    """The weight with an expert that is NaN wherever it is decoded."""
    scales = weight.scales.clone()
    scales[expert] = 255
    return MXWeight(weight.elements, scales, weight.layout_, weight.dtype)


@pytest.fixture
def weight():
    return pack(seeded(EXPERTS_COUNT, OUT, IN))


@pytest.fixture
def numbers():
    return torch.tensor([[0, 5], [3, 0], [5, 4], [1, 0]])  # expert 2 has no token


def expected(x: Tensor, numbers: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = [
        values[number] @ x[row] + (0 if bias is None else bias[number])
        for row, of_row in enumerate(numbers.tolist())
        for number in of_row
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_grouped_linear_multiplies_each_row_by_its_experts(weight, numbers, biased, dtype):
    x, bias = seeded(4, IN, seed=1), seeded(EXPERTS_COUNT, OUT, seed=2) if biased else None
    y = GROUPED_LINEAR(x, numbers.to(dtype), weight.elements, spoiled(weight).scales, bias, "mxfp4")
    torch.testing.assert_close(y, expected(x, numbers, weight.dequantize(), bias), rtol=1e-5, atol=1e-4)


def test_a_number_that_is_no_expert_gives_zeros(weight):
    numbers = torch.tensor([[0], [EXPERTS_COUNT], [-1], [3]])
    y = GROUPED_LINEAR(seeded(4, IN), numbers, weight.elements, weight.scales, None, "mxfp4")
    assert not y[1:3].any()
    assert y[[0, 3]].any(1).all()


def test_no_rows_give_no_rows(weight):
    y = GROUPED_LINEAR(
        seeded(0, IN), torch.empty(0, 2, dtype=torch.int64), weight.elements, weight.scales, None, "mxfp4"
    )
    assert y.shape == (0, OUT)


def test_the_gradient_is_that_of_the_dequantized_experts(weight, numbers):
    x, bias = seeded(4, IN, seed=1).requires_grad_(), seeded(EXPERTS_COUNT, OUT, seed=2).requires_grad_()
    gradient = seeded(8, OUT, seed=3)
    y = GROUPED_LINEAR(x, numbers, weight.elements, spoiled(weight).scales, bias, "mxfp4")
    actual = torch.autograd.grad(y, (x, bias), gradient)
    wanted = torch.autograd.grad(expected(x, numbers, weight.dequantize(), bias), (x, bias), gradient)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "mxint8"])
@pytest.mark.parametrize("unfused", [False, True], ids=["", "unfused"])
def test_a_grouped_matmul_reads_the_experts_that_have_rows(weight, activation, unfused):
    x, ends = seeded(7, IN, seed=1), torch.tensor([2, 2, 2, 5, 5, 7], dtype=torch.int32)
    weight = replace_activation(weight, activation)
    numbers = experts_of_rows(ends, 7)
    assert UNCHOSEN not in numbers
    wanted = expected(rounded(x, activation), numbers, weight.dequantize())
    used = spoiled(weight).transpose(-1, -2)
    if unfused:
        with unfused_matmuls():
            actual = torch._grouped_mm(x, used, offs=ends)
    else:
        actual = torch._grouped_mm(x, used, offs=ends)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "mxint8"])
def test_batched_matmuls_of_chosen_experts(weight, activation, numbers):
    weight = replace_activation(weight, activation)
    x, chosen = seeded(8, IN, seed=1), numbers.flatten()
    wanted = expected(rounded(x, activation), chosen[:, None], weight.dequantize())
    left = torch.bmm(spoiled(weight)[chosen], x.unsqueeze(-1)).squeeze(-1)
    right = torch.bmm(x.unsqueeze(1), spoiled(weight).transpose(1, 2)[chosen]).squeeze(1)
    torch.testing.assert_close(left, wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(right, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("multiply", [torch.bmm, torch.matmul, lambda x, w: x @ w], ids=["bmm", "matmul", "@"])
def test_a_batched_matmul_by_all_experts(weight, multiply):
    x = seeded(EXPERTS_COUNT, 5, IN, seed=1)
    actual = multiply(x, weight.transpose(1, 2))
    torch.testing.assert_close(actual, x @ weight.dequantize().transpose(1, 2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("take", [lambda w, i: w[i], lambda w, i: w[torch.tensor(i)], lambda w, i: w.select(0, i)])
def test_one_expert_is_a_linear_weight(weight, take):
    x = seeded(5, IN, seed=1)
    actual = F.linear(x, take(spoiled(weight), 4))
    torch.testing.assert_close(actual, F.linear(x, weight.dequantize()[4]), rtol=1e-5, atol=1e-4)


def test_all_experts_one_by_one(weight):
    assert [torch.equal(one.dequantize(), weight.dequantize()[i]) for i, one in enumerate(weight)] == [True] * 6
    assert weight[1:3].shape == (2, OUT, IN)


def test_a_matrix_has_no_experts(weight):
    with pytest.raises(MXCompileError, match="not defined on an MXWeight"):
        weight[0][0]
    with pytest.raises(MXCompileError, match="not defined on an MXWeight"):
        weight.select(1, 0)


@pytest.mark.parametrize("rounding", [(None, None), ("mxint8", "floor")], ids=["", "rounded"])
def test_experts_are_two_grouped_linears_and_a_gate(numbers, rounding):
    up, down = pack(seeded(EXPERTS_COUNT, 2 * OUT, IN)), pack(seeded(EXPERTS_COUNT, IN, OUT, seed=1))
    x, shares = seeded(4, IN, seed=2), torch.rand(4, 2, generator=torch.Generator().manual_seed(3))
    biases = seeded(EXPERTS_COUNT, 2 * OUT, seed=4), seeded(EXPERTS_COUNT, IN, seed=5)
    parts = [up.elements, spoiled(up).scales], biases[0], [down.elements, spoiled(down).scales], biases[1]
    actual = EXPERTS(x, numbers, shares, *parts, "mxfp4", "mxfp4", str(Gate()), *rounding)
    hidden = rounded(Gate()(expected(x, numbers, up.dequantize(), biases[0])), rounding[0])
    y = expected(hidden, numbers.reshape(-1, 1), down.dequantize(), biases[1])
    wanted = (y.view(4, 2, IN) * shares[..., None]).sum(1)
    torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=5e-2 if rounding[0] else 1e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_planar_experts_hold_the_same_values(transposed):
    weight = pack(seeded(3, 2 * OUT, IN), transposed)
    planar = weight.to_planar()
    assert planar.shape == weight.shape
    assert torch.equal(planar.dequantize(), weight.dequantize())
    assert torch.equal(planar[1].dequantize(), weight[1].dequantize())
    assert torch.equal(planar.to_row_major().elements, weight.elements)


def test_experts_whose_rows_fill_no_tiles_stay_row_major():
    with pytest.raises(MXCompileError, match="multiple of 64 outputs, not 32"):
        pack(seeded(4, 32, IN)).to_planar()


def replace_activation(weight: MXWeight, activation: str | None) -> MXWeight:
    layout = replace(weight.layout_, activation=activation, rule="floor" if activation else None)
    return MXWeight(weight.elements, weight.scales, layout, weight.dtype)


def rounded(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else reference.quantize_dequantize(x, MXINT8, ScaleRule.FLOOR)
