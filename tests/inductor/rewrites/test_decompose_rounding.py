"""Rounding of activations, decomposed: what is rewritten, bits of the reference, and one kernel with the producers.

A GPU is what it is for. Here the rewrite is asked for on the CPU, where Inductor writes C++ of the same operations.
"""

import re

import pytest
import torch
from crossed import crossed
from roundings import CASES, MANY, assert_same_bits, gated, hard_values, rounded, rounded_in_many_ways
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import mxcompile
from mxcompile.formats import BLOCK_SIZES, MXFP4, MXFP8_E4M3, MXINT8, ScaleRule
from mxcompile.inductor import backend, why_no_inductor
from mxcompile.inductor.rewrites import decompose_rounding, fuse
from mxcompile.numerics import reference
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.ops import QUANTIZE_DEQUANTIZE

needs_compiler = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPILED_DTYPES = [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))]


def decomposed(function, *given, mode="fake"):
    """The graph of a function, rewritten as on a GPU; and how much was."""
    module = make_fx(function, tracing_mode=mode)(*given)
    count = decompose_rounding.decompose_rounding(module.graph, ("cpu",))
    module.graph.lint()
    module.recompile()
    return module, count


def calls(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("fmt", "operations"), [(MXINT8, 29), (MXFP8_E4M3, 38)])
def test_before_and_after(fmt, operations):
    """One maximum over blocks, everything else elementwise or a view."""
    x = torch.randn(3, 5, 64)
    module, count = decomposed(lambda x: rounded(x, fmt, ScaleRule.FLOOR), x)
    assert count == 1
    assert QUANTIZE_DEQUANTIZE not in calls(module)
    assert calls(module).count(torch.ops.aten.amax.default) == 1
    assert len(calls(module)) == operations
    assert_same_bits(module(x), reference.quantize_dequantize(x, fmt, ScaleRule.FLOOR))
    assert decompose_rounding.decompose_rounding(module.graph, ("cpu",)) == 0


@pytest.mark.parametrize(
    ("x", "fmt", "rule"),
    [
        (torch.randn(3, 48), MXINT8, ScaleRule.FLOOR),
        (torch.randn(3, 64), MXINT8.with_block(128), ScaleRule.FLOOR),
        (torch.randn(3, 64), MXINT8, ScaleRule.MSE),
        (torch.randn(3, 64, dtype=torch.float64), MXINT8, ScaleRule.FLOOR),
        (torch.randn(0, 64), MXINT8, ScaleRule.FLOOR),
    ],
    ids=["part of a block", "less than a block", "a search", "float64", "nothing"],
)
def test_what_is_left_alone(x, fmt, rule):
    module, count = decomposed(lambda x: rounded(x, fmt, rule), x)
    assert (count, calls(module)) == (0, [QUANTIZE_DEQUANTIZE])


def test_the_cpu_is_left_alone():
    module = make_fx(lambda x: rounded(x, MXINT8, ScaleRule.FLOOR))(torch.randn(3, 64))
    assert decompose_rounding.decompose_rounding(module.graph) == 0
    backend.FuseMX()(module.graph)
    assert calls(module) == [QUANTIZE_DEQUANTIZE]


def test_a_size_that_is_not_known_is_left_alone():
    assert decomposed(lambda x: rounded(x, MXINT8, ScaleRule.FLOOR), torch.randn(3, 64), mode="symbolic")[1] == 0


@pytest.mark.parametrize(("case", "dtype"), crossed(CASES, DTYPES), ids=str)
def test_bits_of_the_reference(case, dtype):
    fmt, rule = case
    x = hard_values(128, dtype)
    module, count = decomposed(lambda x: rounded(x, fmt, rule), x)
    assert count == 1
    assert_same_bits(module(x), reference.quantize_dequantize(x, fmt, rule))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [128, 70])
def test_aligning_has_bits_of_the_reference(size, dtype):
    """Decomposed if its blocks are whole, else done by the operator."""

    def aligned(x):
        return rounded(x, MXFP8_E4M3.with_alignment(), ScaleRule.RCEIL)

    x = hard_values(size, dtype)
    module, count = decomposed(aligned, x)
    assert count == (size % 32 == 0)
    assert_same_bits(module(x), aligned(x))
    assert_same_bits(aligned(x), reference.align(reference.quantize_dequantize(x, MXFP8_E4M3, ScaleRule.RCEIL)))


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("fmt", [MXINT8, MXFP4], ids=str)
def test_other_blocks(fmt, block):
    fmt, x = fmt.with_block(block), hard_values(256, torch.bfloat16)
    module, _ = decomposed(lambda x: rounded(x, fmt, ScaleRule.EVEN), x)
    assert_same_bits(module(x), reference.quantize_dequantize(x, fmt, ScaleRule.EVEN))


@pytest.mark.parametrize("shape", [(64,), (7, 64), (2, 3, 5, 32), (1, 1, 96)], ids=str)
def test_other_shapes_and_strides(shape):
    """The result is contiguous, as the operator's is."""
    for x in (torch.randn(shape), torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))):
        module, count = decomposed(lambda x: rounded(x, MXFP4, ScaleRule.FLOOR), x)
        assert (count, module(x).is_contiguous()) == (1, True)
        assert_same_bits(module(x), reference.quantize_dequantize(x, MXFP4, ScaleRule.FLOOR))


class DecomposingFuse(backend.FuseMX):
    """FuseMX that decomposes rounding on the CPU, before it is joined with linears; counts what it decomposed."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __call__(self, graph):
        fuse.fuse(graph)
        self.counts.append(decompose_rounding.decompose_rounding(graph, ("cpu",)))
        super().__call__(graph)


@torch.no_grad()
def compiled(function, *given):
    """What a compiled function gives, the code of its kernels, and how many roundings were decomposed in each graph."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    decomposing = DecomposingFuse()
    torch._dynamo.reset()
    with fresh_cache():
        made = torch.compile(function, options=backend.compile_options(decomposing))
        y, code = run_and_get_code(made, *given)
    return made, y, "".join(code), decomposing.counts


def kernels(code):
    """Names of the kernels, and of the operators of ours that are called."""
    return re.findall(r"^(\w+) = async_compile", code, re.MULTILINE), re.findall(r"torch\.ops\.mx\.(\w+)", code)


@needs_compiler
@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_compiled_values_from_memory_have_the_bits_of_the_reference(dtype):
    """Whatever the compiler knows of sums that cancel, of subnormals or of NaN."""
    x = hard_values(64, dtype)
    _, results, _, counts = compiled(rounded_in_many_ways, x)
    assert counts == [len(MANY)]
    for y, case in zip(results, MANY, strict=True):
        assert_same_bits(y, reference.quantize_dequantize(x, *case))


@needs_compiler
@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_compiled_aligned_values_have_the_bits_of_the_reference(dtype):
    x = hard_values(64, dtype)
    _, y, code, counts = compiled(lambda x: rounded(x, MXFP8_E4M3.with_alignment(), ScaleRule.RCEIL), x)
    assert (counts, kernels(code)[1]) == ([1], [])
    assert_same_bits(y, reference.align(reference.quantize_dequantize(x, MXFP8_E4M3, ScaleRule.RCEIL)))


@needs_compiler
def test_compiled_with_what_makes_it_it_is_one_kernel():
    given = torch.randn(5, 256), torch.randn(5, 256)
    _, y, code, counts = compiled(gated, *given)
    names, operators = kernels(code)
    assert (counts, len(names), operators) == ([1], 1, [])
    torch.testing.assert_close(y, gated(*given), rtol=0, atol=2.0**-6)


@needs_compiler
@torch.no_grad()
def test_compiled_for_all_lengths():
    """Two lengths that are not known, and a linear that reads rows of both."""

    def call(gate, up, weight):
        return gated(gate, up).flatten(0, 1) @ weight

    def given(batch, length):
        tensors = [torch.randn(batch, length, 64) for _ in range(2)]
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, [0, 1])
        return *tensors, torch.eye(64)

    first, second = given(3, 5), given(2, 9)
    made, y, code, counts = compiled(call, *first)
    assert (len(kernels(code)[0]), kernels(code)[1]) == (1, [])
    torch.testing.assert_close(y, call(*first), rtol=0, atol=2.0**-6)
    torch.testing.assert_close(made(*second), call(*second), rtol=0, atol=2.0**-6)
    assert counts == [1]


class Block(nn.Module):
    """A norm that three linears read, and a gated product that one does."""

    def __init__(self):
        super().__init__()
        self.norm, self.down = nn.RMSNorm(64), nn.Linear(96, 64)
        self.gate, self.up, self.other = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(64, 32)

    def forward(self, x):
        normed = self.norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed)), self.other(normed)


@needs_compiler
def test_linears_read_what_was_opened():
    """Two roundings, the first for three linears, on which views go on; no call but that of linears is left."""
    x = torch.randn(2, 5, 64)
    block = mxcompile.quantize_and_compile(Block().eval(), x, recipe="w4a8-mxint-quick", compile=False)
    _, results, code, counts = compiled(block, x)
    assert counts == [2]
    assert set(kernels(code)[1]) == {"cpu_linears", "linear"}
    for y, wanted in zip(results, block(x), strict=True):
        assert sqnr_db(wanted, y) > 40
