"""Histograms of every layer before and after every pass: exact counts, and their file in a dump."""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, inputs
from torch.nn import functional as F

from mxcompile import Measure, Pipeline
from mxcompile.diagnostics.distributions import SCHEMA, Distributions
from mxcompile.errors import DumpError
from mxcompile.formats import MXINT4, MXINT8, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.histogram import Histogram, HistogramChange, LayerHistograms

examples = settings(derandomize=True, deadline=None, database=None, max_examples=60)
ROUND = "round-weights{format=mxint4}"
LOWER = "lower-mx{weight=mxint4,activation=mxint8}"

ONE = Histogram(1, 0, 508, (2, 1))
READ = Distributions(
    ({"up.weight": HistogramChange(LayerHistograms(ONE, ONE, None), LayerHistograms(ONE, None, ONE))}, {})
)
HISTOGRAM = {"zeros": 1, "nonfinite": 0, "first": 508, "counts": [2, 1]}
FILE = {
    "schema": 1,
    "passes": [
        {
            "up.weight": {
                "before": {"weight": HISTOGRAM, "input": HISTOGRAM, "rounded": None},
                "after": {"weight": HISTOGRAM, "input": None, "rounded": HISTOGRAM},
            }
        },
        {},
    ],
}


def edge(index: int) -> float:
    return 2.0 ** (index // 4 - 127) * (1 + index % 4 / 4)


# Histograms


def test_counts_by_hand():
    values = torch.tensor([0.0, -0.0, 1e-40, 1.0, -1.2, 1.25, 1.75, 3.0, math.inf, -math.inf, math.nan])
    assert Histogram.of(values) == Histogram(zeros=3, nonfinite=3, first=508, counts=(2, 1, 0, 1, 0, 0, 1))
    assert [edge(508 + i) for i in range(5)] == [1, 1.25, 1.5, 1.75, 2]


@examples
@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_a_value_lies_in_its_bin(value):
    found = Histogram.of(torch.tensor([-value]))
    assert found.counts == (1,)
    assert edge(found.first) <= value < edge(found.first + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_values_of_every_type(dtype):
    assert Histogram.of(torch.tensor([[1.0, 2.0]], dtype=dtype)) == Histogram(0, 0, 508, (1, 0, 0, 0, 1))


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (3, 2, 4)])
def test_values_of_every_shape(shape):
    assert sum(Histogram.of(torch.ones(shape)).counts) == math.prod(shape)


def test_of_many_values_rows_are_taken():
    """Every column is seen, so that an outlier channel is, too."""
    values = torch.ones(4096, 128)
    values[:, 3] = 64
    found = Histogram.of(values)
    assert sum(found.counts) == 131072
    assert found.counts[-1] == 131072 // 128


# Layers


def measured(program, text):
    return [
        record.measured.distributions for record in Pipeline.parse(text).run(program, instruments=[Measure()]).ledger
    ]


def test_a_layer_by_hand(traced):
    model, x = build("mlp"), inputs("mlp")["x"]
    rounded, lowered = measured(traced("mlp"), f"{ROUND} | {LOWER}")
    with torch.no_grad():
        given = F.relu(model.up(model.norm(x)))
    weight = Histogram.of(model.down.weight)
    after = Histogram.of(reference.quantize_dequantize(model.down.weight.detach(), MXINT4, ScaleRule.MSE))
    values = LayerHistograms(weight, Histogram.of(given), None)
    prepared = Histogram.of(reference.quantize_dequantize(given, MXINT8, ScaleRule.FLOOR))
    assert rounded["down.weight"] == HistogramChange(values, LayerHistograms(after, values.input, None))
    assert lowered["down.weight"] == HistogramChange(
        rounded["down.weight"].after, LayerHistograms(after, values.input, prepared)
    )
    assert after.zeros > weight.zeros


def test_a_fold_moves_the_input_and_the_weight(traced):
    (found,) = measured(traced("llama"), "smooth-quant")
    for name in ("q_proj", "gate_proj"):
        (layer,) = (found[each] for each in found if name in each)
        assert layer.before.input != layer.after.input
        assert layer.before.weight != layer.after.weight
        assert layer.after.rounded is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_every_layer_around_every_pass(traced, name):
    program = traced(name)
    records = (
        Pipeline.parse(f"smooth-quant | {ROUND} | {LOWER} | fuse-mx-gemm").run(program, instruments=[Measure()]).ledger
    )
    for record in records:
        assert set(record.measured.distributions) == set(record.measured.layers)
    for before, after in pairwise(records):
        found = before.measured.distributions
        assert all(each.before == found[layer].after for layer, each in after.measured.distributions.items())
    assert all(each.after.rounded is not None for each in records[-1].measured.distributions.values())


# The file


def test_the_schema_as_written_down(tmp_path):
    """A change here is a change of the schema: give it a new number."""
    assert json.loads(READ.to_json()) == FILE
    (tmp_path / "distributions.json").write_text(json.dumps(FILE))
    assert Distributions.load(tmp_path) == READ
    assert SCHEMA == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "holds no distributions"), ("{", "holds no distributions"), ('{"schema": 0}', "has schema 0, .* reads 1")],
)
def test_what_is_none_is_refused(tmp_path, text, message):
    with pytest.raises(DumpError, match="holds no distributions"):
        Distributions.load(tmp_path)
    (tmp_path / "distributions.json").write_text(text)
    with pytest.raises(DumpError, match=message):
        Distributions.load(tmp_path)
