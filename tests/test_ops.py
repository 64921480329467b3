"""The mx:: operators: eager equals the reference bit for bit, fake shapes equal real shapes, wrong arguments raise
clear errors, and operators can be exported.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from mxcompile.errors import MXCompileError, UnknownNameError
from mxcompile.formats import BLOCK_SIZES, FORMATS, MXFP4, MXFP8_E4M3, MXINT4, MXINT8, ScaleRule, activation_rule
from mxcompile.kernels.layout import planes as plane_layouts
from mxcompile.kernels.layout import rows_to_planes
from mxcompile.numerics import packing, reference
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.cached_attention import cached_attention
from mxcompile.numerics.straight_through import saturated
from mxcompile.ops import ATTEND, CACHED_ATTENTION, DEQUANTIZE, LINEAR, MULTIPLY, QUANTIZE, QUANTIZE_DEQUANTIZE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
examples = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def packed(weight: Tensor, fmt) -> tuple[Tensor, Tensor]:
    return QUANTIZE(weight, str(fmt), str(activation_rule(fmt)))


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_is_the_reference(fmt, dtype):
    rule = activation_rule(fmt)
    x = torch.randn(3, 5, 100).to(dtype)
    codes, scales = reference.quantize(x, fmt, rule)
    elements, bytes_ = QUANTIZE(x, str(fmt), str(rule))
    assert torch.equal(elements, packing.pack(codes, fmt))
    assert torch.equal(bytes_, scales)
    values = reference.dequantize(codes, scales, fmt, 100, dtype)
    assert torch.equal(DEQUANTIZE(elements, bytes_, str(fmt), 100, dtype), values)
    fused = QUANTIZE_DEQUANTIZE(x, str(fmt), str(rule))
    assert fused.dtype == dtype
    assert torch.equal(fused, values)


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_dequantize_and_linear(fmt, dtype, bias):
    x, b = torch.randn(3, 5, 100).to(dtype), torch.randn(24).to(dtype) if bias else None
    elements, scales = packed(torch.randn(24, 100), fmt)
    weight = DEQUANTIZE(elements, scales, str(fmt), 100, dtype)
    # bit for bit: on the CPU both are one call of torch's own linear on the same weight, in float32 where the processor
    # has no fast products of the dtype
    y, wide = LINEAR(x, elements, scales, b, str(fmt)), None if b is None else b.float()
    as_float32 = nn.functional.linear(x.float(), weight.float(), wide).to(dtype)
    assert torch.equal(y, nn.functional.linear(x, weight, b)) or torch.equal(y, as_float32)


def test_every_scale_rule_has_its_word():
    x = torch.randn(4, 64) * torch.logspace(-3, 3, 64)
    for rule in ScaleRule:
        _, expected = reference.quantize(x, MXFP4, rule)
        assert torch.equal(QUANTIZE(x, "mxfp4", str(rule))[1], expected)


def test_a_block_size_is_part_of_the_format():
    x = torch.randn(2, 100)
    for block in BLOCK_SIZES:
        elements, scales = QUANTIZE(x, f"mxint4:{block}", "floor")
        assert scales.shape == (2, -(-100 // block))
        assert elements.shape == (2, scales.shape[1] * block // 2)


def calls(x: Tensor, fmt, size: int) -> list[tuple]:
    rule = str(activation_rule(fmt))
    elements, scales = QUANTIZE(torch.ones(7, size), str(fmt), rule)
    return [
        (QUANTIZE, (x, str(fmt), rule)),
        (DEQUANTIZE, (elements, scales, str(fmt), size, x.dtype)),
        (QUANTIZE_DEQUANTIZE, (x, str(fmt), rule)),
        (MULTIPLY, (x, torch.ones(size, dtype=x.dtype), "ones")),
        (LINEAR, (x, elements, scales, torch.ones(7, dtype=x.dtype), str(fmt))),
        (LINEAR, (x, elements, scales, None, str(fmt))),
    ]


def real_and_fake(op, args) -> list[tuple[Tensor, Tensor]]:
    mode = FakeTensorMode()
    fakes = op(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
    return list(zip(tree_leaves(op(*args)), tree_leaves(fakes), strict=True))


@settings(examples, max_examples=20)
@given(
    fmt=st.sampled_from([*FORMATS.values(), *(MXFP4.with_block(block) for block in BLOCK_SIZES)]),
    leading=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    size=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
)
def test_shapes_without_data(fmt, leading, size, dtype):
    for op, args in calls(torch.ones(*leading, size, dtype=dtype), fmt, size):
        for real, fake in real_and_fake(op, args):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


@pytest.mark.parametrize("size", [128, 100])
def test_strides_without_data(size):
    """torch.compile allocates by the strides of the fake result and fails if the real strides differ."""
    dense = torch.ones(2, 5, size)
    for x in (dense, dense.bfloat16(), dense.transpose(0, 1), torch.ones(2, size, 5).mT, dense[:, ::2]):
        for op, args in calls(x, MXINT8, size):
            for real, fake in real_and_fake(op, args):
                assert real.stride() == fake.stride(), op


@pytest.mark.parametrize("size", [128, 100])
@pytest.mark.parametrize("fmt", [MXINT8, MXINT4.with_block(64), MXFP8_E4M3], ids=str)
def test_torchs_own_check_of_operators(fmt, size):
    for op, args in calls(torch.randn(2, 3, size), fmt, size):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


ATTENTION_MASKS = {
    "none": None,
    "of all": torch.tensor([[0.5, -65536.0, 0.0, 2.0, -1.0]]),
    "of each head": torch.linspace(-1, 1, 60).view(2, 6, 1, 5),
    "bool": torch.tensor([[True, False, True, True, False], [False] * 5])[:, None, None],
}


@pytest.mark.parametrize("mask", ATTENTION_MASKS.values(), ids=ATTENTION_MASKS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)])
def test_attention_of_one_query_with_heads_that_share_keys(dtype, bound, mask):
    """Against float64, zero where every key is masked; bfloat16 rounds the result, which is below 2, once."""
    query, key, value = torch.rand(2, 6, 1, 8), torch.rand(2, 2, 5, 8), torch.rand(2, 2, 5, 4)
    args = (query.to(dtype), key.to(dtype), value.to(dtype), mask, 0.4)
    query, key, value = (part.double() for part in args[:3])
    scores = query @ key.repeat_interleave(3, 1).mT * 0.4
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask)
    expected = scores.softmax(-1).nan_to_num(0.0) @ value.repeat_interleave(3, 1)
    y = ATTEND(*args)
    assert (y.dtype, y.shape) == (dtype, (2, 6, 1, 4))
    assert (y.double() - expected).abs().max() <= bound
    torch.library.opcheck(ATTEND, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    strided = (args[0].transpose(1, 2).contiguous().transpose(1, 2), *args[1:])
    for real, fake in real_and_fake(ATTEND, strided):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_export_keeps_the_operators_and_dynamic_sizes():
    elements, scales = packed(torch.randn(24, 100), MXINT4)

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            weight = DEQUANTIZE(elements, scales, "mxint4", 100, x.dtype)
            return nn.functional.linear(QUANTIZE_DEQUANTIZE(x, "mxint8", "floor"), weight)

    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    with torch.no_grad():
        exported = torch.export.export(Layer(), (torch.randn(2, 5, 100),), dynamic_shapes=dynamic)
    targets = [node.target for node in exported.graph.nodes]
    assert DEQUANTIZE in targets
    assert QUANTIZE_DEQUANTIZE in targets
    x = torch.randn(3, 7, 100)
    assert torch.equal(exported.module()(x), Layer()(x))


# Errors: with data and without, since a graph is built without


def run(fake: bool, op, *args):
    mode = FakeTensorMode()
    return op(*(mode.from_tensor(arg) if fake and isinstance(arg, Tensor) else arg for arg in args))


eager_and_fake = pytest.mark.parametrize("fake", [False, True], ids=["eager", "fake"])
X, ELEMENTS, SCALES = torch.ones(2, 64), torch.zeros(7, 64, dtype=torch.uint8), torch.zeros(7, 2, dtype=torch.uint8)


@eager_and_fake
def test_unknown_formats_and_rules(fake):
    with pytest.raises(UnknownNameError, match="unknown format 'mxin4': did you mean mxint"):
        run(fake, QUANTIZE, X, "mxin4", "floor")
    with pytest.raises(UnknownNameError, match="unknown scale rule 'flor': did you mean floor"):
        run(fake, QUANTIZE, X, "mxint8", "flor")
    with pytest.raises(UnknownNameError, match="unknown format"):
        run(fake, LINEAR, X, ELEMENTS, SCALES, None, "int8")
    with pytest.raises(MXCompileError, match=r"scale rule 7\.25 is a threshold of mxfp4, not of mxint8"):
        run(fake, QUANTIZE_DEQUANTIZE, X, "mxint8", "7.25")


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        (DEQUANTIZE, (ELEMENTS, SCALES, "mxint8", 65, torch.float32), "2 scales for 65 values of mxint8"),
        (DEQUANTIZE, (ELEMENTS, SCALES, "mxint4", 64, torch.float32), "elements are not packed mxint4"),
        (DEQUANTIZE, (ELEMENTS.int(), SCALES, "mxint8", 64, torch.float32), "elements and scales must be uint8"),
        (DEQUANTIZE, (ELEMENTS, SCALES.float(), "mxint8", 64, torch.float32), "elements and scales must be uint8"),
        (LINEAR, (X[:, :30], ELEMENTS, SCALES, None, "mxint8"), "2 scales for 30 values of mxint8"),
        (LINEAR, (X, ELEMENTS[None], SCALES[None], None, "mxint8"), "mx::linear takes a 2-D weight, not 3-D"),
        (LINEAR, (X, ELEMENTS, SCALES, torch.ones(8), "mxint8"), "the shape of the bias does not match the weight"),
    ],
    ids=["size", "packing", "element dtype", "scale dtype", "in features", "3-D", "bias"],
)
def test_a_graph_with_bytes_that_do_not_fit_cannot_be_built(op, args, message):
    with pytest.raises(RuntimeError, match=message):
        run(True, op, *args)


# Gradients


@pytest.mark.parametrize("activation", [None, "mxint8"])
@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
def test_a_linear_has_the_gradients_of_the_dequantized_weight(activation, planes):
    x, bias = torch.randn(2, 3, 256, requires_grad=True), torch.randn(64, requires_grad=True)
    weight = packed(torch.randn(64, 256), MXINT4)
    values = DEQUANTIZE(*weight, "mxint4", 256, x.dtype)
    scaling = []
    if planes:
        scaling = [plane_layouts.scaling_for(*rows_to_planes.weight_scale_range(*weight, MXINT4, 256), MXINT4)]
        weight = rows_to_planes.convert_to_planes(*weight, MXINT4, 256, scaling[0])
    prepared = x if activation is None else QUANTIZE_DEQUANTIZE(x, activation, "floor")
    upstream = torch.randn(2, 3, 64)
    actual = torch.autograd.grad(LINEAR(prepared, *weight, bias, "mxint4", *scaling), [x, bias], upstream)
    expected = torch.autograd.grad(nn.functional.linear(x, values, bias), [x, bias], upstream)
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-4)  # sums of 64 products of size 3


@pytest.mark.parametrize("text", ["mxint8", "key=mxfp4,value=mxint4,window=4,rotate=head", "key=none,value=none"])
def test_attention_over_a_cache_passes_gradients_straight_through_its_rounding(text):
    """Those of attention over the rounded keys and values; a query that sees nothing, behind padding, gives none."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 12, 64, generator=generator) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    mask[0, :, :, :3] = False
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]

    def through(x, fmt, rule):
        passed = (x - x.detach()) * ~saturated(x.detach(), fmt, rule)
        return reference.quantize_dequantize(x.detach(), fmt, rule) + passed

    cache = CacheFormat.parse(text)
    expected = cached_attention(*leaves, mask, 0.125, False, cache, rounding=through)
    upstream = torch.randn(expected.shape, generator=generator)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    actual = CACHED_ATTENTION(*leaves, mask, 0.125, False, text, 0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    for gradient, other in zip(torch.autograd.grad(actual, leaves, upstream), wanted, strict=True):
        assert gradient.isfinite().all()
        assert gradient.norm() > 0
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_torchs_own_check_of_gradients():
    x, multiplier = torch.randn(3, 64, requires_grad=True), torch.rand(64)
    bias, weight = torch.randn(7, requires_grad=True), packed(torch.randn(7, 64), MXINT4)
    for op, args in [
        (QUANTIZE_DEQUANTIZE, (x, "mxint8", "floor")),
        (MULTIPLY, (x, multiplier, "digest")),
        (LINEAR, (x, *weight, bias, "mxint4")),
    ]:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
