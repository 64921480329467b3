"""Which elements a rounding saturates, and the gradients of a rounding."""

import pytest
import torch

from mxcompile.formats import MXFP4, MXFP8_E4M3, MXINT4, MXINT8, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.straight_through import saturated, straight_through

RULES = (ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.MSE)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("fmt", [MXFP4, MXFP8_E4M3, MXINT4, MXINT8], ids=str)
def test_a_saturated_element_is_rounded_to_the_largest_number_of_its_block(fmt, rule):
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)) * 8
    rounded, mask = reference.quantize_dequantize(x, fmt, rule), saturated(x, fmt, rule)
    _, scales = reference.quantize(x, fmt, rule)
    largest = reference.scale_values(scales).repeat_interleave(fmt.block_size, -1)[:, :100] * fmt.max_value
    assert torch.equal(mask, x.abs() > largest)
    assert torch.equal(rounded[mask].abs(), largest[mask])


def test_the_floor_rule_saturates_what_no_larger_scale_holds():
    x = torch.tensor([[7.0, 6.0, -7.5, 0.0]])  # MXFP4's largest number is 6 on a scale of 1
    assert saturated(x, MXFP4, ScaleRule.FLOOR).tolist() == [[True, False, True, False]]
    gradient = straight_through(torch.ones_like(x), x, MXFP4, ScaleRule.FLOOR)
    assert gradient.tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_blocks_that_are_not_finite_pass_the_gradient():
    x = torch.full((1, 32), 3.0)
    x[0, 5] = torch.inf
    assert not saturated(x, MXFP4, ScaleRule.FLOOR).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_operator_masks_saturated_elements(dtype):
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = torch.ops.mx.quantize_dequantize(x, "mxfp4", "floor")
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(upstream)
    mask = saturated(x.detach(), MXFP4, ScaleRule.FLOOR)
    assert 0 < mask.sum() < mask.numel() / 4
    assert torch.equal(x.grad, torch.where(mask, 0.0, upstream))


def test_a_gradient_of_the_gradient_passes_the_same_elements():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    upstream = torch.ones(3, 64, requires_grad=True)
    torch.library.opcheck(torch.ops.mx.straight_through.default, (upstream, x, "mxfp4", "floor"))
    rounded = torch.ops.mx.quantize_dequantize(x, "mxfp4", "floor")
    (gradient,) = torch.autograd.grad(rounded, x, upstream, create_graph=True)
    (again,) = torch.autograd.grad(gradient.sum(), upstream)
    assert torch.equal(again, gradient.detach())


def test_it_is_the_same_in_a_compiled_graph():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    rounded = torch.compile(lambda v: torch.ops.mx.quantize_dequantize(v, "mxfp4", "floor"), backend="aot_eager")
    (gradient,) = torch.autograd.grad(rounded(x).sum(), x)
    assert torch.equal(gradient, (~saturated(x.detach(), MXFP4, ScaleRule.FLOOR)).float())
