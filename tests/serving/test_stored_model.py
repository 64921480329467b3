"""What an engine learns from a checkpoint's config.json and index: layouts, names, multipliers, damage."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from served import Spec, mx_weight, quantized, tie_head, tiny_llama
from torch import nn

import mxcompile
from mxcompile.errors import CheckpointError
from mxcompile.serving.stored_model import StoredModel

LAYER = "model.layers.0.self_attn"
QKV = [f"{LAYER}.{part}_proj" for part in "qkv"]
SMALL = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """q, k, v multiplied by the same values in both layers, o_proj rotated, down_proj MXFP4, the rest float."""
    shared = Spec(multiplier=1)
    specs = {f"{part}_proj": shared for part in "qkv"} | {"o_proj": Spec(rotation=32), "down_proj": Spec("mxfp4", None)}
    folder = tmp_path_factory.mktemp("stored") / "model"
    mxcompile.save(quantized(tiny_llama(**SMALL), specs), folder)
    return folder


def renamed(stored: StoredModel, name: str) -> str | None:
    """A tensor's name as vLLM's mapper makes it of the patterns."""
    for pattern, new in stored.patterns().items():
        if pattern.search(name):
            if new is None:
                return None
            name = pattern.sub(new, name)
    return name


def test_a_fused_layer_has_the_layout_of_its_parts(folder):
    stored = StoredModel(folder)
    layout = stored.layout(f"{LAYER}.qkv_proj", QKV)
    assert layout is not None
    assert (layout.format, layout.activation, layout.rotation) == ("mxint4", "mxint8", None)
    assert stored.layout(f"{LAYER}.o_proj", [f"{LAYER}.o_proj"]).rotation == 32
    assert stored.layout("model.layers.0.mlp.gate_up_proj", ["model.layers.0.mlp.gate_proj"]) is None


def test_parts_that_differ_are_refused_with_the_layers_name(folder):
    parts = [f"{LAYER}.q_proj", f"{LAYER}.o_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    with pytest.raises(CheckpointError) as caught:
        StoredModel(folder).layout(f"{LAYER}.fused", parts)
    message = str(caught.value)
    assert message.startswith(f"{LAYER}.fused cannot be served")
    assert "q_proj: mxint4, input mxint8 by floor, multiplied by" in message
    assert "o_proj: mxint4, input mxint8 by floor, rotated by 32; down_proj: mxfp4; up_proj: float" in message
    assert message.endswith("give all of them the same format, or leave all of them out")


def test_the_names_of_parameters_have_no_dots_and_temporary_buffers_are_skipped(folder):
    stored = StoredModel(folder)
    assert renamed(stored, f"{LAYER}.q_proj.weight.scales") == f"{LAYER}.q_proj.weight_scales"
    assert renamed(stored, f"{LAYER}.q_proj.weight.multiplier") == f"{LAYER}.q_proj.weight_multiplier"
    assert renamed(stored, "model.rotary_emb.original_inv_freq") is None
    for name in (f"{LAYER}.q_proj.weight", f"{LAYER}.q_proj.bias", "model.norm.weight", "x.rotary_emb.inv_freq"):
        assert renamed(stored, name) == name
    once = f"{LAYER}.q_proj.weight_scales"
    assert renamed(stored, once) == once  # vLLM applies the patterns at two levels of a model


def test_layers_take_the_names_of_the_engine(folder):
    stored = StoredModel(folder)
    stored.rename(lambda name: name.replace("model.", "language_model.model.", 1) if "down" not in name else None)
    assert stored.layout_of(f"language_model.{LAYER}.q_proj") is not None
    assert stored.layout_of(f"{LAYER}.q_proj") is None
    assert stored.layout_of("model.layers.0.mlp.down_proj") is not None


def test_a_shared_multiplier_is_read_from_the_layer_that_stores_it(folder):
    stored = StoredModel(folder)
    name = "model.layers.1.self_attn.v_proj"
    assert stored.checkpoint.names.aliases[f"{name}.weight.multiplier"] == f"{LAYER}.q_proj.weight.multiplier"
    expected = mx_weight(torch.ones(1, 64, dtype=torch.bfloat16), Spec(multiplier=1)).multiplier
    assert torch.equal(stored.multiplier(name), expected)


def test_the_tied_head_is_found(folder, tmp_path):
    assert StoredModel(folder).tied() is None
    model = tie_head(quantized(tiny_llama(tie_word_embeddings=True, **SMALL), {}), Spec("mxint8", "mxint8"))
    mxcompile.save(model, tmp_path / "model")
    stored = StoredModel(tmp_path / "model")
    assert stored.tied() == ("model.embed_tokens", "lm_head")
    assert stored.layout_of("lm_head").activation == "mxint8"


def test_two_tied_heads_are_refused_and_shared_layers_are_no_heads(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in "abcd"}).to(torch.bfloat16)
    model["layers"] = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(2)]).to(torch.bfloat16)
    quantized(model, {"a": Spec(), "b": Spec(), "layers.0": Spec()})
    model["layers"][1].weight = model["layers"][0].weight
    mxcompile.save(model, tmp_path / "no head")
    assert StoredModel(tmp_path / "no head").tied() is None
    model["c"].weight, model["d"].weight = model["a"].weight, model["b"].weight
    mxcompile.save(model, tmp_path / "two")
    with pytest.raises(CheckpointError, match="c, d each share the weight of another layer"):
        StoredModel(tmp_path / "two").tied()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_changed_description_is_refused(file, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(path.read_text().replace("down_proj", "up_proj" if "index" in file else "down").replace("64", "65"))
    with pytest.raises(CheckpointError, match=rf"{file} has changed since it was saved"):
        StoredModel(tmp_path / "model")


def test_a_changed_byte_of_a_tensor_is_found(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (path,) = (tmp_path / "model").glob("*.safetensors")
    stored = StoredModel(tmp_path / "model")
    stored.check_tensors()
    assert stored.checked
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        StoredModel(tmp_path / "model").check_tensors()


def test_a_hub_id_is_read_from_the_cache(folder, tmp_path, monkeypatch):
    repo = tmp_path / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    stored = StoredModel("owner/tiny", "0" * 40)
    assert stored.layout_of(QKV[0]) is not None
    stored.check_tensors()
    with pytest.raises(CheckpointError, match="owner/other is not a folder here"):
        StoredModel("owner/other")


_FORK = """
import os, sys, torch
torch.set_num_threads(2)
from mxcompile.serving.stored_model import StoredModel
StoredModel(sys.argv[1])
assert torch.get_num_threads() == 2
child = os.fork()
if child == 0:
    torch.ones(1 << 22).add_(1)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_workers_forked_after_a_model_was_read_can_use_torchs_threads(tmp_path):
    """GNU's OpenMP, which torch for CUDA has, waits without end in a child whose parent has used threads."""
    folder = tmp_path / "model"
    mxcompile.save(quantized(tiny_llama(**SMALL | {"vocab_size": 65536}), {"q_proj": Spec()}), folder)
    subprocess.run([sys.executable, "-c", _FORK, folder], check=True, timeout=100)


def test_a_folder_that_mxcompile_did_not_save_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="holds a model that is not quantized"):
        StoredModel(tmp_path)
