"""Attention over an MXCache on a GPU: what becomes `mx::attend_packed`, on tensors without data, and what is left."""

import math

import pytest
import torch
from attention_steps import BATCH, HEADS, KEYS, SHARED, Step

from mxcompile.formats import parse_format
from mxcompile.graph.dataflow import shapes_are_equal
from mxcompile.inductor.rewrites.fuse_packed_attention import fuse_packed_attention
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.ops import ATTEND_PACKED, ATTEND_PACKED_EXACT, DEQUANTIZE, READ_CACHE, ROTATE
from mxcompile.tensor.cache_layers import GrowingLayer

triton_elements = pytest.importorskip("mxcompile.kernels.triton.elements")
aten = torch.ops.aten
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
FLASH = aten._scaled_dot_product_flash_attention.default
SIZE = 64


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A GPU that is asked for its capability, and for nothing else."""
    monkeypatch.setattr(triton_elements, "capability", lambda device: (9, 0))


def packed(made, name, fmt, tokens=KEYS):
    """Elements and scales of a cache as inputs, and the values that they stand for."""
    layout = parse_format(fmt)
    widths = {"elements": SIZE // layout.block_size * layout.block_bytes, "scales": SIZE // layout.block_size}
    parts = [made.given(f"{name}_{part}", BATCH, SHARED, tokens, w, dtype=torch.uint8) for part, w in widths.items()]
    return parts, made.call(DEQUANTIZE, *parts, fmt, SIZE, torch.bfloat16)


def step(queries=1, fmt="mxint8", value="mxint4"):
    made = Step()
    query = made.given("query", BATCH, HEADS, queries, SIZE)
    return made, query, packed(made, "key", fmt), packed(made, "value", value)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_bytes_are_read_as_the_cache_holds_them(scale):
    made, query, (keys, key), (values, value) = step()
    mask = made.given("mask", BATCH, 1, 1, KEYS)
    expanded = made.call(aten.expand.default, mask, [BATCH, HEADS, 1, KEYS])
    made.attention(EFFICIENT, query, made.repeated(key), made.repeated(value), expanded, False, scale=scale)
    count, nodes = made.rewritten(fuse_packed_attention)
    fused = next(node for node in nodes if node.target is ATTEND_PACKED)
    assert count == 1
    wanted = 1 / math.sqrt(SIZE) if scale is None else scale
    assert fused.args == (query, *keys, *values, mask, wanted, "mxint8", "mxint4", SIZE)
    assert not {DEQUANTIZE, EFFICIENT, aten.clone.default} & {node.target for node in nodes}


def test_how_many_tokens_there_are_need_not_be_known():
    made = Step()
    (tokens,) = made.sizes(37)
    query = made.given("query", BATCH, HEADS, 1, SIZE)
    (keys, key), (values, value) = (packed(made, name, "mxint8", tokens) for name in ("key", "value"))
    made.attention(FLASH, query, made.repeated(key), made.repeated(value))
    count, nodes = made.rewritten(fuse_packed_attention)
    fused = next(node for node in nodes if node.target is ATTEND_PACKED)
    assert (count, fused.args[:5]) == (1, (query, *keys, *values))


@pytest.mark.parametrize("factor", [1, 2])
def test_the_query_is_rotated_in_place_of_all_keys(factor):
    made, query, (keys, key), (_, value) = step(1, "mxint4", "mxint4")
    key = made.call(ROTATE, key, SIZE)
    key = made.call(aten.mul.Tensor, key, factor) if factor > 1 else key
    made.attention(FLASH, query, made.repeated(key), made.repeated(value), scale=0.5)
    count, nodes = made.rewritten(fuse_packed_attention)
    fused = next(node for node in nodes if node.target is ATTEND_PACKED)
    assert count == 1
    assert fused.args[0].target is ROTATE
    assert fused.args[0].args == (query, SIZE)
    assert fused.args[1] is keys[0]
    assert fused.args[6] == 0.5 * factor
    assert [node.target for node in nodes].count(ROTATE) == 1


def test_a_prompt_and_exact_tokens_among_them_are_left():
    for queries, is_exact in ((5, False), (1, True)):
        made, query, (_, key), (_, value) = step(queries)
        if is_exact:
            key = made.call(aten.slice_scatter.default, key, made.given("new", BATCH, SHARED, 1, SIZE), 2, 0, 1)
        made.attention(FLASH, query, made.repeated(key), made.repeated(value))
        count, nodes = made.rewritten(fuse_packed_attention)
        assert count == 0
        assert [node.target for node in nodes].count(DEQUANTIZE) == 2


def read(made, name, fmt, held, place, block=1, window=32, tokens=KEYS):
    """What a cache with exact tokens reads, and the operands that a kernel needs of it."""
    parts, _ = packed(made, name, fmt, tokens)
    exact = [made.given(f"{name}_{part}", BATCH, SHARED, n, SIZE) for part, n in (("own", 1), ("newest", 63))]
    return (parts, exact), made.call(READ_CACHE, *parts, *exact, None, held, place, fmt, block, window)


@pytest.mark.parametrize("block", [1, SIZE, 32])
def test_exact_tokens_are_read_beside_packed_ones(block):
    made = Step()
    query, mask = made.given("query", BATCH, HEADS, 1, SIZE), made.given("mask", BATCH, 1, 1, KEYS)
    held, place = made.given("held", 63, dtype=torch.int64), made.given("place", 1, dtype=torch.int64)
    (keys, exact_keys), key = read(made, "key", "mxint4", held, place, block)
    (values, exact_values), value = read(made, "value", "mxint4", held, place)
    made.attention(EFFICIENT, query, made.repeated(key), made.repeated(value), mask, False, scale=0.5)
    count, nodes = made.rewritten(fuse_packed_attention)
    fused = next(node for node in nodes if node.target is ATTEND_PACKED_EXACT)
    assert count == 1
    exact = [part for pair in zip(exact_keys, exact_values, strict=True) for part in pair]
    assert fused.args[0] is query
    assert fused.args[2:] == (*keys, *values, *exact, None, None, held, place, mask, 0.5, "mxint4", "mxint4", 32)
    assert [node.target for node in nodes].count(ROTATE) == (block > 1)
    turned = fused.args[1]
    if block == 32:  # of 2**n channels, a rotation halves one time too often where n is odd
        assert (turned.target, turned.args[1]) == (aten.mul.Tensor, 2)
        turned = turned.args[0]
    assert turned is query if block == 1 else turned.args == (query, block)
    assert not {READ_CACHE, EFFICIENT, aten.clone.default} & {node.target for node in nodes}


def test_a_growing_cache_with_exact_tokens():
    made = Step()
    (tokens,) = made.sizes(37)
    query = made.given("query", BATCH, HEADS, 1, SIZE)
    held, place = made.given("held", 63, dtype=torch.int64), made.given("place", 1, dtype=torch.int64)
    ((keys, _), key), ((values, _), value) = (
        read(made, name, "mxint4", held, place, tokens=tokens) for name in ("key", "value")
    )
    made.attention(FLASH, query, made.repeated(key), made.repeated(value))
    count, nodes = made.rewritten(fuse_packed_attention)
    fused = next(node for node in nodes if node.target is ATTEND_PACKED_EXACT)
    assert (count, fused.args[2:6]) == (1, (*keys, *values))


@pytest.mark.parametrize("form", ["key=mxint8,value=mxint4,window=4,sink=2", "mxint8"])
def test_keys_and_values_of_a_growing_layer_are_known_to_be_equally_many(form):
    """Compiled, each of its four tensors has a length of its own; without the layer's word nothing would be fused."""
    layer, shapes = GrowingLayer(CacheFormat.parse(form)), []
    layer.update(*torch.randn(2, BATCH, SHARED, 9, SIZE))

    def recorded(module, inputs):
        (output,) = module.graph.find_nodes(op="output")
        shapes.append([node.meta["example_value"].shape for node in output.args[0]])
        return module.forward

    torch._dynamo.reset()
    step = torch.compile(layer.update, backend=recorded, fullgraph=True)
    for _ in range(3):
        step(*torch.randn(2, BATCH, SHARED, 1, SIZE))
    keys, values = shapes[-1][:2]
    assert isinstance(keys[2], torch.SymInt)
    assert shapes_are_equal(keys, values)


@pytest.mark.parametrize("other", ["window", "place", "queries", "values rotated", "one side"])
def test_what_two_caches_read_is_left(other):
    made = Step()
    query = made.given("query", BATCH, HEADS, 3 if other == "queries" else 1, SIZE)
    held, *places = (made.given(name, n, dtype=torch.int64) for name, n in (("held", 63), ("place", 1), ("later", 1)))
    _, key = read(made, "key", "mxint4", held, places[0])
    window, block = 8 if other == "window" else 32, SIZE if other == "values rotated" else 1
    _, value = read(made, "value", "mxint4", held, places[other == "place"], block, window)
    if other == "one side":
        _, value = packed(made, "other", "mxint4")
    made.attention(FLASH, query, made.repeated(key), made.repeated(value))
    assert made.rewritten(fuse_packed_attention)[0] == 0


def test_other_attention_is_for_the_other_rewrite():
    made = Step()
    query = made.given("query", BATCH, HEADS, 1, SIZE)
    key, value = (made.given(name, BATCH, SHARED, KEYS, SIZE) for name in ("key", "value"))
    made.attention(FLASH, query, made.repeated(key), made.repeated(value))
    assert made.rewritten(fuse_packed_attention)[0] == 0


def test_what_no_kernel_takes_is_decoded_by_inductor(monkeypatch):
    monkeypatch.setattr(triton_elements, "capability", lambda device: (7, 5))
    made, query, (_, key), (_, value) = step()
    made.attention(FLASH, query, made.repeated(key), made.repeated(value))
    assert made.rewritten(fuse_packed_attention)[0] == 0
