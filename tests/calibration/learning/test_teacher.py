"""The float model's outputs for batches that come again: the same to the bit, from what entered the head."""

import pytest
import torch
from models import build, inputs

import mxcompile
from mxcompile.calibration.compared_outputs import ComparedOutputs
from mxcompile.calibration.learning import teacher
from mxcompile.calibration.learning.distillation import Distillation
from mxcompile.calibration.learning.teacher import Teacher
from mxcompile.calibration.runs.altered_run import AlteredRun
from mxcompile.calibration.runs.run import BoundBatch
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.inputs import Inputs


class Counted:
    """A teacher of a small model, its batches, and how many nodes each call has run."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches = [Inputs((), inputs(name, 2, 16, seed=seed)) for seed in range(2)]
        self.program = mxcompile.trace(build(name), inputs(name, 2, 16))
        self.outputs = list(ComparedOutputs(self.program).nodes.values())
        self.teacher = Teacher(self.program, self.outputs)
        self.counts: list[int] = []
        run = self.teacher._runner.run_nodes

        def counted(nodes, *rest):
            self.counts.append(len(nodes))
            return run(nodes, *rest)

        monkeypatch.setattr(self.teacher._runner, "run_nodes", counted)

    def values(self, batch: Inputs) -> list[torch.Tensor]:
        bound = BoundBatch.of(self.program, bind_inputs(self.program, batch))
        return list(self.teacher.values(batch, bound, self.outputs).values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_only_the_head_runs_again(name, monkeypatch):
    """Gemma caps its logits: a few nodes."""
    counted = Counted(name, monkeypatch)
    first = [counted.values(batch) for batch in counted.batches]
    again = [counted.values(batch) for batch in counted.batches]
    assert all(
        torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert not torch.equal(first[0][0], first[1][0])
    assert counted.counts[2] == counted.counts[3] <= 5 < counted.counts[0] == counted.counts[1]


def test_nothing_is_kept_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(teacher, "_LARGEST_KEPT", 2 * 16 * 64 * 4 + 1000)
    counted = Counted("llama", monkeypatch)
    for batch in counted.batches * 2:
        counted.values(batch)
    assert counted.counts[2] < counted.counts[0] == counted.counts[1] == counted.counts[3]


def test_hidden_rows_and_models_without_a_head_run_whole(monkeypatch):
    assert Counted("mlp", monkeypatch).teacher._head is None
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :3] = 0
    hidden = Inputs((), {**inputs("llama", 2, 16), "attention_mask": mask})
    program = mxcompile.trace(build("llama"), hidden.kwargs)
    bound = BoundBatch.of(program, bind_inputs(program, hidden))
    outputs = list(ComparedOutputs(program).nodes.values())
    whole = Teacher(program, outputs)
    assert bound.visibility.hides
    for _ in range(2):
        whole.values(hidden, bound, outputs)
    assert not whole._kept


def test_nothing_is_kept_of_batches_that_come_once():
    program = mxcompile.trace(build("llama"), inputs("llama", 2, 16))
    batch = Inputs((), inputs("llama", 2, 16))
    kept = Distillation(program, AlteredRun(program, {}), program)
    once = Distillation(program, AlteredRun(program, {}), program, comes_again=False)
    for name, values in kept.expected(batch).items():
        assert torch.equal(once.expected(batch)[name], values)
    assert kept._teacher._kept
    assert not once._teacher._kept
