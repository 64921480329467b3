"""round-weights: every chosen weight becomes its nearest MX value, and nothing else changes."""

import math

import pytest
import torch
from torch import nn

import mxcompile
from mxcompile import formats
from mxcompile.errors import WeightError
from mxcompile.formats import FORMATS, MXFP4, MXINT4, MXINT8, ScaleRule
from mxcompile.graph.printer import print_program
from mxcompile.numerics import reference
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.passes.round_weights import RoundWeights
from mxcompile.pipeline.pipeline import Pipeline

# Expected SQNR of Gaussian weights in dB, block 32, least-squares scales (measured once; 16 k values, so +- 0.3).
EXPECTED_DB = {
    "mxint8": 41.7,
    "mxint6": 29.8,
    "mxint4": 18.3,
    "mxfp8_e4m3": 31.5,
    "mxfp8_e5m2": 25.5,
    "mxfp6_e3m2": 25.5,
    "mxfp6_e2m3": 31.0,
    "mxfp4": 19.0,
}


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture
def program():
    return mxcompile.trace(mlp(), torch.zeros(2, 128))


def test_only_the_weights_change_in_the_graph_text(program):
    after = Pipeline([RoundWeights(MXINT4)]).run(program)
    before_lines, after_lines = print_program(program).splitlines(), print_program(after).splitlines()
    changed = [new for old, new in zip(before_lines, after_lines, strict=True) if old != new]
    assert [line.split('"')[1] for line in changed] == ["0.weight", "2.weight"]


def test_counts_rewrites_and_reports_per_layer_sqnr(program):
    (record,) = Pipeline([RoundWeights(MXINT4)]).run(program).ledger
    assert (record.rewrites, record.misses) == (2, ())
    assert set(record.numbers) == {"0.weight", "2.weight"}


def test_a_weight_that_an_embedding_reads_too_is_left_and_reported():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(40, 32)
            self.body = nn.Linear(32, 32)
            self.head = nn.Linear(32, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.body(self.embed(ids)))

    program = mxcompile.trace(Tied(), torch.zeros(2, 3, dtype=torch.int64), include=["head"])
    after = Pipeline([RoundWeights(MXINT4)]).run(program)
    assert after.ledger[0].rewrites == 1
    assert [miss.reason for miss in after.ledger[0].misses] == [
        "an embedding stays float; ask for it with include=['embed']",
        "its weight is read elsewhere too: lower-mx rounds a copy",
    ]
    assert torch.equal(after.tensor("head.weight"), program.tensor("head.weight"))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_error_is_the_expected_one(program, fmt):
    after = Pipeline([RoundWeights(fmt)]).run(program)
    weight, rounded = program.tensor("0.weight"), after.tensor("0.weight")
    assert sqnr_db(weight, rounded) == pytest.approx(EXPECTED_DB[fmt.name], abs=0.3)
    assert after.ledger[0].numbers["0.weight"]["weight_sqnr_db"] == sqnr_db(weight, rounded)
    assert torch.equal(rounded, reference.quantize_dequantize(weight.detach(), fmt, ScaleRule.MSE))


def test_blocks_run_along_the_contracted_dimension():
    class RightOperand(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 48, generator=torch.Generator().manual_seed(1)))

        def forward(self, x):
            return x @ self.weight

    program = mxcompile.trace(RightOperand(), torch.zeros(2, 64))
    rounded = Pipeline([RoundWeights(MXFP4)]).run(program).tensor("weight")
    rows = program.tensor("weight").detach().T
    assert torch.equal(rounded.T, reference.quantize_dequantize(rows, MXFP4, ScaleRule.MSE))


def test_twice_is_once(program):
    once = Pipeline([RoundWeights(MXINT4)]).run(program)
    twice = Pipeline([RoundWeights(MXINT4), RoundWeights(MXINT4)]).run(program)
    assert twice.ledger[1].rewrites == 0
    assert torch.equal(once.tensor("0.weight"), twice.tensor("0.weight"))


def test_zeros_round_to_zeros_without_error(program):
    program.set_tensor("0.weight", torch.zeros(128, 128))
    after = Pipeline([RoundWeights(MXINT4)]).run(program)
    assert not after.tensor("0.weight").any()
    assert after.ledger[0].numbers["0.weight"]["weight_sqnr_db"] == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_name_the_parameter(program, bad):
    weight = program.tensor("2.weight").detach().clone()
    weight[3, 5] = bad
    program.set_tensor("2.weight", weight)
    with pytest.raises(WeightError, match=r"'2.weight'.* holds 1 NaN or Inf .*exclude"):
        Pipeline([RoundWeights(MXINT4)]).run(program)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_users_model_is_untouched(dtype):
    model = mlp().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = mxcompile.trace(model, torch.zeros(2, 128, dtype=dtype))
    after = Pipeline([RoundWeights(MXINT8)]).run(program)
    assert after.tensor("0.weight").dtype == dtype
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_block_size_is_part_of_the_format(program):
    after = Pipeline.parse("round-weights{format=mxint4:128}").run(program)
    weight = program.tensor("0.weight").detach()
    expected = reference.quantize_dequantize(weight, formats.MXINT4.with_block(128), ScaleRule.MSE)
    assert torch.equal(after.tensor("0.weight"), expected)
