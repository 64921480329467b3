"""Single-token attention over an MXCache on a CPU: what is rewritten, its values, and what Inductor makes of it."""

import copy

import pytest
import torch
from fused_steps import Recorded, compiled
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from mxcompile.formats import FORMATS, activation_rule, parse_format
from mxcompile.inductor import why_no_inductor
from mxcompile.inductor.backend import compile_options
from mxcompile.inductor.rewrites.decompose_attention import SINGLE_QUERY
from mxcompile.inductor.rewrites.decompose_packed_attention import decompose_packed_attention
from mxcompile.inductor.rewrites.decompose_packing import decompose_packing
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.packed_attention import PackedStates, attend_packed
from mxcompile.ops import DEQUANTIZE, QUANTIZE, READ_CACHE, ROTATE
from mxcompile.tensor.cache_layers import FixedLayer, GrowingLayer

BATCH, HEADS, SHARED, TOKENS = 2, 6, 2, 19
EXTRA = ("mxint8:16", "mxint4:16", "mxint4:64", "mxint6:64")
needs_compiler = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")


def packed(fmt, size, tokens=TOKENS):
    """Elements and scales of random states with outliers, zeros, and a block that is not finite."""
    x = torch.randn(BATCH, SHARED, tokens, size) * 10.0 ** torch.randint(-2, 2, (BATCH, SHARED, tokens, 1))
    x[0, 0, 3] = 0
    return QUANTIZE(x, fmt, str(activation_rule(parse_format(fmt))))


def for_every_head(states):
    """Keys or values, repeated for the query heads that share them as transformers does it."""
    repeated = states[:, :, None].expand(-1, -1, HEADS // SHARED, -1, -1)
    return repeated.reshape(BATCH, HEADS, states.shape[2], states.shape[3])


def attention(key, value, sizes, rotation=1, dtype=torch.float32):
    """Attention of a query over packed states, as a model with an MXCache computes it, with or without a mask."""

    def call(query, *parts):
        states = [
            DEQUANTIZE(*parts[2 * at : 2 * at + 2], fmt, size, dtype)
            for at, (fmt, size) in enumerate(zip((key, value), sizes, strict=True))
        ]
        if rotation > 1:
            states[0] = ROTATE(states[0], rotation) * 2
        repeated = map(for_every_head, states)
        mask = parts[4] if len(parts) > 4 else None
        return F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)

    return call


def inputs(key, value, sizes, mask=None, dtype=torch.float32):
    torch.manual_seed(0)
    query = torch.randn(BATCH, HEADS, 1, sizes[0]).to(dtype)
    given = (query, *packed(key, sizes[0]), *packed(value, sizes[1]))
    return given if mask is None else (*given, mask)


def expected(key, value, sizes, given):
    formats = (parse_format(key), parse_format(value))
    states = [PackedStates(*given[2 * at + 1 : 2 * at + 3], formats[at], sizes[at]) for at in range(2)]
    return attend_packed(given[0].double(), *states, given[5] if len(given) > 5 else None, 0.3)


def rewritten(function, given):
    module = make_fx(function, tracing_mode="fake")(*given)
    assert module.graph.find_nodes(op="call_function", target=SINGLE_QUERY)
    count = decompose_packed_attention(module.graph)
    module.graph.lint()
    module.recompile()
    return module, count


@pytest.mark.parametrize("fmt", [*map(str, FORMATS.values()), *EXTRA])
def test_every_format_is_decoded_where_it_is_summed(fmt):
    sizes = (64, 64)
    given = inputs(fmt, fmt, sizes)
    module, count = rewritten(attention(fmt, fmt, sizes), given)
    assert count == 1
    assert not module.graph.find_nodes(op="call_function", target=DEQUANTIZE)
    torch.testing.assert_close(module(*given), expected(fmt, fmt, sizes, given).float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [20, 64, 80, 96, 128, 256])
def test_every_head_size(size):
    sizes = (size, size)
    given = inputs("mxint8", "mxint4", sizes)
    module, count = rewritten(attention("mxint8", "mxint4", sizes), given)
    assert count == 1
    torch.testing.assert_close(module(*given), expected("mxint8", "mxint4", sizes, given).float(), rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, TOKENS), (BATCH, 1, 1, TOKENS), (BATCH, HEADS, 1, TOKENS)], ids=str)
def test_masks(shape):
    """Where everything is masked the result is zero."""
    mask = torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4, -torch.inf, 0.5)
    if len(shape) == 4:
        mask[1] = -torch.inf
    sizes = (32, 32)
    given = inputs("mxint4", "mxfp4", sizes, mask)
    module, count = rewritten(attention("mxint4", "mxfp4", sizes), given)
    assert count == 1
    result = module(*given)
    torch.testing.assert_close(result, expected("mxint4", "mxfp4", sizes, given).float(), rtol=2e-5, atol=2e-5)
    assert len(shape) < 4 or not result[1].any()


def test_a_block_that_is_no_number_stays_one():
    sizes = (32, 32)
    given = inputs("mxint8", "mxint8", sizes)
    given[4][0, 0, 7, 0] = 255
    result = rewritten(attention("mxint8", "mxint8", sizes), given)[0](*given)
    assert result[0, :3].isnan().all()
    assert not result[0, 3:].isnan().any()


def test_the_query_is_rotated_in_place_of_all_keys():
    sizes = (32, 32)
    given = inputs("mxint4", "mxint4", sizes)
    function = attention("mxint4", "mxint4", sizes, rotation=32)
    module, count = rewritten(function, given)
    assert count == 1
    (rotation,) = module.graph.find_nodes(op="call_function", target=ROTATE)
    assert tuple(rotation.meta["val"].shape) == (BATCH, HEADS, 1, 32)
    torch.testing.assert_close(module(*given), function(*given), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("fmt", ["mxint5", "mxint6:16", "mxint6:128", "mxint8:128"])
def test_what_makes_no_few_vectors_is_decoded_first(fmt):
    sizes = (128, 128)
    assert rewritten(attention(fmt, "mxint8", sizes), inputs(fmt, "mxint8", sizes))[1] == fmt.endswith("128")


ROOM, PLACE = 9, 14


def with_exact_tokens(window=4, block=1, later=0, fmt="mxint4"):
    """Attention of the token at `PLACE` over packed states in which some are exact; `later`: for values, another."""

    def call(query, elements, scales, mask, held, place, *exact):
        pairs = [[own, newest if window > 1 else None, first] for own, newest, first in (exact[::2], exact[1::2])]
        keys, values = (
            READ_CACHE(elements, scales, *rest, held, at, fmt, turn, window)
            for rest, at, turn in zip(pairs, (place, place + later if later else place), (block, 1), strict=True)
        )
        repeated = map(for_every_head, (keys, values))
        return F.scaled_dot_product_attention(query, *repeated, attn_mask=mask)

    return call


def exact_inputs(heads=1, fmt="mxint4", sink=3, missing=None):
    """Own, newest and first tokens, later ones hidden. missing: how far back a token is not held any more."""
    query, elements, scales = inputs(fmt, fmt, (32, 32))[:3]
    mask = torch.where(torch.rand(BATCH, heads, 1, TOKENS) < 0.3, -torch.inf, 0.0)
    mask[..., PLACE + 1 :] = -torch.inf
    held = torch.arange(ROOM)
    held = held + (PLACE - 1 - held) // ROOM * ROOM
    if missing is not None:
        held[(PLACE - missing) % ROOM] += ROOM
    exact = [torch.randn(BATCH, SHARED, count, 32) * 4 for count in (1, 1, ROOM, ROOM, sink, sink)]
    return query, elements, scales, mask, held, torch.tensor([PLACE]), *exact


def reads(module):
    return module.graph.find_nodes(op="call_function", target=READ_CACHE)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize(("window", "missing"), [(1, None), (4, None), (4, 2), (9, None), (0, None)])
def test_exact_tokens_take_the_place_of_packed_ones(window, missing, block, heads):
    """Own, newest and first tokens, under a mask; some of the window may not be held any more."""
    given = exact_inputs(heads, missing=missing)
    function = with_exact_tokens(window, block)
    module, count = rewritten(function, given)
    assert count == 1
    assert not reads(module)
    torch.testing.assert_close(module(*given), function(*given), rtol=2e-5, atol=2e-5)


def test_a_window_may_reach_the_first_tokens():
    given = exact_inputs(sink=13)
    function = with_exact_tokens(9)
    torch.testing.assert_close(rewritten(function, given)[0](*given), function(*given), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("other", ["place", "format"])
def test_what_is_left_is_decoded_first(other):
    """Exact values of another token; a format of which no vectors are made. Its operator is still taken apart."""
    fmt = "mxint5" if other == "format" else "mxint4"
    given = exact_inputs(fmt=fmt)
    function = with_exact_tokens(later=other == "place", fmt=fmt)
    module, count = rewritten(function, given)
    assert count == 0
    decompose_packing(module.graph)
    module.recompile()
    assert not reads(module)
    torch.testing.assert_close(module(*given), function(*given), rtol=2e-5, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("tokens", ["fixed", "growing"])
def test_inductor_fuses_it(tokens):
    """In bfloat16, over a number of tokens that is known or a symbol; it is within the rounding of the result."""
    sizes = (64, 64)
    given = inputs("mxint8", "mxint4", sizes, dtype=torch.bfloat16)
    if tokens == "growing":
        for part in given[1:]:
            torch._dynamo.mark_dynamic(part, 2)
    result, calls = compiled(attention("mxint8", "mxint4", sizes, dtype=torch.bfloat16), *given, on_a_gpu=False)
    assert not {DEQUANTIZE, SINGLE_QUERY} & set(calls)
    torch.testing.assert_close(
        result.float(), expected("mxint8", "mxint4", sizes, given).float(), rtol=2**-8, atol=1e-3
    )


@needs_compiler
@pytest.mark.parametrize("room", [None, TOKENS])
def test_a_window_of_a_cache_is_fused(room):
    """Its own layer, compiled for any number of tokens; later tokens are those of the layer itself."""
    form = CacheFormat.parse("key=mxint4,value=mxint8,window=4,sink=2,rotate=head")
    layer = GrowingLayer(form) if room is None else FixedLayer(room, form)
    torch.manual_seed(0)
    states = [torch.randn(2, BATCH, SHARED, count, 32) for count in (9, 1, 1, 1)]
    layer.update(*states[0])

    def step(query, key, value):
        read = layer.update(key, value)
        repeated = map(for_every_head, read)
        mask = None if room is None else torch.where(torch.arange(room) < layer.cumulative_length, 0.0, -torch.inf)
        return F.scaled_dot_product_attention(
            query, *repeated, attn_mask=None if mask is None else mask[None, None, None]
        )

    fuse = Recorded()
    torch._dynamo.reset()
    with fresh_cache(), torch.no_grad():
        fused = torch.compile(step, options=compile_options(fuse), fullgraph=True)  # a growing one twice
        for key, value in states[1:]:
            query, before = torch.randn(BATCH, HEADS, 1, 32), copy.deepcopy(layer)
            result, after, layer = fused(query, key, value), layer, before
            torch.testing.assert_close(result, step(query, key, value), rtol=1e-4, atol=1e-4)
            layer = after
    assert not {DEQUANTIZE, READ_CACHE, SINGLE_QUERY} & set(fuse.calls)
