"""Aligned activations, `mxfp8_e4m3+aligned`: the same function in the graph, deployed, compiled and loaded."""

import operator
import sys

import pytest
import torch
from models import build, inputs
from torch import nn
from torch.fx import Graph

import mxcompile
from mxcompile.analysis.layers import find_layers
from mxcompile.checkpoint import Checkpoint
from mxcompile.cli.checkpoint_contents import CheckpointContents
from mxcompile.errors import CheckpointError, MXCompileError
from mxcompile.formats import MXFP4, MXFP8_E4M3, ScaleRule, parse_format
from mxcompile.graph.printer import print_program
from mxcompile.inductor import backend, why_no_inductor
from mxcompile.inductor.rewrites.join_linears import join_linears
from mxcompile.numerics import reference
from mxcompile.ops import CPU_LINEARS, DEQUANTIZE, LINEAR, LINEARS, QUANTIZE, QUANTIZE_DEQUANTIZE
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.weight import MXWeight, unfused_matmuls

PLAIN = "lower-mx{weight=mxfp4,activation=mxfp8_e4m3}"
ALIGNED = "lower-mx{weight=mxfp4,activation=mxfp8_e4m3+aligned}"
JOINING, SERVING = (
    sys.modules["mxcompile.inductor.rewrites.join_linears"],
    sys.modules["mxcompile.diagnostics.explain_quantized"],
)
needs_compiler = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")


class Two(nn.Module):
    """Two linears that read one value, and one that reads their product."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.gate, self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.down(self.gate(x) * self.up(x))


def apart(*shape):
    """Normal values in blocks that differ by up to 2**30."""
    generator = torch.Generator().manual_seed(1)
    powers = torch.randint(0, 31, (*shape[:-1], shape[-1] // 32), generator=generator).float().exp2()
    return torch.randn(*shape, generator=generator) * powers.repeat_interleave(32, -1)


def expected(model, x):
    def rounded(x):
        return reference.align(reference.quantize_dequantize(x, MXFP8_E4M3, ScaleRule.RCEIL))

    def linear(x, layer):
        weight = reference.quantize_dequantize(layer.weight, MXFP4, ScaleRule.MSE)
        return nn.functional.linear(rounded(x), weight, layer.bias)

    return linear(linear(x, model.gate) * linear(x, model.up), model.down)


def difference(y, wanted):
    return (y.double() - wanted.double()).norm() / wanted.double().norm()


def deployed(x=None, recipe=ALIGNED):
    return mxcompile.quantize_and_compile(Two(), apart(5, 64) if x is None else x, recipe=recipe, compile=False)


@torch.no_grad()
def test_the_graph_says_it_and_computes_it():
    model, x = Two(), apart(5, 64)
    program = Pipeline.parse(ALIGNED).run(mxcompile.trace(model, x))
    assert print_program(program).count("'mxfp8_e4m3+aligned'") == 4
    assert torch.equal(program(x), expected(model, x))
    assert {str(layer.input_rounding) for layer in find_layers(program).values()} == {"mxfp8_e4m3+aligned"}
    again = Pipeline.parse(ALIGNED).run(program)
    assert again.ledger[-1].rewrites == 0


@torch.no_grad()
def test_it_is_another_function():
    """By a little: what is small beside its token's largest loses bits."""
    model, x = Two().gate, apart(5, 64)
    plain, aligned = (Pipeline.parse(text).run(mxcompile.trace(model, x))(x) for text in (PLAIN, ALIGNED))
    assert 0 < difference(aligned, plain) < 1e-5


def test_text_of_the_pass():
    (lowering,) = Pipeline.parse(ALIGNED).passes
    assert lowering == LowerMX(MXFP4, MXFP8_E4M3.with_alignment())
    assert str(Pipeline([lowering])) == ALIGNED
    assert str(Pipeline.parse(PLAIN)) == PLAIN


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("mxfp4", "those of mxfp4 are e4m3 numbers times one power of two already"),
        ("mxfp6_e3m2:64", "those of mxfp6_e3m2 are e4m3 numbers"),
        ("mxint4", "those of mxint4 are e4m3 numbers"),
        ("mxint8", "those of mxint8 cannot be"),
        ("mxfp8_e5m2", "those of mxfp8_e5m2 cannot be"),
    ],
)
def test_other_activations_are_refused(activation, message):
    with pytest.raises(MXCompileError, match=rf"only mxfp8_e4m3 activations are aligned: {message}"):
        Pipeline.parse(f"lower-mx{{weight=mxfp4,activation={activation}+aligned}}")


@pytest.mark.parametrize("option", ["weight=mxfp8_e4m3+aligned", "weight=mxfp4,overrides=[*.up=mxfp8_e4m3+aligned]"])
def test_weights_are_not_aligned(option):
    with pytest.raises(MXCompileError, match=r"mxfp8_e4m3\+aligned: only activations can be aligned"):
        Pipeline.parse(f"lower-mx{{{option}}}")


def test_text_of_the_format():
    assert str(MXFP8_E4M3.with_block(64).with_alignment()) == "mxfp8_e4m3:64+aligned"
    assert parse_format("MXFP8:64+aligned") == MXFP8_E4M3.with_block(64).with_alignment()
    assert MXFP8_E4M3.with_alignment().with_alignment(False) == MXFP8_E4M3
    for text in ("mxfp8+aligned+aligned", "+aligned", "mxfp8_e4m3+aligned:64"):
        with pytest.raises(MXCompileError):
            parse_format(text)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_deployed_module_computes_it_with_kernels_and_without(tokens, dtype):
    module, x = deployed().to(dtype), apart(tokens, 64).to(dtype)
    weight = module.up.weight
    assert isinstance(weight, MXWeight)
    assert weight.layout_.activation == "mxfp8_e4m3+aligned"
    rounded = reference.align(reference.quantize_dequantize(x, MXFP8_E4M3, ScaleRule.RCEIL))
    assert torch.equal(weight.prepare(x), rounded)
    with unfused_matmuls():
        wanted = module(x)
    assert difference(module(x), wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_compiled_on_the_cpu(dtype):
    """One call for two linears, given aligned values and told of no rounding."""
    from torch._inductor.utils import fresh_cache

    seen = []

    class CountingFuse(backend.FuseMX):
        def __call__(self, graph):
            super().__call__(graph)
            steps = (CPU_LINEARS, LINEAR, QUANTIZE_DEQUANTIZE)
            seen.append([(node.target, node.args) for node in graph.nodes if node.target in steps])

    module, x = deployed().to(dtype), apart(5, 64).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(module, options=backend.compile_options(CountingFuse()))
    with fresh_cache():
        for given in (x, x[:1], apart(30, 64).to(dtype)):
            with unfused_matmuls():
                wanted = module(given)
            assert difference(compiled(given), wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert [target for target, _ in seen[0]] == [QUANTIZE_DEQUANTIZE, CPU_LINEARS, QUANTIZE_DEQUANTIZE, LINEAR]
    assert seen[0][1][1][5:7] == (None, None)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("view", [True, False])
def test_a_gpus_graph_takes_the_alignment_into_the_product_where_it_may_be_fast(monkeypatch, fast, view):
    """Which devices are fast is asked of the dispatcher; here there is none."""
    asked = []

    def why_not(x, fmt, planes, rounding):
        asked.append((fmt, tuple(planes), rounding))
        return None if fast else "it is no Hopper GPU"

    monkeypatch.setattr(JOINING, "why_not_fp8", why_not)
    graph, meta = Graph(), {"device": "meta", "dtype": torch.bfloat16}

    def call(target, *args, shape):
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(shape, **meta)
        return node

    shape = (2, 300, 64) if view else (600, 64)
    x, elements, scales = (graph.placeholder(name) for name in ("x", "elements", "scales"))
    x.meta["val"] = torch.empty(shape, **meta)
    value = call(QUANTIZE_DEQUANTIZE, x, "mxfp8_e4m3+aligned", "rceil", shape=shape)
    if view:
        value = call(torch.ops.aten.reshape.default, value, [600, 64], shape=(600, 64))
    products = [call(LINEAR, value, elements, scales, None, "mxfp4", (0, 120), shape=(600, 64)) for _ in range(2)]
    graph.output(products)
    assert join_linears(graph) == 1
    graph.lint()
    assert asked == [(MXFP4, (0, 120), (MXFP8_E4M3.with_alignment(), ScaleRule.RCEIL))]
    (joined,) = graph.find_nodes(op="call_function", target=LINEARS)
    rest = ("mxfp8_e4m3+aligned", "rceil", (0, 120)) if fast else (None, None, (0, 120))
    assert joined.args[5:] == rest
    left = [node.target for node in graph.nodes if node.op == "call_function"]
    before = [torch.ops.aten.reshape.default] if view else []
    steps = before if fast else [QUANTIZE_DEQUANTIZE, *before]
    assert left == [*steps, LINEARS, operator.getitem, operator.getitem]


def test_explain_says_it(monkeypatch):
    model, x = Two(), apart(5, 64)
    for found in (mxcompile.explain(model, x, recipe=ALIGNED), mxcompile.explain(deployed())):
        assert {layer.activation for layer in found.quantized} == {"mxfp8_e4m3+aligned"}
    monkeypatch.setattr(SERVING, "choices", lambda x, fmt, out: {"planes": None, "reference": None})
    no = "it is not aligned"
    monkeypatch.setattr(SERVING, "why_not_fp8", lambda x, fmt, scaling, rounding: None if rounding[0].aligned else no)
    for recipe, prefill, reasons in ((ALIGNED, "fp8", ()), (PLAIN, "planes", (f"no fp8: {no}",))):
        for found in (mxcompile.explain(model, x, recipe=recipe), mxcompile.explain(deployed(recipe=recipe))):
            assert {(layer.prefill, layer.reasons) for layer in found.quantized} == {(prefill, reasons)}


def test_dumps_say_it(tmp_path):
    mxcompile.quantize_and_compile(Two(), apart(5, 64), recipe=ALIGNED, compile=False, dump=tmp_path / "out")
    assert "mxfp8_e4m3+aligned" in (tmp_path / "out" / "kernels.txt").read_text()
    assert "'mxfp8_e4m3+aligned'" in (tmp_path / "out" / "01-lower-mx.txt").read_text()
    assert ALIGNED in (tmp_path / "out" / "pipeline.txt").read_text()


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    module, x = deployed(), apart(7, 64)
    mxcompile.save(module, tmp_path / "aligned")
    loaded = mxcompile.load(tmp_path / "aligned", model=Two())
    assert loaded.up.weight.layout_ == module.up.weight.layout_
    assert torch.equal(loaded(x), module(x))
    assert {key[1] for key in CheckpointContents.of_checkpoint(Checkpoint(tmp_path / "aligned")).groups()} == {
        "mxfp8_e4m3+aligned",
        None,
    }
    mxcompile.save(deployed(recipe=PLAIN), tmp_path / "plain")
    (index,) = (tmp_path / "plain").glob("*.index.json")
    assert "aligned" not in index.read_text()  # earlier versions read it as ever


def test_other_projects_formats_cannot_hold_it(tmp_path):
    model = build("llama")
    exported = mxcompile.quantize_and_compile(model, inputs("llama"), recipe=ALIGNED, compile=False)
    with pytest.raises(CheckpointError, match=r"compressed-tensors has no mxfp8_e4m3\+aligned for inputs"):
        mxcompile.save(exported, tmp_path / "out", format="compressed-tensors")


def test_the_operators_align():
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for x in (apart(3, 64), apart(3, 64).to(torch.bfloat16).view(1, 3, 64), torch.randn(64, 5).T):
        args = (x, "mxfp8_e4m3+aligned", "rceil")
        wanted = reference.align(reference.quantize_dequantize(x, MXFP8_E4M3, ScaleRule.RCEIL))
        assert torch.equal(QUANTIZE_DEQUANTIZE(*args), wanted)
        elements, scales = QUANTIZE(*args)
        assert torch.equal(DEQUANTIZE(elements, scales, args[1], x.shape[-1], x.dtype), wanted)
        torch.library.opcheck(QUANTIZE_DEQUANTIZE, args, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_the_reference_keeps_and_what_it_rounds(dtype):
    """A token's largest has power 7: what is below 2**-6 of that scale goes to steps of 2**-9, ties to even."""
    step = 2.0**-9
    x = torch.tensor([[192.0, -0.0, 15 * step, step, 1.5 * step, 2.5 * step, -0.25 * step, 0.75 * step]])
    wanted = torch.tensor([[192.0, -0.0, 15 * step, step, 2 * step, 2 * step, -0.0, step]]).to(dtype)
    y = reference.align(x.to(dtype))
    assert torch.equal(y, wanted)
    assert torch.equal(y.signbit(), wanted.signbit())
    assert torch.equal(reference.align(y), y)
    for power in (-6, 5, 8):
        assert torch.equal(reference.align(x.to(dtype) * 2.0**power), wanted * 2.0**power) or dtype == torch.float16


def test_tokens_do_not_depend_on_each_other_and_bad_ones_are_nan():
    x = apart(5, 64).to(torch.bfloat16)
    x[1], x[2, 3], x[3, 40] = 0, torch.inf, torch.nan
    y = reference.align(x)
    assert y.isnan().all(-1).tolist() == [False, False, True, True, False]
    assert (y[1] == 0).all()
    assert torch.equal(y[0], reference.align(x[0]))
