"""What stands behind a mask reaches no weight, factor, choice or measure, whatever side the padding is on."""

import math
from typing import Any

import pytest
import torch
from models import build, llama
from torch import Tensor, nn

from mxcompile.calibration.runs.run import BoundBatch, Request, Runner, gather_statistics
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.calibration.statistics.observers import ChannelAbsMax, TokenSample
from mxcompile.deploy import deploy
from mxcompile.diagnostics.measure import Measure
from mxcompile.diagnostics.program_scores import KLDivergence, Perplexity
from mxcompile.errors import InputError
from mxcompile.formats import MXINT4, MXINT8
from mxcompile.graph.inputs import as_inputs
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.smooth_quant import SmoothQuant
from mxcompile.pipeline.pipeline import Pipeline

SIDES = torch.tensor([[1] * 5 + [0] * 7, [0] * 4 + [1] * 8, [0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0], [0] * 12])
LEARNED = "gptq{format=mxint4,activation=mxint8,correction=0.5,residual=true} | tune-vectors{activation=mxint8,steps=2}"
FOLDED = (
    "smooth-quant{alpha=none,weight=mxint4,objective=block,grid=2} | awq-fold{weight=mxint4,grid=2} | "
    "rotate{weight=mxint4} | round-weights{format=mxint4,weighted=true}"
)


def padded(seed: int, filler: int, mask: Tensor = SIDES) -> dict[str, Tensor]:
    """A batch with random tokens, and others behind the mask for every filler."""
    tokens, hidden = (
        torch.randint(2, 64, mask.shape, generator=torch.Generator().manual_seed(s)) for s in (seed, 100 + filler)
    )
    return {"input_ids": torch.where(mask.bool(), tokens, hidden), "attention_mask": mask}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = llama(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def outcome(model: nn.Module, recipe: str, filler: int) -> tuple[dict[str, Tensor], list[Any]]:
    """All tensors after a pipeline, and what its passes and the measurements say."""
    batches = [padded(seed, filler) for seed in range(3)]
    program = Pipeline.parse(recipe).run(trace(model, batches[0]), batches, [Measure()])
    records = [(r.rewrites, r.misses, r.numbers, r.preserved_db, r.measured) for r in program.ledger]
    return {name: program.tensor(name) for name in program.parameter_names()}, records


@pytest.mark.parametrize("recipe", [LEARNED, FOLDED], ids=["learned", "folded"])
def test_other_tokens_behind_the_mask_change_nothing(recipe, model):
    (one, records), (other, same) = (outcome(model, recipe, filler) for filler in (1, 2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert str(records) == str(same)
    assert any(rewrites for rewrites, *_ in records)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [LEARNED, FOLDED], ids=["learned", "folded"])
def test_experts_count_their_visible_tokens(recipe):
    """Hidden tokens are sent to experts, too: the sizes of their matmuls change float rounding alone."""
    model = build("mixtral")
    tensors = []
    for filler in (1, 2):
        batches = [padded(seed, filler) for seed in range(3)]
        program = Pipeline.parse(recipe).run(trace(model, batches[0]), batches)
        tensors.append({name: program.tensor(name) for name in program.parameter_names()})
    one, other = tensors
    changed = {name: (tensor != other[name]).float().mean().item() for name, tensor in one.items()}
    assert max(changed.values()) < 0.01


def rounded(model: nn.Module) -> tuple[Program, Program]:
    program = trace(model, padded(0, 1))
    return program, Pipeline.parse("round-weights{format=mxint4}").run(program)


@pytest.mark.parametrize("kind", ["kl", "perplexity"])
def test_scores_are_those_of_the_tokens_alone(kind, model):
    """A padded batch scores as its first sample does without padding, however much padding there is."""
    program, quantized = rounded(model)
    batch = padded(0, 1, (torch.arange(40) < 5).long().repeat(2, 1))
    short = {name: value[:, :5] for name, value in batch.items()}
    scores = []
    for given in (batch, short):
        batches = [as_inputs(given)]
        score = KLDivergence.of(program, batches) if kind == "kl" else Perplexity(batches)
        scores.append(score(Runner(quantized), quantized))
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert scores[1] > (0 if kind == "kl" else 1)


def test_a_perplexity_of_no_predicted_token(model):
    program, _ = rounded(model)
    batch = as_inputs(padded(0, 1, torch.tensor([[0, 0, 1], [1, 0, 1]])))
    with pytest.raises(InputError, match="perplexity needs a token that another one precedes"):
        Perplexity([batch])(Runner(program), program)


class Chaotic(nn.Module):
    """Rows behind the mask hold noise: the last digits of large numbers, and infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, 64), nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = x + self.down(self.up(self.norm(x)).relu())
        return (y + (y * 1e7).frac() * (attention_mask == 0)[..., None]) / attention_mask[..., None]


def test_outputs_behind_the_mask_are_not_compared():
    """A fold preserves what counts, and the deployed module agrees with the program where it counts."""
    torch.manual_seed(0)
    model = Chaotic().eval()
    passes = [SmoothQuant(), LowerMX(MXINT4, activation=MXINT8)]
    program = Pipeline(passes).run(trace(model, padded(0, 1)), [padded(0, 1)], [Measure()])
    fold, lowered = program.ledger
    assert fold.rewrites == 1
    assert fold.preserved_db > 100
    assert lowered.measured is not None
    assert 10 < lowered.measured.output_db < 60
    deploy(program, model)


def test_batches_that_are_hidden_altogether(model):
    """They are left out; if no other batch is there, there is nothing to learn from."""
    hidden, shown = padded(0, 1, torch.zeros_like(SIDES)), [padded(seed, 1) for seed in range(3)]
    program = trace(model, shown[0])
    tensors = []
    for batches in (shown, [*shown[:1], hidden, *shown[1:]]):
        learned = Pipeline.parse(LEARNED).run(program, batches)
        tensors.append([learned.tensor(name) for name in learned.parameter_names()])
    assert all(map(torch.equal, *tensors))
    with pytest.raises(InputError, match=r"the masks of all 2 calibration batches hide every token: .* no data"):
        Pipeline.parse(LEARNED).run(program, [hidden, hidden])
    probes = [as_inputs(hidden), as_inputs(shown[0])]
    assert len(KLDivergence.of(program, probes).float_logits) == 1
    with pytest.raises(InputError, match="the masks of all 1 probe batches hide every token"):
        Pipeline.parse(LEARNED).run(program, shown, [Measure(hidden)])


def test_observers_of_a_run_and_of_a_sweep_get_the_visible_rows(model):
    batch = padded(0, 1)
    program = trace(model, batch)
    (node,) = (node for node in program.graph.nodes if node.name == "linear")
    value = node.all_input_nodes[0]
    gather_statistics(program, [Request(value.name, kind) for kind in (ChannelAbsMax, TokenSample)], [as_inputs(batch)])
    bound = BoundBatch.of(program, Sweep(program, [as_inputs(batch)]).states[0])
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    x = Runner(program).run_nodes(nodes[: nodes.index(value) + 1], bound, None, [value])[value][SIDES.bool()]
    assert torch.equal(program.statistics[value.name, "ChannelAbsMax"], x.abs().amax(0))
    assert len(program.statistics[value.name, "TokenSample"]) == len(x) == SIDES.sum()
    assert math.isfinite(x.sum())
