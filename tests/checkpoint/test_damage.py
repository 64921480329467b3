"""Damaged or edited checkpoints are refused with a reason before anything of them is used."""

import json
import os
import re
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import build, inputs
from safetensors.torch import load_file, save_file

import mxcompile
from mxcompile.checkpoint import Checkpoint
from mxcompile.checkpoint.checked_json import sha256
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import named_tensors

CORRUPTED = 2000
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A quantized MLP in two files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = mxcompile.quantize_and_compile(build("mlp"), inputs("mlp"), recipe="w4a8-mxint-quick", compile=False)
    mxcompile.save(model, folder, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def refused(folder: Path, message: str, **options) -> None:
    model = build("mlp")
    before = named_tensors(model)
    with pytest.raises(CheckpointError, match=message):
        mxcompile.load(folder, model=model, **options)
    assert all(tensor is before[name] for name, tensor in named_tensors(model).items())
    assert model.up.weight.requires_grad


@st.composite
def damages(draw, files: dict[str, bytes]) -> tuple[str, bytes]:
    """A file of a checkpoint and what it holds instead: bits flipped, cut, added to, or bytes replaced."""
    name = draw(st.sampled_from(sorted(files)))
    data = bytearray(files[name])
    place = draw(st.integers(0, len(data) - 1))
    match draw(st.sampled_from(["flip", "cut", "grow", "replace", "swap"])):
        case "flip":
            data[place] ^= 1 << draw(st.integers(0, 7))
        case "cut":
            del data[place:]
        case "grow":
            data[place:place] = draw(st.binary(min_size=1, max_size=9))
        case "replace":
            new = draw(st.binary(min_size=1, max_size=9))
            data[place : place + len(new)] = new
        case _:
            other = draw(st.integers(0, len(data) - 1))
            data[place], data[other] = data[other], data[place]
    return name, bytes(data)


@pytest.mark.slow
def test_no_damaged_file_is_accepted(checkpoint, tmp_path):
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    folder, model = shutil.copytree(checkpoint, tmp_path / "copy"), build("mlp")
    tried = 0

    @settings(
        max_examples=CORRUPTED * 4 // 3,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(damages(files))
    def check(damage):
        nonlocal tried
        name, data = damage
        if data == files[name]:
            return
        tried += 1
        (folder / name).write_bytes(data)
        try:
            with pytest.raises(CheckpointError):
                mxcompile.load(folder, model=model)
        finally:
            (folder / name).write_bytes(files[name])

    check()
    assert tried >= CORRUPTED
    assert torch.equal(
        mxcompile.load(folder, model=model)(**inputs("mlp")),
        mxcompile.load(checkpoint, model=build("mlp"))(**inputs("mlp")),
    )


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_bits_of_the_json_files_are_not_flipped(folder, name):
    """Also where checksums are not compared nothing but a CheckpointError comes of it."""
    data, model = (folder / name).read_bytes(), build("mlp")
    for place in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            mxcompile.load(folder, model=model)
        with suppress(CheckpointError):
            Checkpoint(folder, verify=False).tensors()


def edit(folder: Path, change, *, in_config: bool = False) -> None:
    """Change the index (or the config), and make all checksums fit what it is then."""
    index = json.loads((folder / INDEX).read_text())
    config = json.loads((folder / "config.json").read_text())
    change(config if in_config else index)
    text = json.dumps(index)
    (folder / INDEX).write_text(text)
    config["quantization_config"] |= {"index_sha256": sha256(text.encode()), "sha256": "0" * 64}
    text = json.dumps(config)
    (folder / "config.json").write_text(text.replace("0" * 64, sha256(text.encode())))


def ours(index):
    return index["metadata"]["mxcompile"]


def test_an_edited_checkpoint_with_the_right_checksums_loads(folder):
    edit(folder, lambda config: config.update(note="mine"), in_config=True)
    mxcompile.load(folder, model=build("mlp"))
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("mine", "his"))
    refused(folder, r"config.json has changed since it was saved: restore it; .* verify=False and save again")
    mxcompile.load(folder, model=build("mlp"), verify=False)


SHARD = "model-00001-of-00002.safetensors"
OUTSIDE = [
    "../other.safetensors",
    "/etc/passwd.safetensors",
    "a/b.safetensors",
    "..\\x.safetensors",
    ".hidden.safetensors",
    "a\0.safetensors",
    "x.bin",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside_of_the_folder_are_not_opened(folder, name):
    def rename(index):
        ours(index)["shards"][name] = ours(index)["shards"].pop(SHARD)
        index["weight_map"] = {k: name if file == SHARD else file for k, file in index["weight_map"].items()}

    edit(folder, rename)
    refused(folder, "is not a valid name for a file of a checkpoint")


@pytest.mark.parametrize("name", ["../tokenizer.json", "/tokenizer.json", "a/../../tokenizer.json", "."])
def test_files_that_came_along_stay_inside(folder, name):
    edit(folder, lambda config: config["quantization_config"]["files"].update({name: "0"}), in_config=True)
    refused(folder, "is not a valid name for a file of a checkpoint")
    edit(folder, lambda config: config.update(transformers_weights="../" + INDEX), in_config=True)
    refused(folder, "is not a valid name for a file of a checkpoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: ours(index).update(schema=2), r"its schema is 2, this version of mxcompile reads schema 1"),
        (lambda index: ours(index)["weights"]["up.weight"].update(format="mxyz4"), r"unknown format 'mxyz4'"),
        (lambda index: ours(index)["weights"]["up.weight"].update(format="mxint4:8"), r"block size 8 is not one of"),
        (lambda index: ours(index)["weights"]["up.weight"].update(rule="round"), r"unknown scale rule 'round'"),
        (lambda index: ours(index)["weights"]["up.weight"].update(rule="7.25"), r"7.25 is a threshold of mxfp4"),
        (lambda index: ours(index)["weights"]["up.weight"].pop("rule"), r"is not a valid weight"),
        (lambda index: ours(index)["weights"]["up.weight"].update(size=-1), r"is not a valid weight"),
        (lambda index: ours(index)["weights"]["up.weight"].update(size=10**30), r"is not a valid weight"),
        (lambda index: ours(index)["weights"]["up.weight"].update(size=True), r"'size' is not of type int"),
        (lambda index: ours(index)["weights"]["up.weight"].update(dtype="int8"), r"is not a valid weight"),
        (
            lambda index: ours(index)["weights"]["up.weight"].update(rotation=3),
            r"3 is not a power of two .* 64",
        ),
        (
            lambda index: ours(index)["weights"]["up.weight"].update(rotation=128),
            r"128 is not a power of two",
        ),
        (
            lambda index: ours(index)["weights"]["up.weight"].update(aligned=True),
            r"only mxfp8_e4m3 activations are aligned: those of mxint8 cannot be",
        ),
        (lambda index: ours(index)["weights"]["up.weight"].update(aligned=1), r"'aligned' is not of type bool"),
        (
            lambda index: ours(index)["weights"]["up.weight"].update(zero=1),
            r"'zero': 1.* has entries that this version",
        ),
        (
            lambda index: ours(index)["weights"]["up.weight"].update(size=640),
            r"up.weight has scales \[128, 2\]: a row of 640",
        ),
        (lambda index: ours(index)["weights"]["up.weight"].update(format="mxint8"), r"up.weight has elements \[128, 2"),
        (
            lambda index: ours(index)["weights"]["up.weight"].update(multiplier="m"),
            r"weights and aliases are inconsistent",
        ),
        (lambda index: ours(index)["weights"].pop("up.weight"), r"only saved: up.weight.scales"),
        (lambda index: ours(index)["aliases"].update(x="y"), r"weights and aliases are inconsistent"),
        (lambda index: ours(index)["temporary"].append("x"), r"weights and aliases are inconsistent"),
        (lambda index: ours(index)["crc32"].pop("up.weight"), r"checksums, files and tensors are inconsistent"),
        (lambda index: ours(index)["shards"].pop(SHARD), r"checksums, files and tensors are inconsistent"),
        (lambda index: index["weight_map"].update({"up.weight": 3}), r"'up.weight' is not of type str"),
        (lambda index: index.pop("weight_map"), r"'weight_map' is missing"),
        (lambda index: index.update(metadata=[]), r"'metadata' is not of type dict"),
        (lambda index: ours(index)["weights"].update(x=[]), r"'x' is not of type dict"),
    ],
)
def test_an_index_that_cannot_be(folder, change, message):
    edit(folder, change)
    refused(folder, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config["quantization_config"].update(schema=2),
            r"saved with schema 2, .* reads 1: use the version",
        ),
        (
            lambda config: config["quantization_config"].update(quant_method="gptq"),
            r"quantized by 'gptq', not one that mxcompile.save wrote",
        ),
        (lambda config: config["quantization_config"].pop("module"), r"config.json is damaged: 'module' is missing"),
        (
            lambda config: config["quantization_config"].update(recipe=3),
            r"config.json is damaged: 'recipe' is not of type str",
        ),
        (
            lambda config: config["quantization_config"].update(versions={"torch": 2}),
            r"config.json is damaged: 'torch'",
        ),
        (
            lambda config: config.pop("transformers_weights"),
            r"config.json is damaged: 'transformers_weights' is missing",
        ),
        (
            lambda config: config["quantization_config"].update(module="Trainer"),
            r"holds a Trainer, `model` is a MLP",
        ),
    ],
)
def test_a_config_that_cannot_be(folder, change, message):
    edit(folder, change, in_config=True)
    refused(folder, message)


def test_a_class_is_looked_up_among_models_only(folder):
    for name in ("AutoConfig", "os.system", "__class__", "PreTrainedModel"):
        edit(folder, lambda config, name=name: config["quantization_config"].update(module=name), in_config=True)
        edit(folder, lambda config: config.update(model_type="llama"), in_config=True)
        with pytest.raises(CheckpointError, match=rf"holds a {name}, which is not a transformers model"):
            mxcompile.load(folder)


def test_other_folders(tmp_path):
    refused(tmp_path, r"holds no saved model: it has no config.json")
    refused(tmp_path / "nowhere", r"nowhere holds no saved model")
    build("llama").save_pretrained(tmp_path)
    refused(tmp_path, r"holds a model that is not quantized: mxcompile.load reads what mxcompile.save wrote")
    (tmp_path / "config.json").write_text("[" * 100_000)
    refused(tmp_path, r"config.json cannot be read as JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, r"config.json holds no JSON object")


def test_files_that_are_missing_or_of_another_size(folder):
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).unlink()
    refused(folder, rf"{SHARD} is missing: copy the checkpoint again", verify=False)
    (folder / SHARD).mkdir()
    refused(folder, rf"{SHARD} is missing")
    (folder / SHARD).rmdir()
    (folder / SHARD).write_bytes(data[:-1])
    refused(folder, rf"{SHARD} has {len(data) - 1} bytes, {len(data)} were written", verify=False)
    os.truncate(folder / SHARD, 0)
    refused(folder, rf"{SHARD} has 0 bytes")
    (folder / INDEX).unlink()
    refused(folder, rf"{INDEX} cannot be read as JSON \(No such file or directory\)")


def test_the_damaged_tensor_is_named(folder):
    checkpoint = Checkpoint(folder)
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 1
    (folder / SHARD).write_bytes(data)
    last = list(load_file(folder / SHARD))[-1]
    assert last in checkpoint.index.shards[SHARD].tensors
    refused(folder, rf"{SHARD} is damaged \([\w.]+ has changed since it was written\)")
    mxcompile.load(folder, model=build("mlp"), verify=False)


def test_a_safetensors_file_of_other_tensors(folder):
    """Sizes and checksums fit, the file does not."""
    tensors = load_file(folder / SHARD)
    name = next(iter(tensors))
    tensors["other" + name] = tensors.pop(name)
    save_file(tensors, folder / SHARD)
    data = (folder / SHARD).read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    edit(folder, lambda index: ours(index)["shards"][SHARD].update(bytes=len(data), header=zlib.crc32(header)))
    refused(folder, rf"{re.escape(SHARD)} does not hold the tensors that the index lists")
    junk = (10**15).to_bytes(8, "little") + data[8:]
    (folder / SHARD).write_bytes(junk)
    edit(folder, lambda index: ours(index)["shards"][SHARD].update(header=zlib.crc32(junk)))
    refused(folder, rf"{re.escape(SHARD)} cannot be read")


def test_transformers_loads_no_damaged_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    model = mxcompile.quantize_and_compile(build("llama"), inputs("llama"), recipe="w4a8-mxint-quick", compile=False)
    model.save_pretrained(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for load in (AutoModelForCausalLM.from_pretrained, mxcompile.load):
        with pytest.raises(CheckpointError, match="is damaged"):
            load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match="has changed since it was saved"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_transformers_cannot_build_is_explained(tmp_path):
    model = mxcompile.quantize_and_compile(build("llama"), inputs("llama"), recipe="w4a8-mxint-quick", compile=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_attention_heads": "four"}
    config["quantization_config"]["sha256"] = "0" * 64
    text = json.dumps(config)
    (tmp_path / "config.json").write_text(text.replace("0" * 64, sha256(text.encode())))
    with pytest.raises(CheckpointError, match=r"transformers [\d.]+ cannot build the LlamaForCausalLM in"):
        mxcompile.load(tmp_path)
