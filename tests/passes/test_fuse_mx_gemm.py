"""fuse-mx-gemm: MX matmuls become mx::linear in both graph dialects; the others are reported with a reason."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.multiplier import insert_multiplier
from mxcompile.graph.printer import print_program, print_target
from mxcompile.inductor.rewrites.fuse import fuse, fused_linears
from mxcompile.ops import DEQUANTIZE, LINEAR, MULTIPLY, QUANTIZE, QUANTIZE_DEQUANTIZE
from mxcompile.passes.fuse_mx_gemm import FuseMXGemm
from mxcompile.pipeline.pipeline import Pipeline

W4A8 = "lower-mx{weight=mxint4,activation=mxint8}"


class Forms(nn.Module):
    """The ways PyTorch code multiplies by a weight: linear, addmm, matmul with a parameter or its transpose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 32)
        self.inner_first = nn.Parameter(torch.randn(32, 48))
        self.bias = nn.Parameter(torch.randn(48))
        self.outer_first = nn.Parameter(torch.randn(16, 48))

    def forward(self, x):
        y = torch.addmm(self.bias, self.linear(x), self.inner_first)
        return y @ self.outer_first.t()


class Experts(nn.Module):
    """A batched matmul with a 3-D weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.bmm(x, self.weight)


class AddedExperts(Experts):
    """The same with an added value."""

    def forward(self, x):
        return torch.baddbmm(x[..., :32], x, self.weight)


class Grouped(nn.Module):
    """A grouped matmul: rows sorted by expert, experts stored by output or by input channel."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        shape = (3, 64, 32) if transposed else (3, 32, 64)
        self.weight = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, ends):
        return torch._grouped_mm(x, self.weight if self.transposed else self.weight.transpose(1, 2), offs=ends)


def run(model, x, pipeline):
    return Pipeline.parse(pipeline).run(mxcompile.trace(model.eval(), x))


def calls(program):
    return [print_target(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_graph_after():
    program = run(Forms(), torch.randn(3, 64), f"{W4A8} | fuse-mx-gemm")
    assert calls(program) == ["mx.quantize_dequantize", "mx.linear"] * 3
    assert "%addmm_mx " in print_program(program)


def test_counts_every_fusion_and_keeps_no_unfused_node():
    program = run(Forms(), torch.randn(3, 64), f"{W4A8} | fuse-mx-gemm")
    assert (program.ledger[-1].rewrites, program.ledger[-1].misses) == (6, ())
    assert not [n for n in program.graph.nodes if n.target in (QUANTIZE, DEQUANTIZE)]


def test_computes_what_the_lowered_program_computes():
    """Equal on the CPU: the fused ops do the same arithmetic in the same order."""
    model, x = Forms(), torch.randn(3, 64)
    assert torch.equal(run(model, x, f"{W4A8} | fuse-mx-gemm")(x), run(model, x, W4A8)(x))


def test_a_batched_matmul_becomes_one_by_all_experts():
    model, x = Experts(), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    program = run(model, x, f"{W4A8} | fuse-mx-gemm")
    assert (program.ledger[-1].rewrites, program.ledger[-1].misses) == (2, ())
    assert calls(program).count("mx.grouped_linear") == 1
    assert not program.graph.find_nodes(op="call_function", target=DEQUANTIZE)
    torch.testing.assert_close(program(x), run(model, x, W4A8)(x), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_grouped_matmul_decodes_the_experts_that_have_rows(transposed):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    model = Grouped(transposed).bfloat16()
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)  # expert 1 has none
    program = run(model, (x, ends), f"{W4A8} | fuse-mx-gemm")
    assert (program.ledger[-1].rewrites, program.ledger[-1].misses) == (2, ())
    assert calls(program).count("mx.grouped_linear") == 1
    wanted = run(model, (x, ends), W4A8)(x, ends)
    program.tensor("weight_scales")[1] = 255
    torch.testing.assert_close(program(x, ends), wanted, rtol=2**-8, atol=1e-2)


def test_experts_with_an_added_value_are_a_near_miss():
    program = run(AddedExperts(), torch.randn(2, 5, 64), f"{W4A8} | fuse-mx-gemm")
    assert [str(miss) for miss in program.ledger[-1].misses] == [
        "%baddbmm: no fused kernel for aten.baddbmm.default: its weight is dequantized first"
    ]


def test_twice_is_once():
    once = run(Forms(), torch.randn(3, 64), f"{W4A8} | fuse-mx-gemm")
    twice = run(Forms(), torch.randn(3, 64), f"{W4A8} | fuse-mx-gemm | fuse-mx-gemm")
    assert twice.ledger[-1].rewrites == 0
    assert print_program(once) == print_program(twice)


def inductor_graph(x_dtype=torch.float32, weight_dtype=torch.float32, bias_shape=None, order=(1, 0)) -> Graph:
    """mm or addmm of a quantized activation and a permuted MX weight, as Inductor's post-grad passes see it."""
    graph = Graph()

    def node(value, target=None, *args):
        made = graph.placeholder(f"p{len(graph.nodes)}") if target is None else graph.call_function(target, args)
        made.meta["val"] = value
        return made

    x = node(torch.empty(3, 64, dtype=x_dtype))
    elements, scales = node(torch.empty(64, 32, dtype=torch.uint8)), node(torch.empty(64, 2, dtype=torch.uint8))
    weight = node(torch.empty(64, 64, dtype=weight_dtype), DEQUANTIZE, elements, scales, "mxint4", 64, weight_dtype)
    swapped = node(torch.empty(64, 64, dtype=weight_dtype), torch.ops.aten.permute.default, weight, list(order))
    if bias_shape is None:
        product = node(torch.empty(3, 64, dtype=x_dtype), torch.ops.aten.mm.default, x, swapped)
    else:
        bias = node(torch.empty(bias_shape, dtype=x_dtype))
        product = node(torch.empty(3, 64, dtype=x_dtype), torch.ops.aten.addmm.default, bias, x, swapped)
    graph.output(product)
    return graph


@pytest.mark.parametrize("bias_shape", [None, (64,)])
def test_fuses_inductors_dialect(bias_shape):
    graph = inductor_graph(bias_shape=bias_shape)
    assert fuse(graph).rewrites == 1
    (linear,) = fused_linears(graph)
    assert (linear.args[3] is None) == (bias_shape is None)
    GraphModule(nn.Module(), graph)  # still well formed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"weight_dtype": torch.bfloat16},
            "the weight is dequantized to torch.bfloat16, the activation is torch.float32",
        ),
        ({"bias_shape": (3, 1)}, "the added term of shape (3, 1) is not a bias"),
        ({"order": (0, 1)}, "the weight's blocks do not run along the contracted dimension"),
    ],
)
def test_near_misses_give_their_reason(change, reason):
    result = fuse(inductor_graph(**change))
    assert result.rewrites == 0
    assert [miss.reason.partition(": ")[2] for miss in result.misses] == [reason]


@pytest.mark.parametrize(
    ("second", "dtype", "left"),
    [("one", torch.float32, 1), ("two", torch.float32, 2), ("one", torch.bfloat16, 2)],
    ids=["equal", "other values", "other dtype"],
)
def test_products_with_multipliers_of_one_digest_are_one(second, dtype, left):
    graph = Graph()
    x, *multipliers = (graph.placeholder(name) for name in ("x", "m", "n"))
    products = [graph.call_function(MULTIPLY, (x, m, d)) for m, d in zip(multipliers, ("one", second), strict=True)]
    graph.output(tuple(products))
    for node, size in zip((x, *multipliers, *products), ((3, 64), 64, 64, (3, 64), (3, 64)), strict=True):
        node.meta["val"] = torch.empty(size, dtype=dtype if node is multipliers[1] else torch.float32)
    assert fuse(graph).rewrites == left
    assert [n.args[0] for n in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)] == [x] * left
    assert not graph.find_nodes(op="call_function", target=MULTIPLY)


def test_a_multiplied_value_is_quantized_once_in_a_program():
    program = mxcompile.trace(Forms(), torch.randn(3, 64))
    insert_multiplier(program, choose(program).matmuls[:1])
    fused = Pipeline.parse(f"{W4A8} | fuse-mx-gemm").run(program)
    assert calls(fused) == ["aten.mul.Tensor", *["mx.quantize_dequantize", "mx.linear"] * 3]


def test_fusing_a_float_program_is_refused():
    with pytest.raises(mxcompile.errors.PipelineError, match="fuse-mx-gemm cannot run after trace"):
        Pipeline([FuseMXGemm()])


def test_the_fused_program_keeps_types():
    program = run(Forms(), torch.randn(3, 64), f"{W4A8} | fuse-mx-gemm")
    for node in program.graph.nodes:
        if node.target in (LINEAR, QUANTIZE_DEQUANTIZE):
            assert node.meta["val"].dtype == torch.float32
