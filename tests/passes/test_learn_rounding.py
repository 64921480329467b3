"""learn-rounding: rounding trained segment by segment towards what the float model computes."""

import math
from itertools import chain, repeat

import pytest
import torch
from models import build, inputs, output
from trained_programs import divergence, small_run

import mxcompile
from mxcompile.calibration.learning import segment_training
from mxcompile.errors import PassError, PipelineError
from mxcompile.pipeline.pipeline import Pipeline

FORMATS = "format=mxint4,activation=mxint8"
LOWER = "lower-mx{weight=mxint4,activation=mxint8}"
NEAREST = f"learn-rounding{{{FORMATS},start=nearest,steps=%d}}"


@pytest.fixture(scope="module")
def run():
    return small_run()


def test_training_comes_nearer_to_the_float_model(run):
    model, _, _, lower = run
    plain, trained = lower(f"{NEAREST % 0} | {LOWER}"), lower(f"{NEAREST % 50} | {LOWER}")
    assert divergence(model, trained) < 0.95 * divergence(model, plain)
    record = trained.ledger[0]
    assert record.rewrites == len(record.numbers) == 14
    assert all(n["loss_after"] <= n["loss_before"] for n in record.numbers.values())
    assert list(record.curves) == [f"segment {number}" for number in range(1, 5)]
    for curve in record.curves.values():
        assert [step for step, _ in curve.training] == list(range(1, 51))
        assert [step for step, _ in curve.held_out] == [0, 12, 25, 37, 50]
    mxcompile.deploy(trained, model)


def test_without_steps_it_is_gptq(run):
    *_, lower = run
    one, other = lower(f"learn-rounding{{{FORMATS},steps=0}}"), lower(f"gptq{{{FORMATS},correction=0.25}}")
    for name in other.rounded:
        assert torch.equal(one.tensor(name), other.tensor(name))
        assert torch.equal(one.rounded[name].scales, other.rounded[name].scales)


@pytest.mark.parametrize("options", ["train=weights", "train=clip", "choices=2", "last=mse", "target=0", "target=0.5"])
def test_options(run, options):
    """Each gives MX values, and the same ones twice; held-out batches never get worse."""
    *_, lower = run
    text = f"learn-rounding{{{FORMATS},start=nearest,steps=8,batch=2,{options}}}"
    one, other = lower(f"{text} | {LOWER}"), lower(f"{text} | {LOWER}")
    x = inputs("llama", 8, 32, seed=99)
    assert torch.equal(output(one(**x)), output(other(**x)))
    assert all(n["loss_after"] <= n["loss_before"] for n in one.ledger[0].numbers.values())


def test_one_batch_is_not_enough(run):
    """Without a held-out batch, weights stay as they are rounded at first, and a miss says so."""
    _, program, batches, _ = run
    trained = Pipeline.parse(NEAREST % 8).run(program, batches[:1])
    plain = Pipeline.parse(NEAREST % 0).run(program, batches[:1])
    assert all(torch.equal(trained.tensor(name), plain.tensor(name)) for name in plain.rounded)
    assert any("give two or more calibration batches" in miss.reason for miss in trained.ledger[-1].misses)


def test_a_loss_that_becomes_nan_is_named(run, monkeypatch):
    """Weights are within their formats at every step, so that only an overflow inside the model makes it NaN."""
    *_, lower = run
    losses = chain([1.0] * 12, repeat(math.nan))
    monkeypatch.setattr(segment_training, "capped_error", lambda *_: torch.tensor(next(losses)))
    message = r"learn-rounding.*the loss is nan at step [2-8] of 8, in the segment of .*_proj.*: take a smaller rate"
    with pytest.raises(PassError, match=message):
        lower(NEAREST % 8)


def test_the_users_model_is_untouched_and_twice_changes_nothing(run):
    model, program, batches, lower = run
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = lower(NEAREST % 4)
    again = Pipeline.parse(NEAREST % 4).run(trained, batches)
    assert again.ledger[-1].rewrites == 0
    assert all(again.tensor(name) is trained.tensor(name) for name in trained.rounded)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not program.rounded


@pytest.mark.parametrize("name", ["mlp", "gpt2", "mixtral"])
def test_other_models(name):
    """A last dimension that is contracted second, models without logits; experts are left to the pass behind."""
    batches = [inputs(name, 4, seed=s) if name == "mlp" else inputs(name, 4, 16, seed=s) for s in range(4)]
    model = build(name)
    text = f"learn-rounding{{{FORMATS},start=nearest,steps=8}} | gptq{{{FORMATS}}} | {LOWER}"
    trained = Pipeline.parse(text).run(mxcompile.trace(model, batches[0]), batches)
    assert trained.ledger[0].rewrites > 0
    left = [miss for miss in trained.ledger[0].misses if "stacked weights are not trained" in miss.reason]
    assert bool(left) == (name == "mixtral") == (trained.ledger[1].rewrites > 0)
    mxcompile.deploy(trained, model)


def test_half_precision_stays_so():
    batches = [inputs("llama", 4, 16, seed=seed) for seed in range(3)]
    model = build("llama", torch.bfloat16)
    trained = Pipeline.parse(f"{NEAREST % 4} | {LOWER}").run(mxcompile.trace(model, batches[0]), batches)
    assert output(trained(**batches[0])).dtype == torch.bfloat16


@pytest.mark.parametrize("options", ["rate=0", "batch=0", "target=2", "dropped=0.9"])
def test_wrong_options_are_named(options):
    with pytest.raises(PipelineError, match=options.split("=")[0]):
        Pipeline.parse(f"learn-rounding{{format=mxint4,{options}}}")
