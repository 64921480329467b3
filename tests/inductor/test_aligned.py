"""Aligned MXFP8 activations, `lower-mx{align=true}`: the same function in the graph, deployed, compiled and loaded."""

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
from mxcompile.errors import CheckpointError, DeployError, PipelineError, VerifyError
from mxcompile.formats import MXFP4, MXFP8_E4M3, ScaleRule
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Stage
from mxcompile.inductor import backend, why_no_inductor
from mxcompile.inductor.rewrites.join_linears import join_linears
from mxcompile.numerics import reference
from mxcompile.ops import ALIGN, CPU_LINEARS, LINEAR, LINEARS, QUANTIZE_DEQUANTIZE
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.weight import MXWeight, unfused_matmuls

PLAIN = "lower-mx{weight=mxfp4,activation=mxfp8_e4m3}"
ALIGNED = "lower-mx{weight=mxfp4,activation=mxfp8_e4m3,align=true}"
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
    assert len(program.graph.find_nodes(op="call_function", target=ALIGN)) == 2
    assert "mx.align(%x_dequantized)" in print_program(program)
    assert "%x_aligned" in print_program(program)
    assert torch.equal(program(x), expected(model, x))
    assert {str(layer.rounded) for layer in find_layers(program).values()} == {"mxfp8_e4m3 aligned"}
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
    assert lowering == LowerMX(MXFP4, MXFP8_E4M3, align=True)
    assert str(Pipeline([lowering])) == ALIGNED
    assert str(Pipeline.parse(PLAIN)) == PLAIN


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("none", "float activations are not aligned: give activation=mxfp8_e4m3"),
        ("mxfp4", "mxfp4 activations need no alignment: they are e4m3 numbers"),
        ("mxfp6_e3m2:64", "mxfp6_e3m2 activations need no alignment"),
        ("mxint4", "mxint4 activations need no alignment"),
        ("mxint8", "mxint8 activations cannot be aligned: only those of mxfp8_e4m3 can"),
        ("mxfp8_e5m2", "mxfp8_e5m2 activations cannot be aligned: only those of mxfp8_e4m3 can"),
    ],
)
def test_other_activations_are_refused(activation, message):
    with pytest.raises(PipelineError, match=rf"lower-mx{{align=true}}: {message}"):
        Pipeline.parse(f"lower-mx{{weight=mxfp4,activation={activation},align=true}}")


def test_a_float_graph_has_none():
    program = mxcompile.trace(Two(), apart(5, 64))
    x = next(node for node in program.graph.nodes if node.op == "placeholder")
    with program.graph.inserting_after(x):
        program.graph.call_function(ALIGN, (x,)).meta["val"] = x.meta["val"]
    assert program.stage is Stage.FLOAT
    with pytest.raises(VerifyError, match=r"mx\.align\.default, but the program is not lowered"):
        mxcompile.verify.check(program)


def test_what_is_not_rounded_is_not_deployed():
    model, x = Two(), apart(5, 64)
    program = Pipeline.parse("lower-mx{weight=mxfp4}").run(mxcompile.trace(model, x))
    value = next(node for node in program.graph.nodes if node.op == "placeholder")
    with program.graph.inserting_after(value):
        aligned = program.graph.call_function(ALIGN, (value,))
    aligned.meta["val"] = value.meta["val"]
    value.replace_all_uses_with(aligned, delete_user_cb=lambda user: user is not aligned)
    with pytest.raises(DeployError, match="aligns something that is not quantized"):
        mxcompile.deploy(program, model)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_deployed_module_computes_it_with_kernels_and_without(tokens, dtype):
    module, x = deployed().to(dtype), apart(tokens, 64).to(dtype)
    weight = module.up.weight
    assert isinstance(weight, MXWeight)
    assert weight.layout_.aligned
    rounded = reference.align(reference.quantize_dequantize(x, MXFP8_E4M3, ScaleRule.RCEIL))
    assert torch.equal(weight.prepare(x), rounded)
    with unfused_matmuls():
        wanted = module(x)
    assert difference(module(x), wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_on_the_cpu(dtype):
    """One call for two linears, given aligned values and told of no rounding."""
    from torch._inductor.utils import fresh_cache

    seen = []

    class CountingFuse(backend.FuseMX):
        def __call__(self, graph):
            super().__call__(graph)
            seen.append([(n.target, n.args) for n in graph.nodes if n.target in (CPU_LINEARS, LINEAR, ALIGN)])

    module, x = deployed().to(dtype), apart(5, 64).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(module, options=backend.compile_options(CountingFuse()))
    with fresh_cache():
        for given in (x, x[:1], apart(30, 64).to(dtype)):
            with unfused_matmuls():
                wanted = module(given)
            assert difference(compiled(given), wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert [target for target, _ in seen[0]] == [ALIGN, CPU_LINEARS, ALIGN, LINEAR]
    assert seen[0][1][1][5:7] == (None, None)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("view", [True, False])
def test_a_gpus_graph_takes_the_alignment_into_the_product_where_it_may_be_fast(monkeypatch, fast, view):
    """Which devices are fast is asked of the dispatcher; here there is none."""
    asked = []

    def why_not(x, fmt, planes, rounding, aligned):
        asked.append((fmt, tuple(planes), rounding, aligned))
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
    value = call(ALIGN, call(QUANTIZE_DEQUANTIZE, x, "mxfp8_e4m3", "rceil", shape=shape), shape=shape)
    if view:
        value = call(torch.ops.aten.reshape.default, value, [600, 64], shape=(600, 64))
    products = [call(LINEAR, value, elements, scales, None, "mxfp4", (0, 120), shape=(600, 64)) for _ in range(2)]
    graph.output(products)
    assert join_linears(graph) == 1
    graph.lint()
    assert asked == [(MXFP4, (0, 120), (MXFP8_E4M3, ScaleRule.RCEIL), True)]
    (joined,) = graph.find_nodes(op="call_function", target=LINEARS)
    rest = ("mxfp8_e4m3", "rceil", (0, 120), True) if fast else (None, None, (0, 120))
    assert joined.args[5:] == rest
    left = [node.target for node in graph.nodes if node.op == "call_function"]
    before = [torch.ops.aten.reshape.default] if view else []
    steps = before if fast else [QUANTIZE_DEQUANTIZE, ALIGN, *before]
    assert left == [*steps, LINEARS, operator.getitem, operator.getitem]


def test_explain_says_it(monkeypatch):
    model, x = Two(), apart(5, 64)
    for found in (mxcompile.explain(model, x, recipe=ALIGNED), mxcompile.explain(deployed())):
        assert {layer.activation for layer in found.quantized} == {"mxfp8_e4m3 aligned"}
    monkeypatch.setattr(SERVING, "choices", lambda x, fmt, out: {"planes": None, "reference": None})
    no = "it is not aligned"
    monkeypatch.setattr(SERVING, "why_not_fp8", lambda x, fmt, scaling, rounding, aligned: None if aligned else no)
    for recipe, prefill, reasons in ((ALIGNED, "fp8", ()), (PLAIN, "planes", (f"no fp8: {no}",))):
        for found in (mxcompile.explain(model, x, recipe=recipe), mxcompile.explain(deployed(recipe=recipe))):
            assert {(layer.prefill, layer.reasons) for layer in found.quantized} == {(prefill, reasons)}


def test_dumps_say_it(tmp_path):
    mxcompile.quantize_and_compile(Two(), apart(5, 64), recipe=ALIGNED, compile=False, dump=tmp_path / "out")
    assert "mxfp8_e4m3 aligned" in (tmp_path / "out" / "kernels.txt").read_text()
    assert "mx.align(%x_dequantized)" in (tmp_path / "out" / "01-lower-mx.txt").read_text()
    assert ALIGNED in (tmp_path / "out" / "pipeline.txt").read_text()


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    module, x = deployed(), apart(7, 64)
    mxcompile.save(module, tmp_path / "aligned")
    loaded = mxcompile.load(tmp_path / "aligned", model=Two())
    assert loaded.up.weight.layout_ == module.up.weight.layout_
    assert torch.equal(loaded(x), module(x))
    assert {key[1] for key in CheckpointContents(Checkpoint(tmp_path / "aligned")).groups()} == {
        "mxfp8_e4m3 aligned",
        None,
    }
    mxcompile.save(deployed(recipe=PLAIN), tmp_path / "plain")
    (index,) = (tmp_path / "plain").glob("*.index.json")
    assert "aligned" not in index.read_text()  # earlier versions read it as ever


def test_other_projects_formats_cannot_hold_it(tmp_path):
    model = build("llama")
    exported = mxcompile.quantize_and_compile(model, inputs("llama"), recipe=ALIGNED, compile=False)
    with pytest.raises(CheckpointError, match=r"cannot hold an input that is aligned \(use lower-mx{align=false}\)"):
        mxcompile.save(exported, tmp_path / "out", format="compressed-tensors")


def test_a_value_needs_a_format_to_be_aligned():
    x, elements, scales = torch.empty(2, 32), torch.empty(4, 16).byte(), torch.empty(4, 1).byte()
    given = [x.to("meta"), [elements.to("meta")], [scales.to("meta")]]
    with pytest.raises(RuntimeError, match="aligned needs an activation format"):
        LINEARS(*given, [None], "mxfp4", None, None, None, True)


def test_the_operator():
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for x in (apart(3, 64), apart(3, 64).to(torch.bfloat16).view(1, 3, 64), torch.randn(64, 5).T):
        assert torch.equal(ALIGN(x), reference.align(x))
        torch.library.opcheck(ALIGN, (x,), test_utils=checks)


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
