"""quantize_checkpoint: from files to files, with the same bytes as a model in memory, and with far less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, inputs, llama
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import mxcompile
from mxcompile.deploy import deploy_in_files
from mxcompile.errors import CheckpointError, DeployError, InputError, MXCompileError
from mxcompile.pipeline.interfaces import Instrument
from mxcompile.tensor import mapped_tensors


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch):
    """Every tensor is kept in a file."""
    plain = mapped_tensors.MappedTensors.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs, smallest=1)

    monkeypatch.setattr(mapped_tensors.MappedTensors, "__init__", init)


@pytest.fixture
def source(tmp_path) -> Path:
    llama(2).save_pretrained(tmp_path / "source", max_shard_size="100KB")
    return tmp_path / "source"


def batches(kind: str = "llama") -> list[dict[str, torch.Tensor]]:
    return [inputs(kind, 2, 24, seed=seed) for seed in range(3)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


def in_memory(source: Path, out: Path, recipe: str, kind: str = "llama", auto: Any = AutoModelForCausalLM) -> None:
    model = auto.from_pretrained(source)
    data = batches(kind)
    mxcompile.save(
        mxcompile.quantize_and_compile(model, inputs(kind), recipe=recipe, calibration=data, compile=False), out
    )


def from_files(source: Path, out: Path, recipe: str, kind: str = "llama", **options: Any) -> None:
    limits = {"weights_in_memory": 1, "states_in_memory": 1}
    mxcompile.quantize_checkpoint(
        source, inputs(kind), out, recipe=recipe, calibration=batches(kind), **(limits | options)
    )


@pytest.mark.parametrize("recipe", ["w4a8-mxint", "w4a4-mxfp", "w4a16-mxfp-quick", "w8a8-mxint-quick"])
def test_the_same_bytes(source, tmp_path, recipe):
    in_memory(source, tmp_path / "expected", recipe)
    from_files(source, tmp_path / "out", recipe)
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out", "source"]


KINDS = ["mixtral", "gemma", "gpt2", "bert"]  # experts stored one by one, a tied head, transposed weights, no head


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_of_other_models(tmp_path, kind):
    auto = AutoModel if kind == "bert" else AutoModelForCausalLM
    build(kind).bfloat16().save_pretrained(tmp_path / "source")
    in_memory(tmp_path / "source", tmp_path / "expected", "w4a8-mxint", kind, auto)
    from_files(tmp_path / "source", tmp_path / "out", "w4a8-mxint", kind)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_the_result_loads(source, tmp_path):
    from_files(source, tmp_path / "out", "w8a8-mxint-quick")
    loaded = mxcompile.load(tmp_path / "out")
    assert loaded(**inputs("llama")).logits.isfinite().all()


class InMemory(Instrument):
    """The names of large tensors that do not lie in files, after each pass."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def after(self, program, step, record) -> None:
        del step, record
        held = program.mapped.holds
        self.names += [name for name in program.parameter_names() if not held(program.stored(name))]


def test_no_tensor_is_held_in_memory(source, tmp_path):
    watcher = InMemory()
    from_files(source, tmp_path / "out", "w4a8-mxint", instruments=[watcher])
    assert set(watcher.names) == {"model.rotary_emb.inv_freq"} or not watcher.names


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_source_is_named(source, tmp_path, damage):
    shard = sorted(source.glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        from_files(source, tmp_path / "out", "w8a8-mxint-quick")
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_class_is_refused(source, tmp_path):
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model of a class that transformers knows.* --model-free"):
        from_files(source, tmp_path / "out", "w8a8-mxint-quick")


def test_the_destination_is_checked_first(source, tmp_path):
    with pytest.raises(MXCompileError, match="holds"):
        from_files(source, source, "w8a8-mxint-quick")


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped_tensors.os, "write", full)
    with pytest.raises(InputError, match=r"scratch cannot hold .*No space left on device.*: make room there"):
        from_files(source, tmp_path / "out", "w8a8-mxint-quick", scratch=tmp_path / "scratch")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_deploy_in_files_needs_files():
    model = nn.Sequential(nn.Linear(32, 32))
    program = mxcompile.Pipeline.parse("lower-mx{weight=mxint8}").run(mxcompile.trace(model, torch.randn(2, 32)))
    with pytest.raises(DeployError, match="keep_in_files"):
        deploy_in_files(program, model)


def test_source_tensors_are_mapped_where_they_are(source, tmp_path):
    """Only what passes make is written to scratch files: a source tensor's bytes are those of its file."""
    from mxcompile.checkpoint.mapped_model import mapped_model
    from mxcompile.checkpoint.source_files import SourceFiles

    mapped = mapped_tensors.MappedTensors(tmp_path / "scratch", torch.device("cpu"))
    files_of = SourceFiles(source)
    model = mapped_model(files_of, mapped)
    assert not (tmp_path / "scratch").exists()
    place = files_of.place("model.layers.1.mlp.up_proj.weight")
    assert place is not None
    with safe_open(place[0], framework="pt") as file:
        expected = file.get_tensor("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(model.get_parameter("model.layers.1.mlp.up_proj.weight"), expected)
