"""Overrides: formats by name pattern, their text form, in every pass that assigns formats, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, inputs, llama

import mxcompile
from mxcompile import Pipeline
from mxcompile.analysis.layers import find_layers
from mxcompile.errors import MXCompileError, PassError, PipelineError, UnknownNameError
from mxcompile.formats import BLOCK_SIZES, FORMATS, MXFP8_E4M3, MXINT4, MXINT8, MXFormat
from mxcompile.graph.name_patterns import Overrides, last_match
from mxcompile.graph.printer import print_program
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.round_weights import RoundWeights

examples = settings(derandomize=True, deadline=None, database=None, max_examples=100)
patterns = st.from_regex(r"[a-z0-9_.*?\[\]-]+", fullmatch=True).filter(lambda p: p.count("[") == p.count("]"))
formats = st.builds(MXFormat.with_block, st.sampled_from(list(FORMATS.values())), st.sampled_from(BLOCK_SIZES))
DOWN = {"*.down_proj": MXFP8_E4M3, "model.layers.0.*": None}
LOWER = "lower-mx{weight=mxint4,activation=mxint8}"


def formats_of(program) -> dict[str, tuple[str | None, str | None]]:
    layers = find_layers(program)
    inputs_of = {name: layer.input_rounding for name, layer in layers.items()}
    return {
        name: (layer.format, None if inputs_of[name] is None else inputs_of[name].format)
        for name, layer in layers.items()
    }


# Text


def test_text():
    text = "lower-mx{weight=mxint4,activation=mxint8,overrides=[*.down_proj=mxfp8_e4m3,model.layers.0.*=none]}"
    assert str(LowerMX(MXINT4, MXINT8, overrides=DOWN)) == text
    assert Pipeline.parse(text).passes == (LowerMX(MXINT4, MXINT8, overrides=DOWN),)
    assert str(LowerMX(MXINT4, overrides={})) == "lower-mx{weight=mxint4}"


@examples
@given(st.dictionaries(patterns, st.none() | formats, max_size=4))
def test_round_trip(given_):
    try:
        current = LowerMX(MXINT4, overrides=given_)
    except PipelineError:
        return
    (parsed,) = Pipeline.parse(str(current)).passes
    assert parsed == current
    assert list(parsed.overrides.items()) == list(given_.items())
    assert hash(parsed) == hash(current)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*.down_proj=mxint8", "is not a list [pattern=format,pattern=none]"),
        ("[*.down_proj]", "cannot read '*.down_proj'; write pattern=format or pattern=none"),
        ("[*.down_proj=mxint9]", "an integer element has 2 to 8 bits, not 9"),
        ("[*.down_proj=mxin4]", "unknown format 'mxin4': did you mean mxint4"),
    ],
)
def test_unreadable_text(text, message):
    with pytest.raises(MXCompileError) as caught:
        Pipeline.parse(f"lower-mx{{weight=mxint4,overrides={text}}}")
    assert message in str(caught.value)


@pytest.mark.parametrize("pattern", ["", "a,b", "a=b", "a{b}", "a|b", "a[b"])
def test_patterns_without_a_text_form(pattern):
    with pytest.raises(PipelineError, match="override pattern"):
        Overrides({pattern: None})


def test_the_last_match_counts():
    assert last_match(["*.a", "x.*"], ["x.a"]) == "x.*"
    assert last_match(["x.*", "*.a"], ["x.a"]) == "*.a"
    assert last_match(["y"], ["x.a"]) is None
    assert Overrides({"a": None, "b": MXINT8}) != Overrides({"b": MXINT8, "a": None})


# Passes


def test_formats_of_a_lowered_program_and_its_dump(tmp_path):
    model, x = llama(2), inputs("llama")
    deployed = mxcompile.quantize_and_compile(
        model, x, recipe="w4a8-mxint-quick", overrides=DOWN, dump=tmp_path, compile=False
    )
    found = {n.removeprefix("model.layers."): str(m.weight) for n, m in deployed.named_modules() if n.endswith("_proj")}
    assert "mxfp8_e4m3" in found["1.mlp.down_proj"]
    assert "mxint4" in found["1.mlp.up_proj"]
    assert not any("MXWeight" in text for name, text in found.items() if name.startswith("0."))
    listed = "overrides=[*.down_proj=mxfp8_e4m3,model.layers.0.*=none]"
    assert (tmp_path / "pipeline.txt").read_text().count(listed) == 2
    graph = (tmp_path / "02-lower-mx.txt").read_text()
    assert graph.count("'mxfp8_e4m3'") == 1
    assert "left in float: override model.layers.0.*=none" in (tmp_path / "summary.txt").read_text()
    measured = mxcompile.Ledger.load(tmp_path).passes[-1].measured.layers
    assert measured["model.layers.1.mlp.down_proj.weight"].weight == "mxfp8_e4m3"
    assert measured["model.layers.0.mlp.down_proj.weight"].weight is None


@pytest.mark.parametrize("first", ["round-weights{format=mxint4}", "gptq{format=mxint4,activation=mxint8}", None])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_every_pass_that_rounds_takes_them(traced, name, first):
    """One of three readers of a value in another format, and one layer in float, its input too."""
    special, left = {"gpt2": ("*.c_fc", "*.attn.c_proj"), "mixtral": ("*gate_up_proj", "*.o_proj")}.get(
        name, ("*.v_proj", "*.o_proj")
    )
    overrides = {special: MXINT8.with_block(64), left: None}
    text = f"{first} | {LOWER}" if first else LOWER
    program = traced(name)
    lowered = Pipeline.parse(text).with_overrides(overrides).run(program, [inputs(name, 8, 16)])
    found = formats_of(lowered)
    assert set(found.values()) == {("mxint4", "mxint8"), ("mxint8:64", "mxint8"), (None, None)}
    assert found.keys() == formats_of(program).keys()
    mxcompile.deploy(lowered, build(name))


def test_lower_finds_what_was_rounded_and_twice_is_once(traced):
    overrides = {"*.down_proj": MXFP8_E4M3, "*.o_proj": None}
    pipeline = Pipeline([RoundWeights(MXINT4, overrides=overrides), LowerMX(MXINT4, overrides=overrides)])
    once = pipeline.run(traced("llama"))
    again = Pipeline([LowerMX(MXINT4, overrides=overrides)]).run(once)
    assert again.ledger[-1].rewrites == 0
    assert print_program(once) == print_program(again)
    x = inputs("llama")
    assert torch.equal(once(**x).logits, Pipeline(pipeline.passes[:1]).run(traced("llama"))(**x).logits)


def test_an_embedding_has_its_own_format():
    program = mxcompile.trace(build("llama"), inputs("llama"), include=["model.embed_tokens"])
    lowered = Pipeline([LowerMX(MXINT4, overrides={"*.embed_tokens": MXINT8})]).run(program)
    assert "mx.dequantize(%embedding, %embedding_1, 'mxint8'" in print_program(lowered) or (
        "'mxint8', 64, f32) # model.embed_tokens" in print_program(lowered)
    )
    with pytest.raises(UnknownNameError):
        Pipeline([LowerMX(MXINT4, overrides={"*.embed": MXINT8})]).run(program)


# Mistakes


def test_a_pattern_that_matches_nothing(traced):
    with pytest.raises(UnknownNameError) as caught:
        Pipeline([LowerMX(MXINT4, overrides={"model.layers.0.mlp.downproj": None})]).run(traced("llama"))
    assert "override 'model.layers.0.mlp.downproj': did you mean model.layers.0.mlp.down_proj" in str(caught.value)


def test_a_pattern_for_what_stays_float_anyway(traced):
    with pytest.raises(PipelineError, match=r"override 'lm_head': .* stays in float: .*include=\['lm_head'\]"):
        Pipeline([LowerMX(MXINT4, overrides={"lm_head": MXINT8})]).run(traced("llama"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.o_proj": MXINT8}, "was rounded to mxint4, but lower-mx has weight=mxint8 for it.*same overrides"),
        ({"*.o_proj": None}, "was rounded to mxint4, but an override of lower-mx keeps it in float"),
    ],
)
def test_passes_that_disagree(traced, overrides, message):
    with pytest.raises(PassError, match=message):
        Pipeline([RoundWeights(MXINT4), LowerMX(MXINT4, overrides=overrides)]).run(traced("llama"))


def test_a_pipeline_that_takes_none():
    with pytest.raises(PipelineError, match="no pass of smooth-quant takes overrides"):
        Pipeline.parse("smooth-quant").with_overrides({"*": None})
    recipe = mxcompile.recipes()["w4a8-mxint"]
    assert str(recipe.with_overrides({"*.down_proj": MXINT8})).count("overrides=[*.down_proj=mxint8]") == 2
    assert recipe.with_overrides({}) == recipe
