"""awq-fold: searched factors reduce the error, preserve the function, and are shared by all readers of a value."""

import pytest
import torch
from models import build, inputs, outliers, output
from torch import nn
from torch.nn import functional as F

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.calibration.runs.run import Request, gather_statistics
from mxcompile.calibration.statistics.observers import ChannelImportance
from mxcompile.graph.inputs import as_batches
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.pipeline.pipeline import Pipeline

LOWER = "lower-mx{weight=mxint4,activation=mxint8}"
ROUND = f"round-weights{{format=mxint4,weighted=true}} | {LOWER}"
BLOCK = "awq-fold{weight=mxint4,activation=mxint8,objective=block,through_linears=true}"
FOLD = "awq-fold{weight=mxint4,activation=mxint8,through_linears=true}"


@pytest.fixture(scope="module", name="outliers")
def with_outliers():
    """A llama whose norms make two channels 30 times larger, and batches for it."""
    return outliers(), [inputs("llama", 4, 16, seed=seed) for seed in range(3)]


def db(model, calibration, text):
    """SQNR of the logits on inputs that calibration has not seen."""
    x = inputs("llama", 4, 16, seed=9)
    lowered = Pipeline.parse(text).run(mxcompile.trace(model, x), calibration)
    with torch.no_grad():
        return sqnr_db(output(model(**x)), output(lowered(**x))), lowered.ledger[0]


def folded(model_and_batches, text):
    """The program after those passes, and the batches they were calibrated with."""
    model, batches = model_and_batches
    return Pipeline.parse(text).run(mxcompile.trace(model, batches[0]), batches), batches


def test_undoes_planted_outliers(outliers):
    """Measured: 9.0 dB without outliers; with them 5.3 dB rounded, 10.2 dB folded first."""
    (plain, _), (folded, record) = db(*outliers, ROUND), db(*outliers, f"{FOLD} | {ROUND}")
    untouched, _ = db(build("llama"), outliers[1], ROUND)
    assert plain < untouched - 3
    assert folded > plain + 0.8 * (untouched - plain)
    assert record.rewrites == 4
    assert record.preserved_db > 110


def test_numbers_say_what_each_group_gained(outliers):
    _, record = db(*outliers, f"{FOLD} | {ROUND}")
    assert len(record.numbers) == 4
    assert all(numbers["error_over_rtn"] < 1 for numbers in record.numbers.values())


def test_powers_of_two_fold_exactly(outliers):
    model, calibration = outliers
    program = mxcompile.trace(model, calibration[0])
    folded = Pipeline.parse("awq-fold{weight=mxint4,power_of_two=true}").run(program, calibration)
    assert folded.ledger[0].rewrites > 0
    assert folded.ledger[0].preserved_db == float("inf")


def test_only_norms_unless_asked(outliers):
    model, calibration = outliers
    program = mxcompile.trace(model, calibration[0])
    record = Pipeline.parse("awq-fold{weight=mxint4}").run(program, calibration).ledger[0]
    assert record.rewrites <= 2
    assert sum("through_linears" in miss.reason for miss in record.misses) == 2


class Gelu(nn.Module):
    """norm -> up -> gelu -> down; a few units in the middle are larger than the others."""

    def __init__(self, larger):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)
        with torch.no_grad():
            self.up.weight[::16] *= larger
            self.down.weight[:, ::16] /= larger

    def forward(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))


def test_multiplies_where_nothing_can_take_factors_up():
    """Nothing divides a GELU's output. Measured: 6.9 dB rounded, 18.0 dB with the multiply."""
    torch.manual_seed(0)
    model, x, other = Gelu(100).eval(), torch.randn(4, 32, 64), torch.randn(4, 32, 64)
    program = mxcompile.trace(model, x)
    fold = "awq-fold{weight=mxint4,activation=mxint8}"
    without, folded = (
        Pipeline.parse(f"{text} | {LOWER}").run(program) for text in (fold[:-1] + ",multiply=false}", fold)
    )
    record = folded.ledger[0]
    assert record.preserved_db > 110
    assert "gelu" not in " ".join(miss.reason for miss in record.misses)
    assert any("gelu" in miss.reason for miss in without.ledger[0].misses)
    deployed = mxcompile.deploy(folded, model)
    assert deployed.down.weight.multiplier is not None
    with torch.no_grad():
        torch.testing.assert_close(deployed(other), folded(other), rtol=0, atol=0)
        before, after = (sqnr_db(model(other), quantized(other)) for quantized in (without, folded))
    assert after > before + 8, (before, after)


def test_no_multiply_where_it_does_not_pay():
    """All units alike: a miss with this reason, and no inserted node."""
    torch.manual_seed(0)
    program = mxcompile.trace(Gelu(1).eval(), torch.randn(4, 32, 64))
    folded = Pipeline.parse("awq-fold{weight=mxint8,activation=mxint8}").run(program)
    assert len(folded.graph.nodes) == len(program.graph.nodes)
    assert any("explicit multiply would save less than 10%" in miss.reason for miss in folded.ledger[0].misses)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert", "vit"])
def test_other_models(name):
    program = mxcompile.trace(build(name), inputs(name))
    record = Pipeline.parse(f"{FOLD} | {ROUND}").run(program).ledger[0]
    assert record.rewrites > 0
    assert record.preserved_db > 100


def test_text_form():
    assert str(Pipeline.parse(f"{FOLD} | {ROUND}")) == f"{FOLD} | {ROUND}"


# Scored on what the segment gives on


def test_block_objective_gains_and_keeps_the_function(outliers):
    """On outputs that calibration has not seen: 5.4 dB rounded, 10.2 dB folded first, by either objective."""
    plain, _ = db(*outliers, ROUND)
    folded, record = db(*outliers, f"{BLOCK} | {ROUND}")
    assert folded > plain + 3
    assert record.preserved_db > 100
    assert all(numbers["error_over_rtn"] <= 1 for numbers in record.numbers.values())


def test_the_objectives_are_not_the_same_number(outliers):
    records = [db(*outliers, f"{fold} | {LOWER}")[1] for fold in (FOLD, BLOCK)]
    output, block = ([n["error_over_rtn"] for n in record.numbers.values()] for record in records)
    assert len(output) == len(block) == 4
    assert all(one != other for one, other in zip(output, block, strict=True))


class Residual(nn.Module):
    """A residual stream to which two MLPs are added, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place, self.embed = in_place, nn.Linear(64, 64)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2)
        )
        for mlp in self.mlps:
            mlp[0].weight.data[[3, 7]] = 30.0

    def forward(self, x):
        h = self.embed(x)
        for mlp in self.mlps:
            if self.in_place:
                h += mlp(h)
            else:
                h = h + mlp(h)
        return h


def test_a_stream_that_is_written_to():
    """A segment runs repeatedly on the same state: the factors are those of the model without in-place ops."""
    x, records = torch.randn(16, 64), []
    for in_place in (False, True):
        torch.manual_seed(0)
        program = mxcompile.trace(Residual(in_place).eval(), x)
        records.append(Pipeline.parse(BLOCK).run(program).ledger[0])
    assert records[0].rewrites > 0
    assert records[0].numbers == records[1].numbers


# What is left for rounding


def test_leaves_the_importance_of_every_chosen_weight(outliers):
    program, _ = folded(outliers, FOLD)
    matmuls = choose(program).matmuls
    assert set(program.importance) == {matmul.parameter for matmul in matmuls}
    assert all(program.importance[m.parameter].shape == (m.in_features,) for m in matmuls)


def test_a_later_fold_rescales_importance_by_one_over_its_square(outliers):
    once, twice = (folded(outliers, text)[0] for text in (FOLD, f"{FOLD} | smooth-quant{{through_linears=true}}"))
    for name, importance in twice.importance.items():
        s = (twice.tensor(name) / once.tensor(name)).median(0).values  # rows may be divided too, by others
        assert s.min() < 0.9 * s.max()
        columns = importance * s.square() / once.importance[name]
        assert columns.std() / columns.mean() < 1e-3


@pytest.mark.parametrize(
    ("length", "tolerance"), [(1, 1e-4), (16, 0.25)], ids=["no token capped", "tokens capped before the folds"]
)
def test_importance_is_what_would_be_measured_after_the_folds(length, tolerance, outliers):
    """Exactly so for batches of one token; else a fold changes which tokens are capped, by up to 22 % here."""
    model, batches = outliers[0], [inputs("llama", 1, length, seed=seed) for seed in range(12)]
    program, batches = folded((model, batches), f"{FOLD} | smooth-quant{{through_linears=true}}")
    matmuls = choose(program).matmuls
    gather_statistics(program, [Request(m.activation.name, ChannelImportance) for m in matmuls], as_batches(batches))
    for matmul in matmuls:
        anew = program.statistics[matmul.activation.name, "ChannelImportance"]
        torch.testing.assert_close(program.importance[matmul.parameter], anew, rtol=tolerance, atol=0)


def test_round_weights_uses_it_unasked(outliers):
    """Other scales than least squares alone would choose, and those that weighted=true chooses."""
    program, calibration = folded(outliers, FOLD)
    forgetful = program.copy()
    forgetful.importance.clear()
    rounding = Pipeline.parse("round-weights{format=mxint4}")
    used, unused = (rounding.run(p, calibration) for p in (program, forgetful))
    weighted = Pipeline.parse("round-weights{format=mxint4,weighted=true}").run(program, calibration)
    assert used.rounded.keys() == program.importance.keys()
    for name, rounded in used.rounded.items():
        assert not torch.equal(rounded.scales, unused.rounded[name].scales)
        assert torch.equal(rounded.scales, weighted.rounded[name].scales)


def test_lower_mx_uses_it_too(outliers):
    """Right after the fold it makes the same elements and scales as round-weights in between."""
    one, other = (
        folded(outliers, f"{FOLD} | {rest}")[0] for rest in (LOWER, f"round-weights{{format=mxint4}} | {LOWER}")
    )
    names = [name for name in one.parameter_names() if name.endswith(("_elements", "_scales"))]
    assert len(names) == 2 * 7
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in names)
