"""Attention over an MXCache on a GPU: what becomes `mx::attend_packed`, on tensors without data, and what is left."""

import math

import pytest
import torch
from attention_steps import BATCH, HEADS, KEYS, SHARED, Step

from mxcompile.formats import parse_format
from mxcompile.inductor.rewrites.fuse_packed_attention import fuse_packed_attention
from mxcompile.ops import ATTEND_PACKED, DEQUANTIZE, ROTATE

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
