"""distill: what is trained, towards what, in which scope, and what stays out."""

import pytest
import torch
from models import build, inputs, output
from trained_programs import small_run

import mxcompile
from mxcompile.calibration.learning.distillation import Distillation
from mxcompile.calibration.ranks.exchange import Ranks
from mxcompile.errors import PassError, PipelineError
from mxcompile.passes.distill import Distill
from mxcompile.pipeline.pipeline import Pipeline

ROUND = "round-weights{format=mxint4}"
LOWER = "lower-mx{weight=mxint4,activation=mxint8}"


def distill(**options) -> str:
    given = {"activation": "mxint8", "steps": 32, **options}
    return f"distill{{{','.join(f'{name}={value}' for name, value in given.items())}}}"


@pytest.fixture(scope="module")
def run():
    return small_run()


@pytest.mark.parametrize(
    "options",
    [
        {"train": "multipliers", "rate": 0.01},
        {"train": "outliers", "share": 0.1, "rate": 0.06},
        {"train": "lora", "rate": 0.02},
        {"train": "weights", "loss": "ce", "rate": 0.04},
        {"train": "weights", "loss": "block", "rate": 0.04},
        {"train": "vectors", "loss": "distribution", "rate": 0.01},
        {"train": "vectors", "loss": "distribution", "scope": "segment", "rate": 0.01},
        {"train": "weights", "loss": "block", "scope": "segment", "rate": 0.04},
        {"train": "weights", "attention": 0.5, "rate": 0.04},
        {"train": "vectors", "kurtosis": 0.1, "rate": 0.01},
    ],
)
def test_each_lowers_its_loss_and_deploys(run, options):
    model, _, _, lower = run
    trained = lower(f"{ROUND} | {distill(**options)} | {LOWER}")
    record = trained.ledger[1]
    assert record.rewrites
    assert record.numbers
    assert any(n["loss_after"] < n["loss_before"] for n in record.numbers.values())
    x = inputs("llama", 2, 16, seed=99)
    deployed = mxcompile.deploy(trained, model)
    with torch.no_grad():
        torch.testing.assert_close(output(deployed(**x)), output(trained(**x)), rtol=1e-4, atol=1e-4)


def test_multipliers_are_inserted_and_removed_if_they_are_no_gain(run):
    model, _, batches, lower = run
    rounded = lower(ROUND)
    trained = Pipeline.parse(distill(train="multipliers", rate=0.01)).run(rounded, batches)
    names = [n for n in trained.parameter_names() if n.endswith("_input_multiplier")]
    assert len(names) == trained.ledger[-1].rewrites == 8  # q k v; o; gate up; down, of two layers
    assert all(trained.tensor(name).dim() == 1 for name in names)
    worse = Pipeline.parse(distill(train="multipliers", rate=100.0, steps=2)).run(rounded, batches)
    assert list(worse.parameter_names()) == list(rounded.parameter_names())
    assert len(worse.graph.nodes) == len(rounded.graph.nodes)
    deployed = mxcompile.deploy(Pipeline.parse(LOWER).run(trained, batches), model)
    assert deployed.model.layers[0].mlp.down_proj.weight.multiplier is not None


def test_rotated_inputs_get_no_multiplier(run):
    _, _, _, lower = run
    text = "rotate{weight=mxint4,activation=mxint4}"
    trained = lower(f"{text} | {ROUND} | {distill(train='multipliers', steps=2)}")
    rotated = trained.ledger[0].rewrites
    reasons = [miss.reason for miss in trained.ledger[-1].misses]
    assert rotated
    assert sum("its input is rotated" in reason for reason in reasons) == rotated


def test_outliers_are_the_share_of_blocks_that_cost_most_and_no_others_move(run):
    *_, lower = run
    rounded, trained = lower(ROUND), lower(f"{ROUND} | {distill(train='outliers', share=0.02, rate=0.06)}")
    changed = every = 0
    for name in rounded.rounded:
        blocks = (rounded.tensor(name) != trained.tensor(name)).unflatten(-1, (-1, 32)).any(-1)
        changed, every = changed + int(blocks.sum()), every + blocks.numel()
    assert 0 < changed <= round(0.02 * every)


def test_a_low_rank_change_moves_weights_within_its_bound(run):
    *_, lower = run
    rounded = lower(ROUND)
    free = lower(f"{ROUND} | {distill(train='lora', rate=0.02, rank=8)}")
    assert any(not torch.equal(free.tensor(n), rounded.tensor(n)) for n in rounded.rounded)
    bounded = lower(f"{ROUND} | {distill(train='lora', rate=0.1, bound=0.4)}")
    assert all(torch.equal(bounded.tensor(n), rounded.tensor(n)) for n in rounded.rounded)


def test_segments_run_twice_give_the_same_and_resume(run, tmp_path):
    _, program, batches, lower = run
    text = f"{ROUND} | {distill(train='weights', loss='block', scope='segment', steps=6)}"
    expected = lower(text)
    runs = [Pipeline.parse(text).run(program, batches, resume=tmp_path / "run") for _ in range(2)]
    for name in expected.parameter_names():
        assert all(torch.equal(other.tensor(name), expected.tensor(name)) for other in runs)
    assert all(other.ledger[-1].numbers == expected.ledger[-1].numbers for other in runs)
    assert all(other.ledger[-1].curves == expected.ledger[-1].curves for other in runs)


def test_states_that_are_worse_in_a_second_domain_are_refused(run, monkeypatch):
    _, program, batches, _ = run
    text = f"{ROUND} | {distill(train='vectors', rate=0.01, guard=2)}"
    own = Pipeline.parse(text.replace(",guard=2", "")).run(program, batches[:6])
    accepted = Pipeline.parse(text).run(program, [*batches[:6], *batches[:2]])
    assert accepted.ledger[-1].curves == own.ledger[-1].curves  # the last two are not trained on, nor held out
    assert accepted.ledger[-1].rewrites
    plain, calls = Distillation.mean_loss, list[int]()

    def worse_elsewhere(self, tensors, held):
        if len(held) == 1:
            return plain(self, tensors, held)
        calls.append(1)
        return float(len(calls))

    monkeypatch.setattr(Distillation, "mean_loss", worse_elsewhere)
    refused = Pipeline.parse(text).run(program, [*batches[:6], *batches[:2]])
    assert refused.ledger[-1].rewrites == 0
    assert any("more loss on the batches of the other domain" in miss.reason for miss in refused.ledger[-1].misses)
    few = Pipeline.parse(text).run(program, batches[:3])
    assert "two or more calibration batches beside the 2 of another domain" in few.ledger[-1].misses[0].reason


@pytest.mark.parametrize("options", [{"loss": "kl"}, {"loss": "block", "kurtosis": 1}, {"loss": "block", "guard": 1}])
def test_what_a_segment_cannot_be_trained_for_is_named(options):
    with pytest.raises(PipelineError, match="needs loss=block or loss=distribution, and has no attention"):
        Pipeline.parse(distill(scope="segment", **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"loss": "block"}, "take loss=kl, attention=0"), ({"loss": "block", "scope": "segment"}, "take scope=model")],
)
def test_losses_inside_the_model_are_refused_in_several_processes(run, options, reason):
    *_, lower = run
    program = lower(ROUND)
    program.ranks = Ranks(0, 2)
    with pytest.raises(PassError, match=rf"{reason}.* start it without torchrun"):
        Pipeline.parse(distill(train="vectors", **options)).passes[0].run(program)


def test_values_that_a_pass_has_changed_are_left_out(run):
    """A permuted residual stream is not compared; without any value, nothing is trained."""
    *_, lower = run
    trained = lower(f"permute{{values=stream,by=weight}} | {ROUND} | {distill(train='vectors', loss='block')}")
    assert trained.ledger[0].rewrites
    assert any("has permuted, rotated or scaled" in miss.reason for miss in trained.ledger[-1].misses)
    assert "nothing inside the model can be compared" in trained.ledger[-1].misses[0].reason


def test_it_needs_the_float_model_in_every_scope():
    program = mxcompile.trace(build("llama"), inputs("llama"))
    for options in ({}, {"loss": "block", "scope": "segment"}):
        passes = Pipeline.parse(distill(**options)).passes
        assert isinstance(passes[0], Distill)
        with pytest.raises(PassError, match="distill needs the traced float model"):
            passes[0].run(program)


@pytest.mark.parametrize("cache", ["key=mxint4,value=mxint4", "key=mxint4,value=mxint4,rotate=head,window=4"])
def test_a_rounded_cache_takes_part(run, cache):
    """LLM-QAT: gradients pass the rounding of keys and values to what projects them."""
    *_, lower = run
    start = f"quantize-cache{{{cache}}} | {ROUND}"
    rounded = lower(start)
    trained = lower(f"{start} | {distill(train='weights', rate=0.04, loss='block', attention=0.5)}")
    assert trained.ledger[-1].rewrites
    moved = [n for n in rounded.rounded if not torch.equal(rounded.tensor(n), trained.tensor(n))]
    assert any("k_proj" in name for name in moved)
    assert any("v_proj" in name for name in moved)
