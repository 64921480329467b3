"""Single-token attention, decomposed: what is rewritten, its values, and that Inductor makes one kernel of it."""

import operator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from mxcompile.inductor import backend, why_no_inductor
from mxcompile.inductor.rewrites import decompose_attention

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
needs_compiler = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")


def tensors(dtype, batch=2, heads=4, keys=19, size=16, queries=1):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, queries, size), (batch, heads, keys, size), (batch, heads, keys, size)]
    return [(torch.randn(*shape, generator=generator) * 2).to(dtype) for shape in shapes]


def decomposed(function, *given):
    """The graph of a function, rewritten; and how much was."""
    module = make_fx(function, tracing_mode="fake")(*given)
    assert module.graph.find_nodes(op="call_function", target=FLASH)
    count = decompose_attention.decompose_attention(module.graph)
    module.recompile()
    return module, count


def exact(query, key, value, mask=None, scale=None):
    """In float64, zeros where nothing is left."""
    scores = query.double() @ key.double().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    shares = (scores if mask is None else scores + mask.double()).softmax(-1).nan_to_num(0.0)
    return shares @ value.double()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 2.0**-8)])
def test_values_are_those_of_float64(dtype, bound, scale):
    """Within the rounding of the result: 2^-9 of it in bfloat16, with room for the largest of a few hundred."""
    given = tensors(dtype)
    module, count = decomposed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale), *given)
    assert count == 1
    assert not module.graph.find_nodes(op="call_function", target=FLASH)
    expected = exact(*given, scale=scale)
    y = module(*given)
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    assert ((y.double() - expected).abs() <= bound * expected.abs().clamp(min=1)).all()


def test_a_mask_that_leaves_some_or_nothing():
    """Padding on the left of one sequence; a sequence with everything masked gives zeros, as torch's kernel does."""
    query, key, value = tensors(torch.float32, batch=3)
    mask = torch.zeros(3, 1, 1, 19)
    mask[1, :, :, :7], mask[2] = float("-inf"), float("-inf")

    def call(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m)

    module, count = decomposed(call, query, key, value, mask)
    y = module(query, key, value, mask)
    assert count == 1
    assert (y[2] == 0).all()
    torch.testing.assert_close(y.double(), exact(query, key, value, mask), rtol=0, atol=3e-6)
    torch.testing.assert_close(y, call(query, key, value, mask), rtol=0, atol=3e-6)


def test_keys_that_queries_share():
    """Each head of keys serves the next so many heads of queries; a mask for each head of queries is left alone."""
    query, key, value = tensors(torch.float32, heads=6)
    key, value, mask = key[:, :2], value[:, :2], torch.randn(2, 1, 1, 19)

    def call(q, k, v, m):
        return FLASH(q, k, v, attn_mask=m)[0]

    module, count = decomposed(call, query, key, value, mask)
    expected = exact(query, *(part.repeat_interleave(3, 1) for part in (key, value)), mask)
    assert count == 1
    torch.testing.assert_close(module(query, key, value, mask).double(), expected, rtol=0, atol=3e-6)
    assert decomposed(call, query, key, value, mask.expand(2, 6, 1, 19))[1] == 0


@pytest.mark.parametrize("heads", [1, 4])
def test_masks_for_each_head_and_for_all(heads):
    query, key, value = tensors(torch.float32)
    mask = torch.randn(2, heads, 1, 19)
    module, count = decomposed(lambda q, k, v, m: FLASH(q, k, v, attn_mask=m)[0], query, key, value, mask)
    assert count == 1
    expected = exact(query, key, value, mask)
    torch.testing.assert_close(module(query, key, value, mask).double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("queries", "options"), [(2, {}), (1, {"is_causal": True})], ids=["two queries", "a causal mask"]
)
def test_other_attention_is_left_alone(queries, options):
    given = tensors(torch.float32, queries=queries)
    module, count = decomposed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), *given)
    assert count == 0
    assert len(module.graph.find_nodes(op="call_function", target=FLASH)) == 1


def test_one_that_gives_its_logarithms_too_is_left_alone():
    given = tensors(torch.float32)
    _, count = decomposed(FLASH, *given)
    assert count == 0


def test_a_length_that_is_not_known_is_left_alone():
    given = tensors(torch.float32, queries=3)
    module = make_fx(F.scaled_dot_product_attention, tracing_mode="symbolic")(*given)
    assert decompose_attention.decompose_attention(module.graph) == 0


@needs_compiler
@torch.no_grad()
def test_compiled_with_repeated_keys_it_is_no_call_of_its_own():
    """As in a language model: few heads of keys and values for more of queries."""
    query, key, value = tensors(torch.bfloat16, heads=4)
    key, value = key[:, :2].contiguous(), value[:, :2].contiguous()

    def call(q, k, v):
        k, v = (part[:, :, None].expand(2, 2, 2, 19, 16).reshape(2, 4, 19, 16) for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    seen = []

    class Watching(backend.FuseMX):
        def __call__(self, graph):
            super().__call__(graph)
            seen.extend(node.target for node in graph.nodes if node.op == "call_function")

    torch._dynamo.reset()
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        y = torch.compile(call, options=backend.compile_options(Watching()))(query, key, value)
    repeated = [part.repeat_interleave(2, 1) for part in (key, value)]
    expected = exact(query, *repeated)
    assert ((y.double() - expected).abs() <= 2.0**-8 * expected.abs().clamp(min=1)).all()
    assert seen
    assert FLASH not in seen
    assert operator.getitem not in seen
