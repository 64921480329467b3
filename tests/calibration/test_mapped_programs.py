"""A program whose tensors and calibration states lie in files: every pass makes the same of it, to the bit."""

from pathlib import Path

import pytest
import torch
from models import build, inputs, llama
from torch import nn

from mxcompile.analysis.choice import choose
from mxcompile.analysis.segments import find_segments
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.passes.recipes import as_pipeline
from mxcompile.tensor.mapped_tensors import MappedTensors

_FORMATS = "weight=mxint4,activation=mxint8"
_LOWER = f"lower-mx{{{_FORMATS}}}"
_DISTILL = "round-weights{format=mxint4} | distill{activation=mxint8,steps=4,OPTIONS} | " + _LOWER
PIPELINES = {
    "default": "w4a8-mxint",
    "rotations": "w4a4-mxfp",
    "quick": "w4a16-mxfp-quick",
    "smooth": f"smooth-quant | gptq{{format=mxint4,activation=mxint8,correction=0.5,residual=true}} | {_LOWER}",
    "searched": f"smooth-quant{{alpha=none,{_FORMATS},objective=block,through_linears=true}} | {_LOWER}",
    "blocks": f"awq-fold{{{_FORMATS},objective=block}} | round-weights{{format=mxint4}} | {_LOWER}",
    "segments": _DISTILL.replace("OPTIONS", "train=weights,loss=block,scope=segment,rate=0.2"),
    "inner values": _DISTILL.replace("OPTIONS", "train=multipliers,loss=distribution,attention=1,rate=0.01"),
    "rounding": f"learn-rounding{{format=mxint4,activation=mxint8,steps=4,choices=1}} | {_LOWER}",
    "weights": _DISTILL.replace("OPTIONS", "train=weights"),
    "weighted": f"round-weights{{format=mxint4,weighted=true}} | {_LOWER}",
}


def mapped(folder: Path, *, copies: bool, states: int = 0) -> MappedTensors:
    """Nothing stays in memory but what is in use. copies: as on a GPU, where a tensor in use is a copy."""
    made = MappedTensors(folder, torch.device("cpu"), in_use=1, states=states, smallest=1000)
    made._copies = copies
    return made


def batches(kind: str) -> list[Inputs]:
    return [Inputs((), inputs(kind, 2, 24, seed=seed)) for seed in range(3)]


def assert_equal(program: Program, expected: Program) -> None:
    names = list(expected.parameter_names())
    assert names == list(program.parameter_names())
    assert [name for name in names if not torch.equal(program.tensor(name), expected.tensor(name))] == []
    assert [record.numbers for record in program.ledger] == [record.numbers for record in expected.ledger]
    assert [record.misses for record in program.ledger] == [record.misses for record in expected.ledger]
    assert [record.bytes for record in program.ledger] == [record.bytes for record in expected.ledger]


def check(model: nn.Module, kind: str, pipeline: str, folder: Path) -> None:
    """As on a CPU and as on a GPU."""
    expected = as_pipeline(pipeline).run(trace(model, inputs(kind)), batches(kind))
    for copies in (False, True):
        (part := folder / str(copies)).mkdir()
        check_mapped(model, kind, pipeline, mapped(part, copies=copies), expected)
        assert not list(part.iterdir())


def check_mapped(model: nn.Module, kind: str, pipeline: str, files: MappedTensors, expected: Program) -> None:
    program = trace(model, inputs(kind))
    program.keep_in_files(files)
    result = as_pipeline(pipeline).run(program, batches(kind))
    assert result.mapped is program.mapped
    assert_equal(result, expected)
    large = [name for name in result.parameter_names() if result.tensor_bytes(name) >= 1000]
    assert large
    assert all(result.mapped.holds(result.stored(name)) for name in large)
    own = dict(model.named_parameters())
    assert not any(result.mapped.holds(parameter) for parameter in own.values())


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=list(PIPELINES))
def test_the_same_bytes(tmp_path, pipeline):
    check(llama(2), "llama", pipeline, tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "gemma", "gpt2"])
def test_the_same_bytes_of_other_models(tmp_path, kind):
    check(build(kind), kind, "w4a8-mxint", tmp_path)


def test_outputs_and_text_are_the_same(tmp_path):
    model, example = llama(2), inputs("llama")
    plain, program = trace(model, example), trace(model, example)
    program.keep_in_files(mapped(tmp_path, copies=True))
    assert str(program) != ""
    assert torch.equal(program(**example)["logits"], plain(**example)["logits"])
    assert torch.equal(program.copy()(**example)["logits"], plain(**example)["logits"])


def test_states_are_in_files_above_the_limit(tmp_path):
    program = trace(llama(2), inputs("llama"))
    program.keep_in_files(mapped(tmp_path, copies=False, states=30_000))  # of 3 x 12 KB
    sweep = Sweep(program, batches("llama"))
    first = find_segments(program, choose(program).matmuls)[0]
    sweep.advance(first)
    large = [[v for v in state.values() if isinstance(v, torch.Tensor) and v.nbytes >= 1000] for state in sweep.states]
    in_files = [all(map(program.mapped.holds, values)) for values in large]
    assert all(large)
    assert True in in_files
    assert False in in_files


def test_freed_memory_is_returned_before_each_batch_runs(tmp_path, monkeypatch):
    program = trace(llama(2), inputs("llama"))
    program.keep_in_files(mapped(tmp_path, copies=False))
    sweep = Sweep(program, batches("llama"))
    first = find_segments(program, choose(program).matmuls)[0]
    calls = []
    monkeypatch.setattr(program.mapped, "return_freed", lambda: calls.append(len(calls)))
    sweep.advance(first)
    assert len(calls) == 3


class Counter(nn.Module):
    """Counts its calls in a buffer, and adds the count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("count", torch.zeros(32 * 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return self.linear(x) + self.count[:32]


def test_buffers_that_forward_writes_to_stay_in_memory(tmp_path):
    model, x = Counter(), torch.randn(4, 32)
    program = trace(model, x)
    expected = program(x)
    program.keep_in_files(mapped(tmp_path, copies=True))
    assert torch.equal(program(x), expected)
    assert torch.equal(program(x), expected)
    assert not program.mapped.holds(program.stored("count"))
    assert program.mapped.holds(program.stored("linear.weight"))
