"""`explain`: the kernel that runs each layer, selected by the graph and rules that the deployed model goes through."""

import json
import re
import sys

import pytest
import torch
from models import build, inputs, llama
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import mxcompile
from mxcompile.cli.app import app
from mxcompile.diagnostics.explanation import SelectedKernel, group_similar
from mxcompile.errors import InputError, PipelineError
from mxcompile.formats import MXFP8_E4M3
from mxcompile.kernels import dispatch
from mxcompile.kernels.cpu import build as cpu_build
from mxcompile.tensor.modules import stored_bytes

EXPLAIN = sys.modules["mxcompile.diagnostics.explain"]  # of that name the package has the function
EXPLAIN_QUANTIZED = sys.modules["mxcompile.diagnostics.explain_quantized"]
needs_compiler = pytest.mark.skipif(
    cpu_build.why_not(MXFP8_E4M3) is not None, reason="there is no C++ compiler for the CPU kernels"
)


class AddedExperts(nn.Module):
    """A batched matmul to whose result a value is added."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.baddbmm(x[..., :32], x, self.weight)


def words(found: mxcompile.Explanation) -> str:
    console = Console(width=160, highlight=False)
    with console.capture() as capture:
        found.print_to(console)
    return capture.get()


@needs_compiler
def test_layers_alike_are_one_row_with_kernel_formats_and_bytes():
    model = llama(3)
    found = mxcompile.explain(model, inputs("llama"), recipe="w4a8-mxint-quick")
    first = found.layers[0]
    count = len(model.model.layers)
    assert (first.pattern, first.count, first.shape) == ("model.layers.*.self_attn.q_proj", count, (64, 64))
    assert (first.weight, first.activation, first.decode, first.prefill) == ("mxint4", "mxint8", "cpu", "decoded")
    assert (first.bytes_before, first.bytes_after) == (count * 64 * 64 * 4, count * 64 * 64 * 17 // 32)
    (head,) = found.left_float
    assert head.reasons == ("the output head stays float; ask for it with include=['lm_head']",)
    text = words(found)
    assert re.search(r"^ model\.layers\.\*", text, re.MULTILINE)
    assert re.search(r"^   self_attn\.q_proj +mxint4 +mxint8 +cpu +decoded +\d +[\d.]+ +[\d.]+ *$", text, re.MULTILINE)
    assert "cpu: C++ kernel, multiplies packed weights without decoding them to memory" in text
    assert re.search(r"^\d+% of the matmul weight bytes that every token reads stay float$", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "include"), [("llama", ()), ("mixtral", ("lm_head",)), ("gpt2", ())])
def test_sizes_are_those_of_the_quantized_model_and_so_says_the_quantized_model(name, include):
    model, example = build(name), inputs(name)
    before = mxcompile.explain(model, example, recipe="w8a8-mxfp-quick", include=include)
    quantized = mxcompile.quantize_and_compile(model, example, recipe="w8a8-mxfp-quick", include=include, compile=False)
    after = mxcompile.explain(quantized)
    assert before.bytes_after == after.bytes_after == stored_bytes(quantized)
    assert before.bytes_before == after.bytes_before == stored_bytes(model)
    expected = [(layer.pattern, layer.count, layer.weight, layer.activation, layer.decode) for layer in before.layers]
    assert expected == [
        (layer.pattern, layer.count, layer.weight, layer.activation, layer.decode) for layer in after.layers
    ]


def test_a_tied_table_that_stays_float_is_not_saved():
    model = build("gemma")
    found = mxcompile.explain(model, inputs("gemma"), recipe="w8a8-mxfp-quick", include=["lm_head"])
    quantized = mxcompile.quantize_and_compile(
        model, inputs("gemma"), recipe="w8a8-mxfp-quick", include=["lm_head"], compile=False
    )
    assert found.layers[-1].pattern == "lm_head"
    assert found.layers[-1].bytes_before == 0
    assert found.bytes_after == stored_bytes(quantized)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
def test_experts_have_a_kernel_of_their_own(quantized):
    model = build("mixtral")
    if quantized:
        model = mxcompile.quantize_and_compile(model, inputs("mixtral"), recipe="w4a8-mxint-quick", compile=False)
    found = mxcompile.explain(model, inputs("mixtral"))
    experts = [layer for layer in found.layers if "experts" in layer.pattern]
    expected = "each_expert" if cpu_build.why_not(MXFP8_E4M3) else "cpu_experts"  # without a C++ compiler
    assert {(layer.decode, layer.prefill) for layer in experts} == {(expected, expected)}
    assert len(experts) == 2
    assert "decoded on every call" not in words(found)


def test_added_experts_have_no_fused_kernel_and_the_rules_say_why():
    found = mxcompile.explain(AddedExperts(), torch.randn(2, 5, 64))
    (layer,) = found.layers
    assert (layer.decode, layer.prefill) == ("unfused", "unfused")
    assert "its weight is dequantized first" in layer.reasons[-1]
    assert re.search(r"^1 of 1 MX weights are decoded on every call$", words(found), re.MULTILINE)


def test_formats_and_rules_without_a_kernel_are_explained():
    recipe = "lower-mx{weight=mxint3,activation=mxint8,activation_rule=mse}"
    found = mxcompile.explain(build("llama"), inputs("llama"), recipe=recipe)
    first = found.layers[0]
    assert (first.decode, first.prefill) == ("reference", "reference")
    rounding, product = first.reasons
    assert rounding.startswith("rounding of its input: no cpu: scale rule mse searches exponents")
    assert product == "no cpu: there is no kernel for mxint3"
    assert f"- all MX weights: {product}" in words(found)


def test_overrides_exclusions_and_convolutions():
    overrides = {"*.down_proj": MXFP8_E4M3, "*.up_proj": None}
    found = mxcompile.explain(build("llama"), inputs("llama"), exclude=["*.o_proj"], overrides=overrides)
    layers = {layer.pattern.rpartition(".")[2]: layer for layer in found.layers}
    assert layers["down_proj"].weight == "mxfp8_e4m3"
    assert layers["up_proj"].reasons == ("left in float: override *.up_proj=none",)
    assert layers["o_proj"].reasons == ("left in float: excluded",)
    (first, *_) = mxcompile.explain(build("vit"), inputs("vit")).layers
    assert (first.weight, first.decode) == (None, "torch")
    assert "a convolution" in first.reasons[0]


def test_a_gpu_and_a_machine_without_a_compiler(monkeypatch):
    """`explain` reports what the dispatcher would select there."""
    monkeypatch.setattr(EXPLAIN_QUANTIZED, "choices", lambda x, fmt, out: {"triton_linear": None, "reference": None})
    found = mxcompile.explain(build("llama"), inputs("llama"))
    assert {layer.decode for layer in found.quantized} == {"triton_linear"}
    assert "triton_linear: Triton kernel, decodes packed weights inside the matmul" in words(found)
    monkeypatch.setattr(EXPLAIN_QUANTIZED, "choices", lambda x, fmt, out: {"planes": None, "reference": None})
    found = mxcompile.explain(build("llama"), inputs("llama"))
    assert {layer.decode for layer in found.quantized} == {"planes"}
    assert "planes: fused GPU kernel; compiling converts the weight to the planar layout" in words(found)
    missing = "there is no C++ compiler"
    monkeypatch.setattr(EXPLAIN_QUANTIZED, "choices", lambda x, fmt, out: {"cpu": missing, "reference": None})
    monkeypatch.setattr(EXPLAIN, "why_no_inductor", lambda device: missing)
    text = words(mxcompile.explain(build("llama"), inputs("llama")))
    assert f"{missing}: the model runs uncompiled, nothing is fused" in text
    assert f"no cpu: {missing}" in text


def test_fp8_matmuls_are_explained(monkeypatch):
    """The range of scales is checked on MX weights; for a float model it is assumed to fit FP8."""
    monkeypatch.setattr(EXPLAIN_QUANTIZED, "choices", lambda x, fmt, out: {"planes": None, "reference": None})

    def why_not(x, fmt, scaling, rounding):
        return None if scaling.top else "the weight's scales are too far apart"

    monkeypatch.setattr(EXPLAIN_QUANTIZED, "why_not_fp8", why_not)
    found = mxcompile.explain(build("llama"), inputs("llama"), recipe="w4a4-mxfp-quick")
    assert {(layer.decode, layer.prefill) for layer in found.quantized} == {("planes", "fp8")}
    assert "fp8: as planes, and for 512 tokens or more an FP8 (e4m3) matmul" in words(found)
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :32] *= 2.0**12
    quantized = mxcompile.quantize_and_compile(model, inputs("llama"), recipe="w4a4-mxfp-quick", compile=False)
    layers = {layer.pattern.rpartition(".")[2]: layer for layer in mxcompile.explain(quantized).quantized}
    assert (layers["down_proj"].prefill, layers["up_proj"].prefill) == ("planes", "fp8")
    assert layers["down_proj"].reasons == ("no fp8: the weight's scales are too far apart",)


def test_what_cannot_be_explained():
    model = build("llama")
    with pytest.raises(InputError, match="pass example_inputs"):
        mxcompile.explain(model)
    with pytest.raises(InputError, match=r"there is no device 'meat' .*; this machine has: cpu"):
        mxcompile.explain(model, inputs("llama"), device="meat")
    with pytest.raises(PipelineError, match="has no lower-mx, so it quantizes nothing"):
        mxcompile.explain(model, inputs("llama"), recipe="round-weights{format=mxint4}")


def test_the_model_is_untouched_and_nothing_is_rounded(monkeypatch):
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("mxcompile.passes.lower_mx.round_rows", lambda *_: pytest.fail("rounded"))
    mxcompile.explain(model, inputs("llama"), recipe="w4a8-mxint")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_roundings_kernels_answer_as_the_products_do():
    x = torch.empty(1, 32)
    answers = dispatch.rounding_choices(x, MXFP8_E4M3, mxcompile.formats.ScaleRule.FLOOR)
    assert list(answers) == ["triton_quantize", "cpu", "reference"]
    assert answers["triton_quantize"] == "runs on a GPU"


def test_layers_of_different_reasons_stay_apart():
    layer = SelectedKernel("a.0.w", 1, (4, 4), "mxint4", None, "cpu", "decoded", (), 64, 9)
    other = SelectedKernel("a.1.w", 1, (4, 4), "mxint4", None, "cpu", "decoded", ("why",), 64, 9)
    assert [found.count for found in group_similar([layer, layer, other])] == [2, 1]
    assert group_similar([layer, layer])[0].bytes_after == 18


def test_the_command_on_a_model_and_on_its_checkpoint(local_model, tmp_path):
    result = CliRunner().invoke(
        app, ["explain", str(local_model), "--recipe", "w8a8-mxint-quick"], env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"self_attn\.q_proj +mxint8 +mxint8", result.output)
    record = json.loads(CliRunner().invoke(app, ["explain", str(local_model), "--json"]).stdout)
    assert record["layers"][0]["pattern"] == "model.layers.*.self_attn.q_proj"
    assert record["conclusions"]
    model = mxcompile.cli.model_source.load_model(str(local_model))
    quantized = mxcompile.quantize_and_compile(model[0], inputs("llama"), recipe="w8a8-mxint-quick", compile=False)
    mxcompile.save(quantized, tmp_path / "saved")  # a folder without a tokenizer
    saved = json.loads(CliRunner().invoke(app, ["explain", str(tmp_path / "saved"), "--json"]).stdout)
    assert saved["recipe"] is None
    assert saved["bytes_after"] == stored_bytes(quantized)


def test_as_text_it_is_what_the_command_prints():
    found = mxcompile.explain(build("llama"), inputs("llama"))
    assert [line.rstrip() for line in words(found).splitlines()] == [line.rstrip() for line in str(found).splitlines()]
    assert "self_attn.q_proj" in str(found)
