"""Pass and Pipeline: the text form round-trips, and its errors say what is wrong; an impossible order is refused."""

from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.calibration.format_costs.budgets import Latency
from mxcompile.calibration.learning.aims import Compared
from mxcompile.calibration.learning.latent_weights import Trained
from mxcompile.calibration.searches.factor_search import Objective
from mxcompile.errors import PipelineError, UnknownNameError
from mxcompile.formats import BLOCK_SIZES, FORMATS, MXINT4, MXINT8, MXFormat, ScaleRule
from mxcompile.graph.name_patterns import Overrides
from mxcompile.graph.program import Program
from mxcompile.graph.records import PassResult
from mxcompile.numerics.column_rounding import ColumnOrder
from mxcompile.passes import PASSES
from mxcompile.passes.allocate import Allocate, FormatScore
from mxcompile.passes.awq_fold import AwqFold
from mxcompile.passes.diagnose import Diagnose
from mxcompile.passes.distill import Distill, Parts, Scope
from mxcompile.passes.fine_blocks import FineBlocks
from mxcompile.passes.fuse_mx_gemm import FuseMXGemm
from mxcompile.passes.gptq import Gptq
from mxcompile.passes.learn_rounding import Last, LearnRounding, Start
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.permute import OrderedValues, Permute, SortedBy
from mxcompile.passes.quantize_cache import QuantizeCache, Rotation, Shift
from mxcompile.passes.recipes import RECIPES, as_pipeline, recipes
from mxcompile.passes.rotate import Rotate, RotationKind
from mxcompile.passes.round_weights import RoundWeights
from mxcompile.passes.smooth_quant import SmoothQuant
from mxcompile.passes.tune_vectors import TuneVectors
from mxcompile.pipeline import text_form
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.options import Range
from mxcompile.pipeline.pipeline import Pipeline

examples = settings(derandomize=True, deadline=None, database=None, max_examples=150)

formats = st.builds(MXFormat.with_block, st.sampled_from(list(FORMATS.values())), st.sampled_from(BLOCK_SIZES))
rules = st.sampled_from(ScaleRule)
alphas, numbers = st.floats(0, 1), st.floats(allow_nan=False)
flags, objectives, grids = st.booleans(), st.sampled_from(Objective), st.integers(1, 20)
# in an order that is allowed
BUILT_IN = {
    "diagnose": st.builds(Diagnose, formats, st.none() | formats),
    "permute": st.one_of(
        st.builds(Permute, st.sampled_from([SortedBy.WEIGHT, SortedBy.ACTIVATION]), st.sampled_from(OrderedValues)),
        st.builds(Permute, st.just(SortedBy.ERROR), st.sampled_from(OrderedValues), formats),
    ),
    "smooth-quant": st.builds(SmoothQuant, alphas, flags, flags)
    | st.builds(SmoothQuant, st.none(), flags, flags, formats, st.none() | formats, objectives, grids),
    "awq-fold": st.builds(AwqFold, formats, st.none() | formats, objectives, flags, flags, grids, flags),
    "rotate": st.builds(
        Rotate, formats, st.none() | formats, st.sampled_from([None, 2, 32, 128]), st.sampled_from(RotationKind)
    ),
    "fine-blocks": st.builds(FineBlocks, formats, st.sampled_from([16, 32]), st.sampled_from([32, 128])),
    "allocate": st.builds(
        Allocate,
        st.lists(formats, min_size=1, max_size=3, unique=True).map(tuple),
        st.floats(0.5, 64),
        st.none(),
        st.just(Latency.DECODE),
        st.floats(1, 1e6),
        st.sampled_from([None, "sm90"]),
        st.sampled_from(FormatScore),
        st.none() | formats,
    ),
    "quantize-cache": st.builds(
        QuantizeCache,
        st.none() | formats,
        st.none() | formats,
        grids,
        grids,
        st.sampled_from(Rotation),
        st.sampled_from(Shift),
        grids,
    ),
    "gptq": st.builds(
        Gptq, formats, st.none() | formats, alphas, st.sampled_from(ColumnOrder), rules, grids, alphas, flags
    )
    | st.builds(Gptq, formats, rule=st.none(), order=st.just(ColumnOrder.NONE), latents=st.booleans()),
    "learn-rounding": st.builds(
        LearnRounding,
        *(formats, st.none() | formats, st.sampled_from(Trained), grids, st.none() | st.floats(1e-9, 1e9), grids),
        *(st.sampled_from(Start), st.sampled_from(Last), alphas, st.floats(0, 0.5), grids, alphas, alphas),
    ),
    "round-weights": st.builds(RoundWeights, formats, rules, st.booleans()),
    "distill": st.builds(
        Distill,
        *(st.none() | formats, st.sampled_from(Parts), st.sampled_from(Compared), st.just(Scope.MODEL), grids),
        *[st.none() | st.floats(1e-9, 1e9)] * 2,
        *(alphas, alphas, grids, grids, st.floats(1e-9, 1), grids, grids, st.none() | grids),
    )
    | st.builds(Distill, loss=st.just(Compared.BLOCK), scope=st.just(Scope.SEGMENT)),
    "tune-vectors": st.builds(TuneVectors, st.none() | formats, grids, st.floats(1e-9, 1e9)),
    "lower-mx": st.builds(LowerMX, formats, st.none() | formats, rules, st.none() | rules),
}
ORDERED = [st.lists(BUILT_IN[name], max_size=2) for name in BUILT_IN]
pipelines = (
    st.tuples(*ORDERED).map(lambda parts: Pipeline([p for part in parts for p in part])).filter(lambda p: p.passes)
)


@dataclass(frozen=True)
class Options(Pass):
    """A pass with an option of every type, none of which has a built-in meaning."""

    required: int
    flag: bool = False
    factor: float = 0.5
    word: str = "output"
    maybe: int | None = None
    format: MXFormat = MXINT8
    rule: ScaleRule | None = ScaleRule.MSE

    name = "own-options"

    def run(self, program: Program) -> PassResult:
        return PassResult(0)


words = st.from_regex(r"[a-z0-9_.*-]+", fullmatch=True)
options = st.builds(
    Options,
    required=st.integers(),
    flag=st.booleans(),
    factor=numbers,
    word=words,
    maybe=st.none() | st.integers(),
    format=formats,
    rule=st.none() | rules,
)


# Text form


def test_every_built_in_pass_is_tried():
    assert {"fuse-mx-gemm", *BUILT_IN} == set(PASSES)  # fuse-mx-gemm has no options, and cannot come first
    assert Pipeline.parse("lower-mx{weight=mxint8} | fuse-mx-gemm").passes == (LowerMX(MXINT8), FuseMXGemm())


@examples
@given(st.one_of(*BUILT_IN.values(), options))
def test_a_pass_round_trips(current):
    (parsed,) = Pipeline.parse(str(current), passes=[Options]).passes
    assert parsed == current
    assert str(parsed) == str(current)


@examples
@given(pipelines, st.sampled_from(["{}|{}", "{} | {}", " {}\n| {} "]))
def test_a_pipeline_round_trips(pipeline, layout):
    text = str(pipeline)
    assert Pipeline.parse(text) == pipeline
    assert str(Pipeline.parse(text)) == text
    head, *rest = map(str, pipeline.passes)
    for part in rest:
        head = layout.format(head, part)
    assert Pipeline.parse(head) == pipeline
    assert hash(Pipeline.parse(text)) == hash(pipeline)
    assert repr(pipeline) == f"Pipeline.parse({text!r})"


@pytest.mark.parametrize(
    ("current", "text"),
    [
        (SmoothQuant(), "smooth-quant"),
        (SmoothQuant(0.75), "smooth-quant{alpha=0.75}"),
        (SmoothQuant(None, weight=MXINT4), "smooth-quant{alpha=none,weight=mxint4}"),
        (AwqFold(MXINT4, objective=Objective.BLOCK), "awq-fold{weight=mxint4,objective=block}"),
        (RoundWeights(MXINT4), "round-weights{format=mxint4}"),
        (RoundWeights(MXINT4.with_block(64), ScaleRule.FLOOR), "round-weights{format=mxint4:64,rule=floor}"),
        (LowerMX(MXINT4, MXINT8), "lower-mx{weight=mxint4,activation=mxint8}"),
        (LowerMX(MXINT4, activation_rule=ScaleRule.T725), "lower-mx{weight=mxint4,activation_rule=7.25}"),
        (Options(1), "own-options{required=1}"),
        (Options(-1, True, word="b*"), "own-options{required=-1,flag=true,word=b*}"),
        (Options(0, rule=None), "own-options{required=0,rule=none}"),
    ],
)
def test_defaults_are_not_written(current, text):
    assert str(current) == text
    assert Pipeline.parse(text, passes=[Options]).passes == (current,)


def test_a_pipeline_as_text():
    pipeline = Pipeline([SmoothQuant(0.75), RoundWeights(MXINT4), LowerMX(MXINT4, MXINT8)])
    text = "smooth-quant{alpha=0.75} | round-weights{format=mxint4} | lower-mx{weight=mxint4,activation=mxint8}"
    assert str(pipeline) == text
    assert pipeline != Pipeline([SmoothQuant(0.75)])
    assert pipeline != text


@pytest.mark.parametrize("text", ["lower-mx{weight=mxint8,activation=none}", " lower-mx { weight = MXINT8 , } "])
def test_other_ways_to_write_it(text):
    assert Pipeline.parse(text) == Pipeline([LowerMX(MXINT8)])


def test_recipes_are_pipelines():
    assert set(recipes()) == set(RECIPES)
    for name, pipeline in recipes().items():
        assert Pipeline.parse(str(pipeline)) == pipeline
        assert str(pipeline) == RECIPES[name]
        assert isinstance(pipeline.passes[-1], LowerMX)


# Mistakes in the text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gptqq", "unknown pass 'gptqq': did you mean gptq?"),
        ("zzz", f"unknown pass 'zzz': known: {', '.join(sorted(PASSES))}"),
        ("smooth-quant{alpa=1}", "unknown option of smooth-quant 'alpa': did you mean alpha?"),
        ("lower-mx{weight=mxin5}", "unknown format 'mxin5': did you mean mxint8 or mxint6 or mxint4?"),
        ("round-weights{format=mxint4,rule=flor}", "unknown scale rule 'flor': did you mean floor?"),
    ],
)
def test_unknown_names(text, message):
    with pytest.raises(UnknownNameError) as caught:
        Pipeline.parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read '': a pass is written name{option=value,option=value}"),
        ("smooth-quant | ", "cannot read '': a pass is written"),
        ("smooth-quant alpha=1", "cannot read 'smooth-quant alpha=1': a pass is written"),
        ("smooth-quant{alpha}", "smooth-quant: cannot read the option 'alpha'; write option=value"),
        ("smooth-quant{alpha=much}", "smooth-quant{alpha}: 'much' is not a value of type float"),
        ("own-options{required=1.5}", "own-options{required}: '1.5' is not a value of type int"),
        ("own-options{required=1,flag=yes}", "own-options{flag}: 'yes' is not a value of type bool"),
        ("own-options{required=none}", "own-options{required}: 'none' is not a value of type int"),
        (
            "lower-mx{activation=mxint8}",
            "lower-mx needs the option weight (a format): write lower-mx{weight=...}",
        ),
    ],
)
def test_unreadable_text(text, message):
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text, passes=[Options])
    assert str(caught.value).startswith(message)


def test_an_option_given_twice():
    with pytest.raises(PipelineError, match="alpha"):
        Pipeline.parse("smooth-quant{alpha=0.1,alpha=0.9}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smooth-quant{alpha=nan}", "smooth-quant{alpha=nan}: alpha must be a number from 0 to 1 or none, not nan"),
        ("smooth-quant{alpha=1.5}", "smooth-quant{alpha=1.5}: alpha must be a number from 0 to 1 or none, not 1.5"),
        ("smooth-quant{grid=0}", "smooth-quant{grid=0}: grid must be an integer, 1 or more, not 0"),
        ("awq-fold{weight=mxint4,grid=-3}", "awq-fold{grid=-3}: grid must be an integer, 1 or more"),
        ("rotate{weight=mxint4,block=1}", "rotate{block=1}: the block must be a power of two, 2 or more"),
        ("rotate{weight=mxint4,block=24}", "rotate{block=24}: the block must be a power of two"),
        ("gptq{format=mxint4,damping=-1}", "gptq{damping=-1.0}: damping must be a number from 0 to 10, not -1.0"),
        ("gptq{format=mxint4,damping=inf}", "gptq{damping=inf}: damping must be a number from 0 to 10"),
        ("gptq{format=mxint4,correction=2}", "gptq{correction=2.0}: correction must be a number from 0 to 1"),
        ("gptq{format=mxint4,sweeps=-1}", "gptq{sweeps=-1}: sweeps must be an integer, 0 or more"),
        ("gptq{format=mxint4,microblock=-32,rule=mse}", "gptq{microblock=-32}: microblock must be an integer, 0 or"),
        ("tune-vectors{steps=-1}", "tune-vectors{steps=-1}: steps must be an integer, 0 or more"),
        ("tune-vectors{rate=0}", "tune-vectors{rate=0.0}: rate must be a number above 0, not 0.0"),
        ("awq-fold", "awq-fold needs the option weight (a format): write awq-fold{weight=...}"),
        ("gptq{damping=0.1}", "gptq needs the option format (a format): write gptq{format=...}"),
    ],
)
def test_options_out_of_range(text, message):
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmoothQuant("much"), "alpha must be a number from 0 to 1 or none, not 'much'"),
        (lambda: SmoothQuant(True), "alpha must be a number"),
        (lambda: SmoothQuant(through_linears=1), "through_linears must be true, false, not 1"),
        (lambda: SmoothQuant(grid=2.5), "grid must be an integer, 1 or more, not 2.5"),
        (lambda: Gptq(4), "format must be a format, not 4"),
        (lambda: Gptq(MXINT4, overrides={"*": 4}), r"the override of '\*' is 4: give a format, its name, or None"),
        (lambda: Gptq(MXINT4, overrides=4), "overrides must be"),
        (lambda: Options("one"), "own-options{required=one}: required must be an integer, not 'one'"),
        (lambda: AwqFold(MXINT4, objective="all"), "objective must be output, block, not 'all'"),
        (lambda: Pipeline("smooth-quant"), "made of passes.* not of the text 'smooth-quant': Pipeline.parse reads the"),
        (lambda: Pipeline(["smooth-quant"]), "made of passes.* not of the text 'smooth-quant': Pipeline.parse reads"),
        (
            lambda: Pipeline([SmoothQuant]),
            r"made of passes.* not of the class SmoothQuant: write SmoothQuant\(\.\.\.\)",
        ),
        (lambda: Pipeline(SmoothQuant), "not of the class SmoothQuant: write"),
        (lambda: Pipeline(SmoothQuant()), "not of a single SmoothQuant: put it in a list"),
        (lambda: Pipeline(8), "made of passes.* not of 8"),
        (lambda: Pipeline([None]), "made of passes.* not of None"),
        (lambda: as_pipeline(8), "a recipe is a name, a pipeline's text form or a Pipeline, not 8"),
    ],
)
def test_values_of_another_kind(make, message):
    with pytest.raises(PipelineError, match=message):
        make()


def test_formats_rules_and_enums_by_name():
    assert LowerMX("mxint4", "mxint8", "floor") == LowerMX(MXINT4, MXINT8, ScaleRule.FLOOR)
    assert AwqFold("mxint4:64", objective="block") == AwqFold(MXINT4.with_block(64), objective=Objective.BLOCK)
    assert Gptq("mxint4", order="none").order is ColumnOrder.NONE
    named = {"2": "mxint8", "*.0": None}
    assert Gptq(MXINT4, overrides=named).overrides == Overrides({"2": MXINT8, "*.0": None})
    pipeline = Pipeline([LowerMX(MXINT4)]).with_overrides(named)
    assert str(pipeline) == "lower-mx{weight=mxint4,overrides=[2=mxint8,*.0=none]}"
    with pytest.raises(UnknownNameError, match="did you mean mxint8"):
        LowerMX("mxint")


@dataclass(frozen=True)
class Limited(Pass):
    """A pass with limits of its own."""

    share: Annotated[float, Range(0, 1, above=True)] = 0.5
    name = "limited"

    def run(self, program: Program) -> PassResult:
        return PassResult(0)


def test_limits_of_a_users_pass():
    assert Limited(1.0).share == 1.0
    with pytest.raises(PipelineError, match=r"limited{share=0}: share must be a number above 0 up to 1, not 0"):
        Limited(0)
    (option,) = text_form.options(Limited)
    assert (option.values, option.default) == ("a number above 0 up to 1", "0.5")


# Order


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "round-weights{format=mxint4} | smooth-quant",
            "smooth-quant cannot run after round-weights: it needs a float program, and round-weights leaves a "
            "rounded one. Move smooth-quant before round-weights.",
        ),
        (
            "smooth-quant | lower-mx{weight=mxint4} | lower-mx{weight=mxint8} | round-weights{format=mxint4}",
            "round-weights cannot run after lower-mx: it needs a float or rounded program, and lower-mx leaves a "
            "lowered one. Move round-weights before lower-mx.",
        ),
        (
            "lower-mx{weight=mxint4} | fuse-mx-gemm | lower-mx{weight=mxint4}",
            "lower-mx cannot run after fuse-mx-gemm: it needs a float or rounded or lowered program, and "
            "fuse-mx-gemm leaves a fused one. Move lower-mx before fuse-mx-gemm.",
        ),
    ],
)
def test_an_order_that_cannot_be_right(text, message):
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize("fold", ["smooth-quant", "awq-fold{weight=mxint4}"])
@pytest.mark.parametrize("earlier", ["round-weights{format=mxint4}", "lower-mx{weight=mxint4}"])
def test_a_fold_of_what_is_rounded(fold, earlier):
    """Factors in rounded weights would undo the rounding: refused when built, and both passes are named."""
    first, second = (text.partition("{")[0] for text in (fold, earlier))
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(f"{earlier} | {fold}")
    assert f"{first} cannot run after {second}" in str(caught.value)
    assert f"Move {first} before {second}." in str(caught.value)


@pytest.mark.parametrize("text", ["fuse-mx-gemm", "fuse-mx-gemm | lower-mx{weight=mxint4}"])
def test_a_pass_that_comes_too_early(text):
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    assert "fuse-mx-gemm" in str(caught.value)
    assert "lowered" in str(caught.value)
    assert "before trace" not in str(caught.value)


@pytest.mark.parametrize("text", ["smooth-quant | smooth-quant", "lower-mx{weight=mxint8} | lower-mx{weight=mxint8}"])
def test_an_order_that_can_be_right(text):
    assert str(Pipeline.parse(text)) == text


def test_a_program_that_is_too_far_for_the_first_pass(traced):
    rounded = Pipeline.parse("round-weights{format=mxint4}").run(traced("mlp"))
    with pytest.raises(PipelineError, match="smooth-quant"):
        Pipeline.parse("smooth-quant").run(rounded)
