"""Attention of one query on a GPU: which forms of it become `mx::attend`, on tensors without data, and what is left.

That the kernel runs, and is right, on a GPU: `test_cuda.py` and `kernels/test_triton_gpu.py`.
"""

import pytest
import torch
from attention_steps import BATCH, HEADS, KEYS, SHARED, SIZE, Step

from mxcompile.inductor import backend, why_no_inductor
from mxcompile.inductor.rewrites import fuse_attention
from mxcompile.ops import ATTEND

triton_elements = pytest.importorskip("mxcompile.kernels.triton.elements")
aten = torch.ops.aten
CUDNN = aten._scaled_dot_product_cudnn_attention.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
FLASH = aten._scaled_dot_product_flash_attention.default


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A GPU that is asked for its capability, and for nothing else."""
    monkeypatch.setattr(triton_elements, "capability", lambda device: (9, 0))


def step(queries=1, size=SIZE, dtype=torch.bfloat16, heads=SHARED):
    """A step, its query, and its keys and values in the heads that the cache has."""
    made = Step()
    query = made.given("query", BATCH, HEADS, queries, size, dtype=dtype)
    return made, query, *(made.given(name, BATCH, heads, KEYS, size, dtype=dtype) for name in ("key", "value"))


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize(
    ("target", "args"),
    [(CUDNN, (None, False)), (EFFICIENT, (None, False)), (FLASH, ())],
    ids=["cudnn", "efficient", "flash"],
)
def test_the_cache_is_taken_as_it_is(target, args, copied):
    made, query, key, value = step()
    made.attention(
        target, query, made.repeated(key, copied=copied), made.repeated(value, copied=copied), *args, scale=0.5
    )
    count, calls = made.rewritten(fuse_attention.fuse_attention)
    assert count == 1
    assert [node.target for node in calls] == [ATTEND, aten.permute.default]
    assert calls[0].args == (query, key, value, None, 0.5)
    assert calls[0].meta["val"].shape == (BATCH, HEADS, 1, SIZE)
    assert calls[0].meta["val"].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 1, 1, KEYS), (BATCH, 1, 1, KEYS), (BATCH, HEADS, 1, KEYS), (1, KEYS)], ids=str)
@pytest.mark.parametrize("target", [CUDNN, EFFICIENT], ids=["cudnn", "efficient"])
def test_a_mask_is_taken_as_it_is_before_it_is_expanded(target, shape):
    made, query, key, value = step()
    mask = made.given("mask", *shape)
    expanded = made.call(aten.expand.default, mask, [BATCH, HEADS, 1, KEYS])
    made.attention(target, query, made.repeated(key), made.repeated(value), expanded, False)
    count, calls = made.rewritten(fuse_attention.fuse_attention)
    assert count == 1
    assert [node.target for node in calls] == [ATTEND, aten.permute.default]
    assert calls[0].args == (query, key, value, mask, SIZE**-0.5)


def test_heads_that_are_not_repeated():
    made, query, key, value = step(heads=HEADS)
    made.attention(FLASH, query, key, value)
    count, calls = made.rewritten(fuse_attention.fuse_attention)
    assert count == 1
    assert calls[0].args[:3] == (query, key, value)


def test_heads_in_another_order_stay_as_they_were_made():
    """`repeat(1, 4, 1, 1)`: all heads, and all of them again. Values are then taken repeated, too."""
    made, query, key, value = step()
    several = made.call(aten.expand.default, made.call(aten.unsqueeze.default, key, 1), [BATCH, 4, SHARED, KEYS, SIZE])
    several = made.call(aten.reshape.default, several, [BATCH, HEADS, KEYS, SIZE])
    repeated = made.repeated(value)
    made.attention(FLASH, query, several, repeated)
    count, calls = made.rewritten(fuse_attention.fuse_attention)
    assert count == 1
    assert calls[-2].args[:3] == (query, several, repeated)


def test_another_reader_keeps_the_repeated_keys():
    made, query, key, value = step()
    repeated = made.repeated(key)
    made.call(aten.neg.default, repeated)
    made.attention(FLASH, query, repeated, made.repeated(value))
    count, calls = made.rewritten(fuse_attention.fuse_attention)
    assert count == 1
    assert repeated in calls
    assert calls[-2].args[:3] == (query, key, value)


def test_sizes_of_batch_and_cache_may_be_unknown():
    made = Step()
    batch, keys = made.sizes(5, 77)
    query = made.given("query", batch, HEADS, 1, SIZE)
    key, value = (made.given(name, batch, SHARED, keys, SIZE) for name in ("key", "value"))
    mask = made.given("mask", batch, 1, 1, keys)
    made.attention(CUDNN, query, made.repeated(key), made.repeated(value), mask, False)
    count, calls = made.rewritten(fuse_attention.fuse_attention)
    assert count == 1
    assert calls[-2].args[:4] == (query, key, value, mask)
    assert not made.mode.shape_env.guards


@pytest.mark.parametrize("known", ["key", "value"])
def test_the_size_of_a_cache_may_be_known_of_one_part_alone(known):
    """Dynamo takes for variable what had another size in an earlier call, as the values of another kind of cache."""
    made = Step()
    (keys,) = made.sizes(KEYS)
    query, mask = made.given("query", 1, HEADS, 1, SIZE), made.given("mask", 1, 1, 1, KEYS)
    key, value = (made.given(name, 1, SHARED, KEYS if name == known else keys, SIZE) for name in ("key", "value"))
    made.attention(CUDNN, query, made.repeated(key), made.repeated(value), mask, False)
    count, calls = made.rewritten(fuse_attention.fuse_attention)
    assert count == 1
    assert calls[-2].args[:4] == (query, key, value, mask)
    assert not made.mode.shape_env.guards


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ({"queries": 2}, {}),
        ({}, {"is_causal": True}),
        ({}, {"dropout_p": 0.1}),
        ({}, {"index": 1}),
        ({"dtype": torch.float64}, {}),
        ({"size": 272}, {}),
    ],
    ids=["two queries", "a causal mask", "dropout", "logarithms", "float64", "large heads"],
)
def test_other_attention_is_left_alone(what, options):
    made, query, key, value = step(**what)
    made.attention(FLASH, query, made.repeated(key), made.repeated(value), **options)
    before = list(made.graph.nodes)
    assert made.rewritten(fuse_attention.fuse_attention)[0] == 0
    assert list(made.graph.nodes) == before


def test_an_old_gpu_keeps_its_kernels(monkeypatch):
    monkeypatch.setattr(triton_elements, "capability", lambda device: (7, 5))
    made, query, key, value = step()
    made.attention(EFFICIENT, query, made.repeated(key), made.repeated(value), None, False)
    assert made.rewritten(fuse_attention.fuse_attention)[0] == 0


def test_it_is_part_of_what_a_graph_is_compiled_with():
    made, query, key, value = step()
    made.attention(CUDNN, query, made.repeated(key), made.repeated(value), None, False)
    backend.FuseMX()(made.graph)
    assert made.graph.find_nodes(op="call_function", target=ATTEND)


@pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")
@torch.no_grad()
def test_a_cache_is_written_in_place_and_read_where_it_is():
    """The operator compiled, on the CPU as an example: nothing of the cache's size is made."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    def call(query, key, value, keys, values, place, mask):
        keys.index_copy_(2, place, key)
        values.index_copy_(2, place, value)
        added = torch.where(mask, 0.0, -65536.0)
        return ATTEND((query * 2).transpose(1, 2), keys, values, added, 0.3).transpose(1, 2) + 1

    sizes = {"query": (1, 1, 8, 16), "key": (1, 2, 1, 16), "value": (1, 2, 1, 16)}
    given = [torch.randn(*size) for size in (*sizes.values(), (1, 2, KEYS, 16), (1, 2, KEYS, 16))]
    given += [torch.tensor([5]), torch.arange(KEYS)[None, None, None] <= 5]
    copies = [part.clone() for part in given]
    torch._dynamo.reset()
    with fresh_cache():
        y, codes = run_and_get_code(torch.compile(call), *given)
    torch.testing.assert_close(y, call(*copies), rtol=0, atol=1e-6)
    assert torch.equal(given[3], copies[3])
    assert "mx.attend" in codes[0]
    assert f"empty_strided_cpu((1, 2, {KEYS}, 16)" not in codes[0]
