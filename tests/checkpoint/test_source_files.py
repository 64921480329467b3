"""`SourceFiles`: the model that `from_pretrained` returns, without values, and its tensors, read one by one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file
from torch import nn

from mxcompile.checkpoint.source_files import SourceFiles
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import named_tensors

NAMES = ("llama", "gpt2", "gpt_neox", "opt", "bert", "t5", "qwen3_moe", "gpt_oss", "mixtral", "whisper")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A llama in several files."""
    path = tmp_path_factory.mktemp("llama")
    build("llama").to(torch.bfloat16).save_pretrained(path, max_shard_size="50KB")
    return path


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def shared(module: nn.Module) -> dict[str, str]:
    """Each name, and the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in named_tensors(module).items()}


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_as_from_pretrained_has_it(name, tmp_path):
    built = build(name).to(torch.bfloat16)
    built.save_pretrained(tmp_path)
    loaded, source = type(built).from_pretrained(tmp_path), SourceFiles(tmp_path)
    own, mine = named_tensors(loaded), named_tensors(source.model)
    assert own.keys() == mine.keys()
    assert shared(source.model) == shared(loaded)
    for key, value in own.items():
        tensor = source.tensor(key) if key in source.names else mine[key]
        assert (tensor.dtype, mine[key].dtype) == (value.dtype, value.dtype), key
        assert torch.equal(tensor, value), key
    assert source.model.config.to_json_string() == loaded.config.to_json_string()
    assert type(source.model) is type(loaded)
    assert not source.model.training
    assert not source.notes
    assert not source.unused


def test_experts_are_joined_from_their_parts(tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    source = SourceFiles(tmp_path)
    name = next(name for name in source.names if name.endswith("experts.gate_up_proj"))
    parts = source.parts(name)
    assert len(parts) == 2 * source.shape(name)[0]
    assert parts[0] in load_file(tmp_path / "model.safetensors")


def test_tied_names_are_known_and_read(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    source = SourceFiles(tmp_path)
    assert source.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert torch.equal(source.tensor("lm_head.weight"), source.tensor("transformer.wte.weight"))


def test_what_a_config_calls_tied_but_differs_stays_apart(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    save_file(stored | {"lm_head.weight": stored["transformer.wte.weight"] + 1}, path, {"format": "pt"})
    source = SourceFiles(tmp_path)
    assert not source.aliases
    assert not torch.equal(source.tensor("lm_head.weight"), source.tensor("transformer.wte.weight"))


def test_pickled_weights_are_mapped_too(tmp_path):
    model = build("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    source = SourceFiles(tmp_path)
    own = named_tensors(model)
    assert all(torch.equal(source.tensor(name), own[name]) for name in source.names)


def test_a_folder_without_a_known_class_has_its_stored_names(tmp_path):
    save_file({"a.weight": torch.ones(4, 4), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    source = SourceFiles(tmp_path)
    assert source.model is None
    assert source.names == ("a.weight", "b")
    assert (source.shape("b"), source.dtype("b")) == (torch.Size([3]), torch.float32)
    assert torch.equal(source.tensor("a.weight"), torch.ones(4, 4))


def test_unused_tensors_are_listed(copied):
    save_file({"extra.weight": torch.ones(2)}, copied / "extra.safetensors")
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.weight"] = "extra.safetensors"
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert SourceFiles(copied).unused == ("extra.weight",)


def test_damaged_files_are_named(copied):
    first = sorted(copied.glob("*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=rf"{first.name} cannot be read .*copy the checkpoint again"):
        SourceFiles(copied)
    first.unlink()
    with pytest.raises(CheckpointError, match=rf"{first.name} is missing"):
        SourceFiles(copied)
    first.write_bytes(whole)
    source = SourceFiles(copied)
    first.write_bytes(whole[:-10])  # while it is being used
    name = next(name for name in source.names if source.stored[source.parts(name)[0]].file == first)
    with pytest.raises(CheckpointError, match=rf"{first.name} cannot be read"):
        source.tensor(name)


def test_what_does_not_fit_the_config_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"does not hold model\.layers\.2\.self_attn\.q_proj\.weight and 8 more"):
        SourceFiles(copied)
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(CheckpointError, match=r"safetensors: model\.layers\.0\.mlp\.\w+\.weight would have shape"):
        SourceFiles(copied)


def test_a_folder_without_weights_and_an_old_archive_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        SourceFiles(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be mapped into memory"):
        SourceFiles(tmp_path)
