"""mx::rotate: orthogonal up to a power of two, exact where sums are exact, and cancelling in the matmul."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.numerics.hadamard import rotate_input, rotate_weight
from mxcompile.ops import ROTATE

examples = settings(derandomize=True, deadline=None, database=None, max_examples=60)
blocks = st.sampled_from([2, 4, 8, 16, 32, 64, 128])


@pytest.mark.parametrize(("block", "scale"), [(2, 0.5), (4, 0.5), (16, 0.25), (32, 0.125), (64, 0.125)])
def test_a_unit_vector_is_spread_over_its_run(block, scale):
    """1 / 2^ceil(n/2) everywhere in the run, with signs that sum to it; nothing outside."""
    x = torch.eye(2 * block)
    y = rotate_input(x, block)
    inside = torch.block_diag(torch.ones(block, block), torch.ones(block, block))
    assert torch.equal(y.abs(), inside * scale)
    assert torch.equal(y, y.T)
    assert torch.equal(y[0, :block], torch.full((block,), scale))
    assert torch.equal(y[:block, :block].sum(1)[1:], torch.zeros(block - 1))


@examples
@given(blocks, st.integers(1, 3), st.integers(0, 2**31))
def test_products_stay(block, runs, seed):
    """Integers up to 2^7: every sum is exact in float32, so the product is too."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-8, 9, (rows, runs * block), generator=generator).float() for rows in (3, 5))
    assert torch.equal(rotate_input(x, block) @ rotate_weight(w, block).T, x @ w.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_op_is_rounded_once(dtype):
    """The op, its shape and dtype, and one rounding of a sum in float32 (float64 stays float64)."""
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    y = ROTATE(x, 32)
    exact = rotate_input(x.double(), 32)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert (y.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_strides_empty_and_nan():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ROTATE(x.T, 32), ROTATE(x.T.contiguous(), 32))
    assert ROTATE(torch.empty(0, 64), 32).shape == (0, 64)
    x[3] = torch.nan
    nan = ROTATE(x.T, 32).isnan()
    assert nan[:, :32].all()
    assert not nan[:, 32:].any()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be a power of two, not 24"):
        ROTATE(torch.randn(2, 48), 24)
    with pytest.raises(RuntimeError, match="100 channels are not a multiple of the rotation block 32"):
        ROTATE(torch.empty(2, 100, device="meta"), 32)


@pytest.mark.parametrize("block", [2, 8, 32])
def test_gradients(block):
    x = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: ROTATE(value, block), x)


def test_op_is_a_good_custom_op():
    torch.library.opcheck(ROTATE, (torch.randn(3, 64, requires_grad=True), 32))
