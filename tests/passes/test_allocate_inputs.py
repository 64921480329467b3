"""allocate: formats of inputs, chosen with those of the weights that read them."""

import pytest
import torch
from models import inputs, llama, output

import mxcompile
from mxcompile.analysis.layers import find_layers
from mxcompile.calibration.format_costs.gptq_errors import FormatRounding
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFP4, MXINT4, MXINT6, MXINT8
from mxcompile.graph.printer import print_changes
from mxcompile.passes.allocate import Allocate, FormatScore
from mxcompile.pipeline.pipeline import Pipeline

FORMATS = (MXINT4, MXINT6, MXINT8)
BATCHES = [inputs("llama", 4, 32, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def program():
    return mxcompile.trace(llama(2), BATCHES[0])


def allocated(program, text):
    return Pipeline.parse(f"allocate{{{text}}}").run(program, BATCHES)


def test_inputs_have_the_formats_that_their_weights_were_paired_with(program):
    paired = "formats=[mxfp4,mxfp8_e4m3],activations=[mxfp4,mxfp8_e4m3],bits=5.5"
    rest = "gptq{format=mxfp4,A} | tune-vectors{A,steps=4} | lower-mx{weight=mxfp4,A}".replace("A", "activation=mxfp4")
    after = Pipeline.parse(f"allocate{{{paired}}} | {rest}").run(program, BATCHES)
    assert after.input_formats == after.formats
    layers = find_layers(after)
    assert {(layer.format, str(layer.input_rounding)) for layer in layers.values()} == {
        ("mxfp4", "mxfp4"),
        ("mxfp8_e4m3", "mxfp8_e4m3"),
    }
    items = after.ledger[0].allocation.items
    assert list(items[0].costs) == ["mxfp4/mxfp4", "mxfp8_e4m3/mxfp8_e4m3"]
    assert {(item.format, item.activation) for item in items} == {("mxfp4", "mxfp4"), ("mxfp8_e4m3", "mxfp8_e4m3")}
    deployed = mxcompile.deploy(after, llama(2))
    with torch.no_grad():
        assert torch.equal(output(deployed(**BATCHES[0])), output(after(**BATCHES[0])))


def test_the_text_shows_chosen_formats_of_inputs(program):
    after = allocated(program, "formats=[mxfp4,mxfp8_e4m3],activations=[mxfp4,mxfp8_e4m3],bits=5.5")
    changed = [line for line in print_changes(program, after).splitlines() if line.startswith("+")]
    assert all(line.endswith((" input=mxfp4 chosen=mxfp4", " input=mxfp8_e4m3 chosen=mxfp8_e4m3")) for line in changed)


def test_the_cost_of_an_input_format_is_its_share(program):
    after = allocated(program, "formats=[mxint4,mxint4],activations=[mxfp4,mxint8],bits=4.25")
    for item in after.ledger[0].allocation.items:
        assert item.costs["mxint4/mxfp4"] > item.costs["mxint4/mxint8"]
        assert item.activation == "mxint8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": (MXFP4,)}, "one entry for each of formats"),
        ({"activations": (MXINT8,) * 3, "activation": MXINT8}, "no activation beside"),
        ({"activations": (MXINT8,) * 3, "score": FormatScore.NOISE}, "does not see the errors of inputs"),
        ({"rounding": FormatRounding.GPTQ, "score": FormatScore.KL}, "needs score=fisher"),
        ({"activations": FORMATS, "joined": False}, "would give one value inputs of several formats"),
    ],
)
def test_impossible_formats_of_inputs_are_refused(options, message):
    with pytest.raises(PipelineError, match=message):
        Allocate(FORMATS, 5, **options)
