"""A killed run resumes after the last finished segment, with bit-identical results; a folder belongs to one run."""

import os
from pathlib import Path

import pytest
import torch
from models import build, inputs, llama
from safetensors.torch import save_file
from torch import nn

import mxcompile
from mxcompile.checkpoint.provenance import installed_versions
from mxcompile.errors import InputError
from mxcompile.numerics.column_rounding import ColumnRounding
from mxcompile.pipeline.interfaces import Instrument
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.pipeline.resume import ResumeFolder

TEXT = "smooth-quant | gptq{format=mxint4,activation=mxint8,correction=0.25,overrides=[*.down_proj=mxint6]}"


class Killed(Instrument):
    """Stops before a segment of gptq, as Ctrl-C would, and records the segments seen."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.seen = at, []

    def segment(self, program, step, done, total):
        self.seen.append((step.current.name, done, total))
        if step.current.name == "gptq" and done == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def run(monkeypatch):
    """(run(folder, killed_at) -> Program, list that grows with every value whose readers are rounded)."""
    rounded: list[tuple[int, ...]] = []
    plain = ColumnRounding.round

    def counted(self, weight, *others):
        rounded.append(tuple(weight.shape))
        return plain(self, weight, *others)

    monkeypatch.setattr(ColumnRounding, "round", counted)
    batches = [inputs("llama", 4, 16, seed=seed) for seed in range(2)]
    program = mxcompile.trace(llama(2), batches[0])

    def start(folder, killed_at=None):
        return Pipeline.parse(TEXT).run(program, batches, [Killed(killed_at)], resume=folder)

    return start, rounded


def test_goes_on_to_the_same_bits(run, tmp_path):
    start, rounded = run
    wanted = start(None)
    assert len(rounded) == 8
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", killed_at=3)
    assert len(rounded) == 8 + 6  # two attentions and one MLP
    given = start(tmp_path / "run")
    assert len(rounded) == 8 + 6 + 2
    for name in wanted.parameter_names():
        assert torch.equal(given.tensor(name), wanted.tensor(name))
    for name, rounding in wanted.rounded.items():
        assert torch.equal(given.rounded[name].scales, rounding.scales)
        assert given.rounded[name].format == rounding.format
    assert given.ledger[1].numbers == wanted.ledger[1].numbers
    assert given.ledger[1].misses == wanted.ledger[1].misses


def test_reasons_are_kept(tmp_path):
    """The miss of a weight that was rounded to nearest is reported in the resumed run too."""
    x = torch.zeros(4, 64)
    model = build("mlp")
    torch.nn.init.zeros_(model.norm.bias)
    program = mxcompile.trace(model, x)
    first, again = (Pipeline.parse("gptq{format=mxint4}").run(program, x, resume=tmp_path / "run") for _ in range(2))
    assert first.ledger[0].misses == again.ledger[0].misses
    assert "rounded to nearest" in again.ledger[0].misses[0].reason


def test_counts_of_experts_are_kept(tmp_path):
    program = mxcompile.trace(build("mixtral"), inputs("mixtral"))
    first, again = (Pipeline.parse("gptq{format=mxint4}").run(program, resume=tmp_path / "run") for _ in range(2))
    counts = again.ledger[0].expert_tokens
    assert counts == first.ledger[0].expert_tokens
    assert {name.rpartition(".")[2] for name in counts} == {"gate_up_proj", "down_proj"}


def test_half_a_file_is_no_part(run, tmp_path):
    start, rounded = run
    start(tmp_path / "run")
    (last,) = sorted((tmp_path / "run").glob("02-gptq-0003.safetensors"))
    last.rename(last.with_suffix(".incomplete"))
    with pytest.warns(UserWarning, match=r"02-gptq-0003\.safetensors is damaged .*: it is computed again") as caught:
        start(tmp_path / "run")
    assert {warning.filename for warning in caught} == {__file__}
    assert len(rounded) == 8 + 2


@pytest.mark.parametrize("file", ["02-gptq-0003.safetensors", "02-gptq-0003.json", "run.txt"])
@pytest.mark.parametrize("damage", [b"", b"\xff{}[]"])
def test_a_damaged_file_is_said_and_computed_again(run, tmp_path, file, damage):
    start, rounded = run
    wanted = start(tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_bytes(damage + path.read_bytes()[len(damage) + 1 :] if damage else damage)
    with pytest.warns(UserWarning, match=f"{path.stem}.* is damaged"):
        given = start(tmp_path / "run")
    assert len(rounded) == (8 if file == "run.txt" else 8 + 2)  # parts say themselves which run they are of
    assert all(torch.equal(given.tensor(name), wanted.tensor(name)) for name in wanted.parameter_names())
    start(tmp_path / "run")  # without a warning


def test_killed_in_its_first_write_it_starts_again(run, tmp_path, monkeypatch):
    start, _ = run
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: os._exit(9))
        child = os.fork()
        if child == 0:
            start(tmp_path / "run")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list((tmp_path / "run").iterdir())
    start(tmp_path / "run")


@pytest.mark.parametrize("package", ["mxcompile", "torch"])
def test_another_version_is_another_run(run, tmp_path, monkeypatch, package):
    start, _ = run
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", killed_at=0)
    versions = installed_versions() | {package: "0.0"}
    monkeypatch.setattr("mxcompile.pipeline.resume.installed_versions", lambda: versions)
    with pytest.raises(InputError, match=rf"belongs to another run \({package} .*, not 0\.0\): choose another folder"):
        start(tmp_path / "run")


def test_a_full_disk_keeps_what_is_finished(run, tmp_path, monkeypatch):
    start, rounded = run

    def full_at_the_last(tensors, path):
        if len(rounded) == 8:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr("mxcompile.pipeline.resume.save_file", full_at_the_last)
        with pytest.raises(InputError, match=r"resume folder .* cannot be written .*No space left.* are kept"):
            start(tmp_path / "run")
    start(tmp_path / "run")
    assert len(rounded) == 8 + 2


def test_a_place_that_cannot_be_written_is_known_before_the_model_is_traced(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be written .*it is a file, not a folder"):
        mxcompile.quantize_and_compile(nn.Identity(), None, resume=tmp_path / "file", recipe="w4a8-mxint-quick")


@pytest.mark.parametrize("other", ["selection", "pipeline", "model", "calibration"])
def test_a_folder_belongs_to_one_run(other, tmp_path):
    x = inputs("llama", seed=5 if other == "calibration" else 0)
    text = "gptq{format=mxint4}"
    Pipeline.parse(text).run(mxcompile.trace(llama(1), inputs("llama")), inputs("llama"), resume=tmp_path / "run")
    exclude = ("*.down_proj",) if other == "selection" else ()
    program = mxcompile.trace(llama(2 if other == "model" else 1), inputs("llama"), exclude=exclude)
    with pytest.raises(InputError, match="belongs to another run"):
        Pipeline.parse("gptq{format=mxint6}" if other == "pipeline" else text).run(program, x, resume=tmp_path / "run")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        Pipeline.parse("gptq{format=mxint4}").run(mxcompile.trace(build("mlp"), inputs("mlp")), resume=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_segments_are_reported(run):
    watcher = Killed()
    program = mxcompile.trace(llama(2), inputs("llama"))
    Pipeline.parse("awq-fold{weight=mxint4} | gptq{format=mxint4}").run(program, inputs("llama"), [watcher])
    assert watcher.seen == [(name, done, 4) for name in ("awq-fold", "gptq") for done in range(4)]


FORMATS = "weight=mxint4,activation=mxint8"
EVERY_PASS = {
    "smooth-quant": "smooth-quant | round-weights{format=mxint4,weighted=true}",
    "search": f"smooth-quant{{alpha=none,{FORMATS},objective=block,through_linears=true}}",
    "awq-fold": f"awq-fold{{{FORMATS},through_linears=true}}",
    "rotate": "rotate{weight=mxfp4,activation=mxfp4}",
    "tune-vectors": "round-weights{format=mxint4} | tune-vectors{steps=8,rate=1e-4}",
    "learn-rounding": "learn-rounding{format=mxint4,start=nearest,steps=2}",
    "distill": "round-weights{format=mxint4} | distill{train=weights,steps=4,snapshots=2}",
    "lower-mx": f"lower-mx{{{FORMATS}}}",
    "gptq": f"awq-fold{{{FORMATS}}} | gptq{{format=mxint4,activation=mxint8}} | lower-mx{{{FORMATS}}}",
}


class KilledAfter(KeyboardInterrupt):
    """The run was killed after it had saved so many parts."""


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("text", EVERY_PASS.values(), ids=list(EVERY_PASS))
def test_every_pass_goes_on_to_the_same_bits(tmp_path, monkeypatch, text, kind):
    """Killed after each part in turn: what it had saved is not computed again, and the result is the same."""
    batches = [inputs(kind, 2, 16, seed=seed) for seed in range(3)]
    program = mxcompile.trace(llama(2) if kind == "llama" else build(kind), batches[0])
    expected = Pipeline.parse(text).run(program, batches)
    plain, saved, loaded = ResumeFolder.save, [], []

    def save(folder, part, tensors, notes):
        plain(folder, part, tensors, notes)
        saved.append(f"{folder.current_pass}-{part}")
        if len(saved) in stops:
            raise KilledAfter

    def load(folder, part):
        found = plain_load(folder, part)
        loaded.append(found is not None)
        return found

    plain_load = ResumeFolder.load
    monkeypatch.setattr(ResumeFolder, "save", save)
    monkeypatch.setattr(ResumeFolder, "load", load)
    stops = {1, 2, 4, 15, 16}  # 15: in the second pass of tune-vectors
    kills = 0
    while True:
        loaded.clear()
        try:
            result = Pipeline.parse(text).run(program, batches, resume=tmp_path / "run")
        except KilledAfter:
            kills += 1
            continue
        break
    assert kills >= 1
    assert any(loaded)
    assert len(saved) == len(set(saved))
    for name in expected.parameter_names():
        assert torch.equal(result.tensor(name), expected.tensor(name)), name
    assert [record.numbers for record in result.ledger] == [record.numbers for record in expected.ledger]
    assert [record.misses for record in result.ledger] == [record.misses for record in expected.ledger]
    assert [record.curves for record in result.ledger] == [record.curves for record in expected.ledger]
    again = Pipeline.parse(text).run(program, batches, resume=tmp_path / "run")
    assert [record.numbers for record in again.ledger] == [record.numbers for record in expected.ledger]
    assert all(torch.equal(again.tensor(name), expected.tensor(name)) for name in expected.parameter_names())
    for name, importance in expected.importance.items():
        assert torch.equal(again.importance[name], importance)
