"""bisect: finds the pass and the layers of a planted fault of any kind, and suggests a setting that fixes it."""

import json
import math
from dataclasses import dataclass
from io import StringIO

import pytest
import torch
from models import inputs, llama
from rich.console import Console
from typer.testing import CliRunner

import mxcompile
from mxcompile import Pass, PassResult, Pipeline, bisect
from mxcompile.analysis.choice import choose
from mxcompile.calibration.hybrid_run import HybridRun, find_changes
from mxcompile.calibration.run import run_outputs
from mxcompile.cli.app import app
from mxcompile.errors import InputError
from mxcompile.formats import MXINT8
from mxcompile.graph.program import Stage
from mxcompile.numerics.metrics import kl_divergence
from mxcompile.pipeline.interfaces import FLOATING

LAYERS = 3
W8 = "round-weights{format=mxint8} | lower-mx{weight=mxint8,activation=mxint8}"
W4 = "round-weights{format=mxint4} | lower-mx{weight=mxint4,activation=mxint8}"
TARGET = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model():
    return llama(LAYERS)


@dataclass(frozen=True)
class BadScales(Pass):
    """After lowering: block scales of some layers are 8 times too large."""

    targets: tuple[str, ...] = (TARGET,)

    name = "bad-scales"
    accepts = frozenset({Stage.LOWERED})

    def run(self, program):
        names = [f"{target}.weight_scales" for target in self.targets]
        for name in filter(program.has_tensor, names):
            program.set_tensor(name, program.tensor(name) + 3)
        return PassResult(len(names))


@dataclass(frozen=True)
class BadRounding(Pass):
    """Before lowering: a weight is rounded much too coarsely."""

    target: str = TARGET

    name = "bad-rounding"
    accepts = FLOATING

    def run(self, program):
        if f"{self.target}.weight" in {matmul.parameter for matmul in choose(program).matmuls}:
            weight = program.tensor(f"{self.target}.weight").detach()
            program.set_tensor(f"{self.target}.weight", weight.sign() * weight.abs().mean() * 3)
        return PassResult(1)


@dataclass(frozen=True)
class BadNorm(Pass):
    """A tensor that is no layer's."""

    name = "bad-norm"
    accepts = FLOATING

    def run(self, program):
        name = "model.layers.2.input_layernorm.weight"
        program.set_tensor(name, -program.tensor(name).detach())
        return PassResult(1)


def pipeline(text, *passes):
    return Pipeline.parse(text, passes=passes)


# Planted faults


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_a_layer_whose_scales_a_pass_has_spoiled(model, metric):
    """The text is what the model itself would write: only so is there a perplexity to lose."""
    x = {"input_ids": model.generate(inputs("llama", 4, 4)["input_ids"], max_new_tokens=12, do_sample=False)}
    threshold = {"kl": 0.05}
    if metric == "perplexity":
        threshold = {"perplexity": 1.05 * bisect(model, x, recipe=W8, perplexity=1e9).scores[-1]}
    found = bisect(model, x, recipe=pipeline(f"{W8} | bad-scales", BadScales), **threshold)
    assert found.culprit == 3
    assert found.culprit_pass == BadScales()
    assert found.guilty == (f"{TARGET}.weight",)
    assert found.contributions.keys() == {f"{TARGET}.weight"}
    assert found.restored == pytest.approx(found.scores[2], rel=1e-6)
    assert (found.fix.names, found.fix.format) == ((TARGET,), None)
    assert found.fix.mends
    assert found.fix.score < found.threshold


def test_two_layers(model):
    targets = ("model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj")
    recipe = Pipeline([*pipeline(W8).passes, BadScales(targets)])
    found = bisect(model, inputs("llama", 4, 16), recipe=recipe, kl=0.02)
    assert set(found.guilty) == {f"{target}.weight" for target in targets}
    assert set(found.fix.names) == set(targets)
    assert found.fix.mends


def test_a_weight_spoiled_in_the_float_graph(model):
    recipe = pipeline("bad-rounding | round-weights{format=mxint8} | lower-mx{weight=mxint8}", BadRounding)
    found = bisect(model, inputs("llama", 4, 16), recipe=recipe, kl=0.05)
    assert (found.culprit, found.guilty) == (1, (f"{TARGET}.weight",))
    assert found.fix.mends


def test_the_layers_that_lowering_itself_loses_most_on(model):
    """A norm is smaller and its readers larger in one channel of every block: of 21 changes those two are to blame."""
    planted, x = llama(LAYERS), inputs("llama", 4, 16)
    layer = planted.model.layers[1]
    readers = {f"model.layers.1.mlp.{name}": layer.mlp.get_submodule(name) for name in ("gate_proj", "up_proj")}
    with torch.no_grad():
        layer.post_attention_layernorm.weight[::32] /= 500
        for reader in readers.values():
            reader.weight[:, ::32] *= 500
    total = bisect(planted, x, recipe="lower-mx{weight=mxint6}", kl=1e9).scores[-1]
    found = bisect(planted, x, recipe="lower-mx{weight=mxint6}", kl=total / 2)
    assert found.culprit == 1
    assert len(found.contributions) == 7 * LAYERS
    assert set(found.fix.names) <= set(readers)
    assert len(found.guilty) == len(found.fix.names) >= 1
    assert found.fix.mends


def test_eight_bits_are_suggested_where_they_do(model):
    """Weights in 4 bits alone: the layers to blame need not stay in float."""
    x = inputs("llama", 4, 16)
    total = bisect(model, x, recipe="lower-mx{weight=mxint4}", kl=1e9).scores[-1]
    found = bisect(model, x, recipe="lower-mx{weight=mxint4}", kl=0.8 * total)
    assert (found.fix.format, found.fix.mends) == ("mxint8", True)
    assert str(found.fix).startswith(f"overrides={{'{found.fix.names[0]}': MXINT8")
    pipeline = found.pipeline.with_overrides(dict.fromkeys(found.fix.names, MXINT8))
    assert bisect(model, x, recipe=pipeline, kl=1e9).scores[-1] == pytest.approx(found.fix.score)


def test_what_is_no_layer(model):
    recipe = pipeline(f"bad-norm | {W8}", BadNorm)
    found = bisect(model, inputs("llama", 4, 16), recipe=recipe, kl=0.05)
    assert (found.culprit, found.guilty) == (1, ("model.layers.2.input_layernorm.weight",))
    assert found.fix is None


# The search


def test_nothing_to_blame(model):
    found = bisect(model, inputs("llama"), recipe=W8, kl=1.0)
    assert (found.culprit, found.culprit_pass, found.guilty, found.fix) == (None, None, (), None)
    assert found.scores[0] == 0.0
    assert found.forwards == 3


@pytest.mark.parametrize("share", [0.6, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.3, 0.9))])
def test_a_set_that_holds_the_threshold_and_cannot_be_smaller(model, share):
    """No layer is planted; whatever is blamed, without it the threshold holds, and with any one of it back it fails."""
    x = inputs("llama", 4, 16)
    recipe = Pipeline.parse("lower-mx{weight=mxint4,activation=mxint4}")
    total = bisect(model, x, recipe=recipe, kl=1e9).scores[-1]
    found = bisect(model, x, recipe=recipe, kl=share * total)
    count = 7 * LAYERS
    assert found.restored <= found.threshold
    assert 1 <= len(found.guilty) < count
    assert found.forwards <= 2 + 2 * count + math.log2(count) + 4
    before = mxcompile.trace(model, x)
    after = recipe.run(before)
    wanted, changes = before(**x).logits, find_changes(before, after)
    runner = HybridRun(before, after)
    for back in found.guilty:
        runner.apply(c for c in changes if c.name not in found.guilty or c.name == back)
        assert kl_divergence(wanted, run_outputs(runner, before, before.example).logits) > found.threshold


@pytest.mark.parametrize("text", ["lower-mx{weight=mxint4,activation=mxint8}", "round-weights{format=mxfp4}"])
def test_all_changes_are_the_program_after_and_none_the_one_before(model, text):
    x = inputs("llama", 4, 16)
    before = mxcompile.trace(model, x)
    after = Pipeline.parse(text).run(before)
    runner = HybridRun(before, after)
    changes = find_changes(before, after)
    runner.apply(changes)
    assert torch.equal(run_outputs(runner, before, before.example).logits, after(**x).logits)
    runner.apply([])
    assert torch.equal(run_outputs(runner, before, before.example).logits, before(**x).logits)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({}, "pass one threshold"),
        ({"kl": 1.0, "perplexity": 2.0}, "pass one threshold"),
        ({"perplexity": 1.5}, "the float model itself has a perplexity of"),
    ],
)
def test_thresholds_that_cannot_be(model, thresholds, message):
    with pytest.raises(InputError, match=message):
        bisect(model, inputs("llama"), recipe=W8, **thresholds)


# What is printed


def test_tables_and_conclusions(model):
    found = bisect(model, inputs("llama", 4, 16), recipe=pipeline(f"{W8} | bad-scales", BadScales), kl=0.05)
    console = Console(record=True, width=160, file=StringIO())
    found.print_to(console)
    text = console.export_text()
    assert "first above 0.05" in next(line for line in text.splitlines() if "bad-scales" in line)
    assert "to blame" in next(line for line in text.splitlines() if f"{TARGET}.weight" in line)
    assert f"exclude=['{TARGET}'] fixes it: KL 0.0" in text


def test_the_command(local_model):
    arguments = ["bisect", str(local_model), "--recipe", W4, "--kl", "0.001", "--length", "16", "--windows", "2"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "first above 0.001" in result.output
    assert "to blame" in result.output
    result = CliRunner().invoke(app, [*arguments, "--json"])
    record = json.loads(result.stdout)
    assert record["culprit"] == "round-weights{format=mxint4}"
    assert record["forwards"] >= 3
    assert set(record["guilty"]) <= set(record["contributions"])
