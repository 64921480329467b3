"""A mask of booleans is converted once for all calls of attention that read it."""

import pytest
import torch
from torch.nn import functional as F

from mxcompile.inductor.rewrites.share_masks import share_masks


def attention(x, mask):
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def rewritten(function, *args):
    """(number of rewrites, names of the calls); asserts that the graph computes the same."""
    results = []

    def backend(module, _):
        results.append(share_masks(module.graph))
        module.graph.lint()
        module.recompile()
        results.append([getattr(node.target, "__name__", node.target) for node in module.graph.nodes])
        return module

    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*args), function(*args), rtol=1e-6, atol=1e-6)
    return results


@pytest.fixture
def mask():
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    visible[3] = False  # a query that sees no key
    return visible


def test_a_mask_is_converted_once(mask):
    count, names = rewritten(lambda x, m: attention(attention(x, m), m), torch.randn(1, 2, 6, 8), mask)
    assert count == 2
    assert names.count("masked_fill") == 1
    assert names.index("masked_fill") < names.index("scaled_dot_product_attention")


def test_once_for_each_dtype(mask):
    count, names = rewritten(lambda x, m: attention(attention(x, m).double(), m), torch.randn(1, 2, 6, 8), mask)
    assert count == names.count("masked_fill") == 2


def test_masks_of_floats_and_no_mask_stay():
    bias = torch.randn(6, 6)
    count, names = rewritten(lambda x, m: attention(attention(x, m), None), torch.randn(1, 2, 6, 8), bias)
    assert count == names.count("masked_fill") == 0
