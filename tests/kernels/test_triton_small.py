"""triton/norm.py and triton/gate_product.py in Triton's interpreter: the composition's values, bit for bit."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFP4, MXFP8_E4M3, MXINT8, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.norms import Norm

SameBits = Callable[[Tensor, Tensor], None]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NORMS = (Norm(1e-6, narrowed=True), Norm(1e-5, offset=1.0), Norm(1e-5, centered=True))
ROUNDING = (MXINT8, ScaleRule.FLOOR)


def rows(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def off_by_a_step(y: Tensor, expected: Tensor) -> float:
    """Share of values that differ, by at most a step of MXINT8: a float32 sum in another order may round the norm, and
    then the element, to its other neighbour."""
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert (y.double() - expected.double()).abs().max() <= expected.abs().max().item() * 2**-6
    return (y != expected).double().mean().item()


@pytest.mark.parametrize(("norm", "dtype"), crossed(NORMS, DTYPES), ids=str)
@pytest.mark.parametrize("size", [32, 96, 576])
def test_norms_with_the_residual_sum(interpreted: SimpleNamespace, norm: Norm, dtype: torch.dtype, size: int) -> None:
    x, residual, weight = rows(dtype, 2, 3, size), rows(dtype, 2, 3, size, seed=1), rows(dtype, size, seed=2)
    bias = rows(dtype, size, seed=3) if norm.centered else None
    total, y = interpreted.norm.add_norm(x, residual, weight, bias, norm, ROUNDING)
    assert torch.equal(total, x + residual)
    expected = reference.quantize_dequantize(norm(x + residual, weight, bias), *ROUNDING)
    assert off_by_a_step(y, expected) <= 0.005


def test_a_norm_alone_of_strided_rows(interpreted: SimpleNamespace) -> None:
    x = rows(torch.bfloat16, 4, 6, 128)[:, ::2, :64]
    total, y = interpreted.norm.add_norm(x, None, None, None, NORMS[0], (MXFP8_E4M3, ScaleRule.EVEN))
    assert total is x
    expected = reference.quantize_dequantize(NORMS[0](x, None, None), MXFP8_E4M3, ScaleRule.EVEN)
    assert off_by_a_step(y, expected) <= 0.005
    assert interpreted.norm.add_norm(x[:0], None, None, None, NORMS[0], ROUNDING)[1].shape == (0, 3, 64)


def test_bounds_of_a_norm(interpreted: SimpleNamespace, accesses: ...) -> None:
    x, residual, weight = rows(torch.float32, 3, 96), rows(torch.float32, 3, 96), rows(torch.float32, 96)
    total, y = interpreted.norm.add_norm(x, residual, weight, None, NORMS[0], ROUNDING)
    accesses.stores, sums = accesses.stores[1::2], accesses.stores[::2]
    accesses.assert_within([x, residual, weight], y)
    accesses.stores = sums
    accesses.assert_within([x, residual, weight], total)


@pytest.mark.parametrize(
    ("function", "dtype"), crossed(("swish", "gelu", "gelu_tanh", "relu", "swish:alpha=1.7"), DTYPES), ids=str
)
def test_gated_products(interpreted: SimpleNamespace, function: str, dtype: torch.dtype) -> None:
    from mxcompile.numerics.gates import parse_gate

    gate, up, known = rows(dtype, 2, 5, 96) / 3, rows(dtype, 2, 5, 96, seed=1), parse_gate(function)
    expected = reference.quantize_dequantize(known(torch.cat([gate, up], -1)), MXFP4, ScaleRule.FLOOR)
    for tile in (None, 32, 64):
        y = interpreted.gate_product.multiply_and_round(gate, up, known, (MXFP4, ScaleRule.FLOOR), tile)
        assert (y.shape, y.dtype) == (gate.shape, dtype)
        assert (y != expected).double().mean() <= 0.01


def test_gates_and_ups_of_one_tensor(interpreted: SimpleNamespace, accesses: ...) -> None:
    both = rows(torch.float32, 4, 192)
    y = interpreted.gate_product.multiply_and_round(both[:, :96], both[:, 96:], Gate("relu"), ROUNDING, 64)
    accesses.assert_within([both], y)
    assert torch.equal(y, reference.quantize_dequantize(Gate("relu")(both), *ROUNDING))


def test_values_that_are_not_numbers(interpreted: SimpleNamespace, assert_same_bits: SameBits) -> None:
    """A block with Inf or NaN becomes NaN, as in the reference; the other blocks are as ever."""
    gate, up = rows(torch.float32, 2, 96), rows(torch.float32, 2, 96, seed=1)
    gate[0, 3], up[1, 40] = torch.inf, torch.nan
    y = interpreted.gate_product.multiply_and_round(gate, up, Gate("relu"), ROUNDING)
    assert_same_bits(y, reference.quantize_dequantize(Gate("relu")(torch.cat([gate, up], -1)), *ROUNDING))


def test_supports_says_why_not(interpreted: SimpleNamespace) -> None:
    x = rows(torch.bfloat16, 2, 96)
    for module in (interpreted.norm, interpreted.gate_product):
        assert "need a CUDA device" in module.supports(x, ROUNDING)
        assert "no multiple of blocks of 32" in module.supports(x[:, :90], ROUNDING)
        assert "alignment is by whole tokens" in module.supports(x, (MXFP8_E4M3.with_alignment(), ScaleRule.FLOOR))
        assert "mse" in module.supports(x, (MXINT8, ScaleRule.MSE))
    assert "up to 16384" in interpreted.norm.supports(x[:, :1].expand(2, 16416), ROUNDING)


def test_shapes_that_disagree(interpreted: SimpleNamespace) -> None:
    x = rows(torch.float32, 2, 96)
    with pytest.raises(MXCompileError, match="cannot be added"):
        interpreted.norm.add_norm(x, x[:1], None, None, NORMS[0], ROUNDING)
    with pytest.raises(MXCompileError, match="have that size"):
        interpreted.norm.add_norm(x, None, x[0, 1:], None, NORMS[0], ROUNDING)
    with pytest.raises(MXCompileError, match="cannot gate"):
        interpreted.gate_product.multiply_and_round(x, x.bfloat16(), Gate(), ROUNDING)
