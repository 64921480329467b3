"""A pass chooses formats for weights: later passes use them, overrides take precedence, dumps show them."""

from dataclasses import dataclass

import pytest
import torch
from models import build, inputs

import mxcompile
from mxcompile import Pass, PassResult, Pipeline, Request, observers
from mxcompile.analysis.layers import find_layers
from mxcompile.errors import NoDataError
from mxcompile.formats import MXFP8_E4M3, MXINT4, MXINT8, ScaleRule
from mxcompile.graph.edit import insert_call
from mxcompile.graph.name_patterns import Selection
from mxcompile.numerics.metrics import rounding_db, sqnr_db
from mxcompile.numerics.reference import quantize_dequantize

LOWER = "lower-mx{weight=mxint4,activation=mxint8}"
PIPELINES = (
    LOWER,
    f"round-weights{{format=mxint4}} | {LOWER}",
    f"gptq{{format=mxint4}} | {LOWER}",
)


@dataclass(frozen=True)
class Chosen(Pass):
    """`wide` in 8 bits, `plain` in float."""

    wide: str = "down.weight"
    plain: str = "none"

    name = "chosen"
    preserves_function = True

    def run(self, program):
        wanted = {self.wide: MXINT8} | ({} if self.plain == "none" else {self.plain: None})
        new = {name: fmt for name, fmt in wanted.items() if name not in program.formats}
        program.formats |= new
        return PassResult(len(new))


def formats_of(program) -> dict[str, str | None]:
    return {name: layer.format for name, layer in find_layers(program).items()}


@pytest.mark.parametrize("text", PIPELINES)
def test_passes_behind_it_take_the_format(traced, text):
    program = Pipeline.parse(f"chosen | {text}", passes=[Chosen]).run(traced("mlp"))
    assert formats_of(program) == {"up.weight": "mxint4", "down.weight": "mxint8"}
    module = mxcompile.deploy(program, build("mlp"))
    assert module.down.weight.layout_.format == "mxint8"
    assert torch.allclose(module(**inputs("mlp")), program(**inputs("mlp")), atol=1e-5)


@pytest.mark.parametrize("text", PIPELINES)
def test_none_leaves_a_layer_in_float_and_says_so(traced, text):
    program = traced("mlp")
    program.selection = Selection(allow_partial=True)
    lowered = Pipeline.parse(f"chosen{{plain=up.weight}} | {text}", passes=[Chosen]).run(program)
    assert formats_of(lowered) == {"up.weight": None, "down.weight": "mxint8"}
    assert [miss.reason for miss in lowered.ledger[-1].misses] == ["left in float: chosen by a pass"]


def test_overrides_count_before_it(traced):
    text = "chosen | lower-mx{weight=mxint4,overrides=[down=mxfp8_e4m3]}"
    program = Pipeline.parse(text, passes=[Chosen]).run(traced("mlp"))
    assert formats_of(program) == {"up.weight": "mxint4", "down.weight": str(MXFP8_E4M3)}


def test_an_embedding_that_is_asked_for_by_name(traced):
    program = mxcompile.trace(build("llama"), inputs("llama"), include=["model.embed_tokens"])
    pipeline = Pipeline.parse(f"chosen{{wide=model.embed_tokens.weight}} | {LOWER}", passes=[Chosen])
    text = mxcompile.print_program(pipeline.run(program))
    (line,) = [line for line in text.splitlines() if line.startswith("%embedding_dequantized ")]
    assert "'mxint8'" in line


def test_the_graph_text_shows_it_and_a_second_run_changes_nothing(traced):
    before = traced("mlp")
    once = Pipeline([Chosen()]).run(before)
    removed, added = mxcompile.print_changes(before, once).splitlines()
    assert added == f"+{removed[1:]} chosen=mxint8"
    twice = Pipeline([Chosen()]).run(once)
    assert mxcompile.print_changes(once, twice) == ""
    assert before.formats == {}
    assert twice.formats == once.formats
    assert twice.ledger[-1].rewrites == 0


# What a pass that chooses needs


def test_results_of_requests(traced):
    seen = []

    class Asking(Pass):
        name = "asking"

        def requests(self, program):
            return [Request(m.activation.name, observers.ChannelAbsMax) for m in mxcompile.choose(program).matmuls]

        def run(self, program):
            seen.extend(request.result(program) for request in self.requests(program))
            assert all(request.seen(program) for request in self.requests(program))
            with pytest.raises(NoDataError, match="ChannelAbsMax of %x"):
                Request("x", observers.ChannelAbsMax).result(program)
            return PassResult(0)

    Pipeline([Asking()]).run(traced("mlp"), [inputs("mlp"), inputs("mlp", batch=3)])
    assert [tuple(value.shape) for value in seen] == [(64,), (128,)]


def test_the_loss_of_rounding_counts_by_importance():
    weight, importance = torch.randn(16, 64), torch.rand(64)
    rounded = quantize_dequantize(weight, MXINT4, ScaleRule.MSE)
    assert rounding_db(weight, MXINT4) == sqnr_db(weight, rounded)
    error = ((weight - rounded).square() * importance).sum() / (weight.square() * importance).sum()
    assert rounding_db(weight, MXINT4, importance) == pytest.approx(-10 * error.log10().item(), abs=1e-3)
    assert rounding_db(torch.zeros(2, 32), MXINT4) == float("inf")


def test_a_graph_that_a_pass_has_edited_is_the_one_that_runs(traced):
    """The pipeline recompiles the graph, whether or not the pass preserves the function."""

    class Negative(Pass):
        name = "negative"

        def run(self, program):
            (end,) = program.graph.find_nodes(op="output")
            (value,) = end.all_input_nodes
            made = insert_call(program, end, torch.ops.aten.neg.default, (value,), "negated")
            end.replace_input_with(value, made)
            return PassResult(1)

    program = traced("mlp")
    after = Pipeline([Negative()]).run(program)
    assert torch.equal(after(**inputs("mlp")), -program(**inputs("mlp")))
