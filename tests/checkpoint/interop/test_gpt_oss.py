"""gpt-oss checkpoints: MXFP4 experts, contracted along their second dimension, decoded as transformers does."""

import json

import numpy as np
import pytest
import torch
from interop import assert_same_values, edit_config
from models import inputs
from safetensors.torch import load_file, save_file

import mxcompile
from mxcompile.errors import CheckpointError
from mxcompile.tensor.weight import MXWeight

EXPERTS = "model.layers.0.mlp.experts."


@pytest.fixture
def folder(tmp_path):
    """A random model whose experts are bytes."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_experts_per_tok=2, pad_token_id=0)).bfloat16()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for name, (out, size) in {"gate_up_proj": (192, 64), "down_proj": (64, 96)}.items():
        del tensors[EXPERTS + name]
        tensors[f"{EXPERTS}{name}_blocks"] = torch.randint(256, (4, out, size // 32, 16), dtype=torch.uint8)
        tensors[f"{EXPERTS}{name}_scales"] = torch.randint(115, 124, (4, out, size // 32), dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    edit_config(tmp_path / "model", lambda c: c.update(quantization_config={"quant_method": "mxfp4"}))
    return tmp_path / "model"


def test_experts_are_decoded_as_by_transformers(folder):
    from transformers import AutoModelForCausalLM, Mxfp4Config
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    loaded = mxcompile.load(folder)
    stored = load_file(folder / "model.safetensors")
    experts = loaded.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)
        assert isinstance(weight, MXWeight)
        wanted = convert_moe_packed_tensors(stored[f"{EXPERTS}{name}_blocks"], stored[f"{EXPERTS}{name}_scales"])
        assert torch.equal(weight.dequantize(), wanted)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    for model in (loaded, theirs):
        model.set_experts_implementation("eager")  # ours rounds less often
    with torch.no_grad():
        given, wanted = loaded(**inputs("llama")).logits, theirs(**inputs("llama")).logits
    assert torch.equal(given, wanted)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_as_the_dequantized_model_of_transformers(folder, cache):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True)).float()
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    expected = theirs.generate(**inputs("llama"), **options)
    loaded = mxcompile.load(folder).float()  # in bfloat16 the two best tokens may be equally likely
    assert torch.equal(loaded.generate(**inputs("llama"), **options), expected)
    assert isinstance(loaded.model.layers[0].mlp.experts.down_proj, MXWeight)


@pytest.mark.parametrize("format", [None, "compressed-tensors"])
def test_converted_by_the_command(folder, format, tmp_path):
    from typer.testing import CliRunner

    from mxcompile.cli.app import app

    arguments = ["convert", str(folder), str(tmp_path / "out"), *(["--format", format] if format else [])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    loaded, again = mxcompile.load(folder), mxcompile.load(tmp_path / "out")
    assert_same_values(again, loaded)
    with torch.no_grad():
        assert torch.equal(again(**inputs("llama")).logits, loaded(**inputs("llama")).logits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("mxcompile" if format is None else format)


def test_a_gguf_file_has_the_bytes_of_the_checkpoint(folder, tmp_path):
    """Their blocks hold neighbours in a byte, GGUF's the halves of a block; scales and codes are the same."""
    gguf = pytest.importorskip("gguf", reason="install the test extra")
    loaded = mxcompile.load(folder)
    with pytest.warns(UserWarning, match="token ids only"):
        mxcompile.save(loaded, tmp_path / "model.gguf")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    stored = load_file(folder / "model.safetensors")
    blocks, scales = stored[f"{EXPERTS}down_proj_blocks"], stored[f"{EXPERTS}down_proj_scales"]
    theirs = torch.from_numpy(np.array(found["blk.0.ffn_down_exps.weight"])).view(4, 64, 3, 17)
    assert torch.equal(theirs[..., 0], scales)
    codes = torch.stack([blocks & 0xF, blocks >> 4], -1).flatten(-2)
    assert torch.equal(torch.cat([theirs[..., 1:] & 0xF, theirs[..., 1:] >> 4], -1), codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERTS}down_proj_scales"), r"down_proj has no scales, or its elements \[4, 64, 3, 16\]"),
        (lambda t: t.pop(f"{EXPERTS}down_proj_blocks"), r"holds .*down_proj_scales, which a GptOssForCausalLM"),
        (lambda t: t.update({f"{EXPERTS}down_proj_blocks": torch.zeros(4, 64, 3, 8).byte()}), r"are not MXFP4 blocks"),
        (lambda t: t.update({f"{EXPERTS}down_proj_blocks": torch.zeros(4, 64, 2, 16).byte()}), r"do not form a weight"),
        (lambda t: t.update({f"{EXPERTS}down_proj_scales": torch.zeros(4, 64, 3).short()}), r"do not form a weight"),
        (lambda t: [t.pop(name) for name in list(t) if "_blocks" in name], r"but holds no MXFP4 blocks"),
    ],
)
def test_tensors_that_cannot_be(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        mxcompile.load(folder)


def test_other_models_of_that_method(folder):
    edit_config(folder, lambda c: c.update(model_type="llama"))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(CheckpointError, match=r"holds a llama quantized by 'mxfp4': of these mxcompile reads gpt_oss"):
        mxcompile.load(folder)
