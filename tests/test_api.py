"""quantize_and_compile: one call works for any model, input form and dtype, and leaves the user's objects unchanged."""

import pytest
import torch
from models import MODELS, build, inputs, output

import mxcompile
from mxcompile import Pipeline
from mxcompile.errors import CoverageError, InputError, MXCompileError, UnknownNameError
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.tensor.weight import MXWeight

# Output SQNR at W8A8 MXINT8 of a tiny random model of each kind, in dB: measured once, less 1 dB for other CPUs.
W8A8_DB = {
    "mlp": 35.3,
    "cnn": 41.2,
    "llama": 30.3,
    "llama-tied": 30.2,
    "gemma": 32.8,
    "gpt2": 31.8,
    "bert": 34.9,
    "vit": 37.1,
    "mixtral": 29.7,
}


def quantize(name, dtype=torch.float32, **options):
    model = build(name, dtype)
    example = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    return model, example, mxcompile.quantize_and_compile(model, example, compile=False, **options)


@pytest.mark.parametrize("name", MODELS)
def test_works_on_every_kind_of_model(name):
    model, example, quantized = quantize(name, recipe="w8a8-mxint-quick")
    with torch.no_grad():
        wanted, given = output(model(**example)), output(quantized(**example))
    assert type(quantized) is type(model)
    assert sqnr_db(wanted, given) > W8A8_DB[name]
    assert any(isinstance(p, MXWeight) for p in quantized.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_works_in_every_float_dtype(name, dtype):
    model, example, quantized = quantize(name, dtype, recipe="w8a8-mxint-quick")
    with torch.no_grad():
        wanted, given = output(model(**example)), output(quantized(**example))
    assert given.dtype == dtype
    assert sqnr_db(wanted, given) > 25


@pytest.mark.parametrize("form", ["dict", "tuple", "tensor"])
def test_takes_inputs_in_every_form(form):
    model, x = build("mlp"), inputs("mlp")["x"]
    example = {"dict": {"x": x}, "tuple": (x,), "tensor": x}[form]
    quantized = mxcompile.quantize_and_compile(model, example, compile=False, recipe="w4a8-mxint-quick")
    assert quantized(x).shape == x.shape
    assert quantized(x[:1, :3]).shape == (1, 3, 64)


def test_a_recipe_is_a_name_a_pipeline_or_its_text():
    model, x = build("mlp"), inputs("mlp")
    text = str(mxcompile.recipes()["w4a16-mxfp"])
    results = [
        mxcompile.quantize_and_compile(model, x, recipe=recipe, compile=False)(**x)
        for recipe in ("w4a16-mxfp", text, Pipeline.parse(text))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_calibration_data_are_used_instead_of_the_example():
    model, x = build("mlp"), inputs("mlp")
    recipe = "smooth-quant | lower-mx{weight=mxint8,activation=mxint8}"
    usual = mxcompile.quantize_and_compile(model, x, recipe=recipe, compile=False)
    same = mxcompile.quantize_and_compile(model, x, recipe=recipe, calibration=[x], compile=False)
    other = mxcompile.quantize_and_compile(model, x, recipe=recipe, calibration=[inputs("mlp", seed=5)], compile=False)
    assert torch.equal(usual.norm.weight, same.norm.weight)
    assert not torch.equal(usual.norm.weight, other.norm.weight)


def test_compiled_by_default():
    model, x = build("mlp"), inputs("mlp")
    compiled = mxcompile.quantize_and_compile(model, x, recipe="w4a8-mxint-quick")
    plain = mxcompile.quantize_and_compile(model, x, compile=False, recipe="w4a8-mxint-quick")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**x), plain(**x), rtol=0, atol=1e-4)
    assert type(compiled) is type(model)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("w4a8-mxin", r"unknown recipe 'w4a8-mxin': did you mean w4a8-mxint"),
        ("round-wieghts | lower-mx{weight=mxint4}", r"unknown pass 'round-wieghts': did you mean round-weights"),
        ("lower-mx{weight=mximt4}", r"unknown format 'mximt4': did you mean mxint"),
        ("lower-mx{wieght=mxint4}", r"unknown option of lower-mx 'wieght': did you mean weight"),
        ("lower-mx{weight=mxint4} | smooth-quant", r"smooth-quant cannot run after lower-mx"),
    ],
)
def test_bad_recipes_are_explained(recipe, words):
    with pytest.raises(MXCompileError, match=words):
        mxcompile.quantize_and_compile(build("mlp"), inputs("mlp"), recipe=recipe)


def test_bad_recipes_are_found_before_the_work_starts():
    with pytest.raises(UnknownNameError):
        mxcompile.quantize_and_compile(build("mlp"), None, recipe="w9a9")


def test_wrong_inputs_are_explained():
    with pytest.raises(InputError, match=r"do not fit MLP.forward\(x\)"):
        mxcompile.quantize_and_compile(build("mlp"), {"y": torch.zeros(1, 64)}, recipe="w4a8-mxint-quick")


def test_refuses_a_model_it_would_hardly_touch():
    class Mostly(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.small = torch.nn.Linear(64, 64)
            self.large = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(64, 640))

        def forward(self, x):
            return self.large(self.small(x))

    model, x = Mostly(), torch.zeros(2, 64)
    with pytest.raises(
        CoverageError, match=r"(?s)only 9% .*%linear_1 in large: the weight is computed .*allow_partial=True"
    ):
        mxcompile.quantize_and_compile(model, x, compile=False, recipe="w4a8-mxint-quick")
    partial = mxcompile.quantize_and_compile(model, x, compile=False, allow_partial=True, recipe="w4a8-mxint-quick")
    assert isinstance(partial.small.weight, MXWeight)


def test_exclude_and_include_choose_by_name():
    model, x = build("llama"), inputs("llama")
    quantized = mxcompile.quantize_and_compile(
        model, x, compile=False, exclude=["*.mlp.*"], include=["*.down_proj", "lm_head"], recipe="w4a8-mxint-quick"
    )
    packed = {name for name, p in quantized.named_parameters() if isinstance(p, MXWeight)}
    assert packed == {
        *(f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"),
        "model.layers.0.mlp.down_proj.weight",
        "lm_head.weight",
    }


def test_the_default_learns_from_calibration_data_or_is_quick():
    model, x = build("mlp"), inputs("mlp")
    with pytest.warns(UserWarning, match="no calibration data: using the recipe w4a8-mxint-quick") as caught:
        quick = mxcompile.quantize_and_compile(model, x, compile=False)
    assert {warning.filename for warning in caught} == {__file__}
    batches = [inputs("mlp", 4, seed=seed) for seed in range(3)]
    learned = mxcompile.quantize_and_compile(model, x, calibration=batches, compile=False)
    named = {
        name: mxcompile.quantize_and_compile(model, x, recipe=name, calibration=batches, compile=False)
        for name in ("w4a8-mxint", "w4a8-mxint-quick")
    }
    assert torch.equal(quick(**x), named["w4a8-mxint-quick"](**x))
    assert torch.equal(learned(**x), named["w4a8-mxint"](**x))
    assert not torch.equal(quick(**x), learned(**x))


def test_a_probe_without_a_dump_is_refused():
    with pytest.raises(InputError, match="give dump="):
        quantize("mlp", recipe="w8a8-mxint-quick", probe=inputs("mlp"))


def test_overrides_by_format_name():
    _, _, quantized = quantize("mlp", recipe="w4a8-mxint-quick", overrides={"down": "mxint8"})
    assert [str(w.layout_.format) for w in quantized.parameters() if isinstance(w, MXWeight)] == ["mxint4", "mxint8"]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_the_output_head_gets_a_format_by_one_word(name):
    by_word = quantize(name, recipe="w4a8-mxint-quick", head="mxint8")[2]
    named = {"include": ["lm_head"], "overrides": {"lm_head": "mxint8"}}
    model, example, by_name = quantize(name, recipe="w4a8-mxint-quick", **named)
    assert by_word.lm_head.weight.layout_.format == "mxint8"
    with torch.no_grad():
        assert torch.equal(output(by_word(**example)), output(by_name(**example)))
    assert not isinstance(model.lm_head.weight, MXWeight)


def test_a_format_for_a_head_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"the model has no output head .*: leave head out"):
        quantize("mlp", recipe="w4a8-mxint-quick", head="mxint8")
