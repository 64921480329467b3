"""`StreamedSave`: tensors kept one by one, a checkpoint like that of `save`, and what a killed run leaves."""

import copy
import errno
import json
from pathlib import Path

import pytest
import torch
from interop import lowered
from torch import nn

import mxcompile
from mxcompile.checkpoint import shards
from mxcompile.checkpoint.streamed_save import STAGE, StreamedSave
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import named_tensors, set_tensors
from mxcompile.tensor.weight import MXWeight

RECIPES = {"llama": "awq-fold{weight=mxfp4} | lower-mx{weight=mxfp4}", "gpt2": "lower-mx{weight=mxint4}"}


def without_values(module: nn.Module) -> nn.Module:
    """A copy with every tensor on the meta device; tied ones stay one, MX weights keep their layout."""
    shell = copy.deepcopy(module)
    empty = {id(value): empty_tensor(value) for value in named_tensors(shell).values()}
    set_tensors(shell, [(name, empty[id(value)]) for name, value in named_tensors(shell).items()])
    return shell


def empty_tensor(value: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, MXWeight):
        return torch.empty_like(value, device="meta")
    parts = [torch.empty_like(part, device="meta") for part in value.parts]
    return MXWeight(*parts[:2], value.layout_, value.dtype, *parts[2:])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def add_all(saving: StreamedSave, module: nn.Module, parts: int = 3) -> None:
    tensors = list(named_tensors(module).items())
    for part in range(parts):
        saving.add(f"part {part}", dict(tensors[part::parts]))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", ["5GB", 20_000])
def test_the_checkpoint_is_that_of_save(tmp_path, name, size):
    module = lowered(RECIPES[name], name)
    mxcompile.save(module, tmp_path / "saved", max_shard_size=size)
    with StreamedSave(tmp_path / "streamed", "key", max_shard_size=size) as saving:
        add_all(saving, module)
        saving.commit(without_values(module))
    assert files(tmp_path / "streamed") == files(tmp_path / "saved")
    assert not (tmp_path / "streamed" / STAGE).exists()


def test_what_was_added_is_read_back_mapped(tmp_path):
    module = lowered(RECIPES["llama"])
    with StreamedSave(tmp_path / "out", "key") as saving:
        add_all(saving, module)
        for name, value in named_tensors(module).items():
            back = saving.read(name)
            assert type(back) is (MXWeight if isinstance(value, MXWeight) else torch.Tensor)
            parts = zip(back.parts, value.parts, strict=True) if isinstance(value, MXWeight) else [(back, value)]
            assert all(torch.equal(*pair) for pair in parts), name
        with pytest.raises(KeyError):
            saving.read("nothing")


def test_a_later_run_finds_what_is_finished(tmp_path):
    module = lowered(RECIPES["llama"])
    with StreamedSave(tmp_path / "out", "key") as saving:
        assert not saving.resumed
        add_all(saving, module)
    with StreamedSave(tmp_path / "out", "key") as saving:
        assert saving.resumed
        assert set(saving.finished) == {"part 0", "part 1", "part 2"}
        saving.commit(without_values(module))
    mxcompile.save(module, tmp_path / "saved")
    assert files(tmp_path / "out") == files(tmp_path / "saved")


def test_another_key_begins_anew(tmp_path):
    with StreamedSave(tmp_path / "out", "key") as saving:
        add_all(saving, lowered(RECIPES["llama"]))
    with StreamedSave(tmp_path / "out", "other") as saving:
        assert not saving.resumed
        assert not saving.finished
        assert not list((tmp_path / "out" / STAGE).glob("*.safetensors"))


def test_a_part_that_is_added_again_replaces_the_earlier_one(tmp_path):
    with StreamedSave(tmp_path / "out", "key") as saving:
        saving.add("part", {"a": torch.zeros(3)})
        saving.add("other", {"b": torch.zeros(3)})
        saving.add("part", {"a": torch.ones(3)})
        assert torch.equal(saving.read("a"), torch.ones(3))
    with StreamedSave(tmp_path / "out", "key") as saving:
        assert torch.equal(saving.read("a"), torch.ones(3))
        assert len(list((tmp_path / "out" / STAGE).glob("part-*.safetensors"))) == 2


def test_a_cut_file_is_not_finished(tmp_path):
    with StreamedSave(tmp_path / "out", "key") as saving:
        saving.add("one", {"a": torch.zeros(3)})
        saving.add("two", {"b": torch.zeros(3)})
    path = tmp_path / "out" / STAGE / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with StreamedSave(tmp_path / "out", "key") as saving:
        assert set(saving.finished) == {"one"}


def test_finished_weight_files_are_not_written_again(tmp_path, monkeypatch):
    """The disk is full at the third file: the error names it; the next run writes the others only."""
    module = lowered(RECIPES["llama"])
    mxcompile.save(module, tmp_path / "saved", max_shard_size=20_000)
    written: list[str] = []
    write = shards.write

    def failing(path, tensors):
        if path.name == "shard-2.safetensors" and full:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.name)
        return write(path, tensors)

    monkeypatch.setattr(shards, "write", failing)
    full = True
    with StreamedSave(tmp_path / "out", "key", max_shard_size=20_000) as saving:
        add_all(saving, module)
        with pytest.raises(CheckpointError, match=r"shard-2\.safetensors cannot be written \(No space left.*goes on"):
            saving.commit(without_values(module))
    assert not (tmp_path / "out/config.json").exists()
    full, written[:] = False, []
    with StreamedSave(tmp_path / "out", "key", max_shard_size=20_000) as saving:
        saving.commit(without_values(module))
    assert written[0] == "shard-2.safetensors"
    assert not {"shard-0.safetensors", "shard-1.safetensors"} & set(written)
    assert files(tmp_path / "out") == files(tmp_path / "saved")


def test_values_of_another_shape_are_refused(tmp_path):
    module = lowered(RECIPES["llama"])
    with StreamedSave(tmp_path / "out", "key") as saving:
        add_all(saving, module)
        name = next(name for name, value in named_tensors(module).items() if not isinstance(value, MXWeight))
        saving.add("wrong", {name: torch.zeros(3)})
        with pytest.raises(CheckpointError, match=rf"{name} should be .*, but is \[3\]"):
            saving.commit(without_values(module))


def test_what_was_not_added_is_named(tmp_path):
    with StreamedSave(tmp_path / "out", "key") as saving, pytest.raises(CheckpointError, match="has no values yet"):
        saving.commit(without_values(lowered(RECIPES["llama"])))


def test_another_models_folder_and_a_second_process_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="holds files of another model"), StreamedSave(tmp_path, "key"):
        pass
    second = StreamedSave(tmp_path / "out", "key")
    with StreamedSave(tmp_path / "out", "key"), pytest.raises(CheckpointError, match="another process writes to it"):
        second.__enter__()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("size", ["5GB", 20_000])
def test_compressed_tensors_are_those_of_save(tmp_path, name, size):
    module = lowered("lower-mx{weight=mxfp4}", name)
    mxcompile.save(module, tmp_path / "saved", max_shard_size=size, format="compressed-tensors")
    kept = StreamedSave(tmp_path / "streamed", "key", max_shard_size=size, format="compressed-tensors")
    with kept as saving:
        add_all(saving, module)
        saving.commit(without_values(module))
    assert files(tmp_path / "streamed") == files(tmp_path / "saved")
    assert not kept.stage.exists()


def test_a_gguf_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written tensor by tensor: write a folder, then"):
        StreamedSave(tmp_path / "out.gguf", "key")
