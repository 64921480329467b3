"""Mixtures of experts in compressed-tensors checkpoints: experts one by one, under their published names."""

import json

import pytest
import torch
from interop import assert_same_values, edit_config
from models import inputs
from safetensors.torch import load_file, save_file

import mxcompile
from mxcompile.errors import CheckpointError
from mxcompile.tensor.weight import MXWeight

pytest.importorskip("compressed_tensors", reason="install the test extra")

FORMAT = "compressed-tensors"
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
EXPERTS = "model.layers.0.mlp.experts"


def build(name: str) -> torch.nn.Module:
    import transformers as t

    kinds = {
        "qwen3": (
            t.Qwen3MoeForCausalLM,
            t.Qwen3MoeConfig,
            {"num_experts": 3, "moe_intermediate_size": 32, "head_dim": 16},
        ),
        "mixtral": (t.MixtralForCausalLM, t.MixtralConfig, {"num_local_experts": 3, "intermediate_size": 32}),
        "olmoe": (t.OlmoeForCausalLM, t.OlmoeConfig, {"num_experts": 3, "intermediate_size": 32}),
    }
    kind, config, own = kinds[name]
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = kind(config(**SIZES, **own, **tokens)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16) * (4 if parameter.dim() > 1 else 1)
    return model


def quantized(name: str = "qwen3", recipe: str = "lower-mx{weight=mxfp4,activation=none}") -> torch.nn.Module:
    return mxcompile.quantize_and_compile(build(name), inputs("llama"), recipe=recipe, compile=False)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("qwen3", "model.layers.0.mlp.experts.2.gate_proj"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w1"),
        ("olmoe", "model.layers.0.mlp.experts.2.gate_proj"),
    ],
)
def test_written_one_by_one_and_read_as_one(name, expert, tmp_path):
    model = quantized(name)
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, MXWeight)
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    rows, scales = tensors[f"{expert}.weight_packed"], tensors[f"{expert}.weight_scale"]
    assert (rows.shape, rows.dtype, scales.shape) == ((32, 32), torch.uint8, (32, 2))
    assert not any("gate_up_proj" in name for name in tensors)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignored) == {"lm_head", expert.partition(".experts")[0] + ".gate"}
    loaded = mxcompile.load(tmp_path / "out")
    assert_same_values(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("llama")).logits, model(**inputs("llama")).logits)


@pytest.mark.parametrize("weight", ["mxfp4", "mxfp8_e4m3"])
def test_their_own_package_decodes_each_expert_to_our_values(weight, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = quantized(recipe=f"lower-mx{{weight={weight},activation=none}}")
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    content = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(content).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    experts = model.model.layers[0].mlp.experts
    joined, down = experts.gate_up_proj.dequantize(), experts.down_proj.dequantize()
    for n in range(3):
        for leaf, expected in (("gate_proj", joined[n, :32]), ("up_proj", joined[n, 32:]), ("down_proj", down[n])):
            path = f"{EXPERTS}.{n}.{leaf}."
            stored = {name.removeprefix(path): value for name, value in tensors.items() if name.startswith(path)}
            assert torch.equal(compressor.decompress(stored, scheme)["weight"].bfloat16(), expected), path


def test_float_experts_are_stored_one_by_one_too(tmp_path):
    model = mxcompile.quantize_and_compile(
        build("qwen3"),
        inputs("llama"),
        recipe="lower-mx{weight=mxfp4,activation=none}",
        compile=False,
        exclude=["*.mlp.*", "lm_head*"],
        allow_partial=True,
    )
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    assert f"{EXPERTS}.0.up_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert f"{EXPERTS}.2.down_proj" in ignored
    assert_same_values(mxcompile.load(tmp_path / "out"), model)


def test_read_into_a_model_of_the_caller_s(tmp_path):
    model = quantized()
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.model.rotary_emb = model.model.rotary_emb
    assert_same_values(mxcompile.load(tmp_path / "out", model=empty), model)


def test_our_own_checkpoint_is_converted(tmp_path):
    """Its parameters have other names than those of the files it was loaded from."""
    model = quantized("mixtral")
    model.save_pretrained(tmp_path / "own")
    mxcompile.save(mxcompile.load(tmp_path / "own"), tmp_path / "out", format=FORMAT)
    assert_same_values(mxcompile.load(tmp_path / "out"), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: [t.pop(name) for name in list(t) if "experts.1.up_proj" in name],
            r"hold .*experts.1.up_proj.weight",
        ),
        (
            lambda t: t.update({f"{EXPERTS}.1.up_proj.weight_scale": torch.zeros(31, 2, dtype=torch.uint8)}),
            r"do not form a weight",
        ),
        (
            lambda t: [
                t.pop(f"{EXPERTS}.1.up_proj.weight_packed"),
                t.pop(f"{EXPERTS}.1.up_proj.weight_scale"),
                t.update({f"{EXPERTS}.1.up_proj.weight": torch.zeros(32, 64, dtype=torch.bfloat16)}),
            ],
            r"experts.1.up_proj.weight is \[32, 64\] \(torch.bfloat16, Tensor\), which does not fit",
        ),
    ],
)
def test_experts_that_do_not_fit_together(change, message, tmp_path):
    mxcompile.save(quantized(), tmp_path / "out", format=FORMAT)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        mxcompile.load(tmp_path / "out")


def test_a_number_of_experts_that_the_file_does_not_hold(tmp_path):
    mxcompile.save(quantized(), tmp_path / "out", format=FORMAT)
    edit_config(tmp_path / "out", lambda content: content.update(num_experts=10**9, num_local_experts=10**9))
    with pytest.raises(CheckpointError, match=r"gate.weight has shape \[3, 64\], in a Qwen3MoeForCausalLM of"):
        mxcompile.load(tmp_path / "out")
