"""Mixtures of experts in compressed-tensors checkpoints: experts one by one, under their published names."""

import json

import pytest
import torch
from interop import assert_same_values, edit_config
from interop_mixtures import mixture, quantized_mixture, routers
from models import inputs
from safetensors.torch import load_file, save_file

import mxcompile
from mxcompile.checkpoint.interop.fused_experts import fused_tensors
from mxcompile.errors import CheckpointError
from mxcompile.tensor.weight import MXWeight

pytest.importorskip("compressed_tensors", reason="install the test extra")

FORMAT = "compressed-tensors"
EXPERTS = "model.layers.0.mlp.experts"
ROUTERS = {"gpt-oss": ".router", "llama4": ".router", "granite": ".router.layer"} | dict.fromkeys(
    ("qwen3", "mixtral", "olmoe"), ".gate"
)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("qwen3", "model.layers.0.mlp.experts.2.gate_proj"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w1"),
        ("olmoe", "model.layers.0.mlp.experts.2.gate_proj"),
        ("gpt-oss", "model.layers.0.mlp.experts.2.gate_proj"),
        ("llama4", "model.layers.0.feed_forward.experts.2.gate_proj"),
        ("granite", "model.layers.0.block_sparse_moe.experts.2.w1"),
    ],
)
def test_written_one_by_one_and_read_as_one(name, expert, tmp_path):
    model = quantized_mixture(name)
    fused = fused_tensors(model)
    assert len(fused) == (4 if name == "gpt-oss" else 2)
    assert all(isinstance(model.get_parameter(own), MXWeight) for own in fused if not own.endswith("_bias"))
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    rows, scales = tensors[f"{expert}.weight_packed"], tensors[f"{expert}.weight_scale"]
    assert (rows.shape, rows.dtype, scales.shape) == ((32, 32), torch.uint8, (32, 2))
    assert not any("gate_up_proj" in name or "input_linear" in name for name in tensors)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {n for n in ignored if "shared" not in n} == {"lm_head", expert.partition(".experts")[0] + ROUTERS[name]}
    loaded = mxcompile.load(tmp_path / "out")
    assert_same_values(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("llama")).logits, model(**inputs("llama")).logits)


@pytest.mark.parametrize(
    ("name", "weight"), [("qwen3", "mxfp4"), ("qwen3", "mxfp8_e4m3"), ("gpt-oss", "mxfp4"), ("llama4", "mxfp4")]
)
def test_their_own_package_decodes_each_expert_to_our_values(name, weight, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = quantized_mixture(name, weight)
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    content = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(content).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    path = EXPERTS.replace("mlp", "feed_forward") if name == "llama4" else EXPERTS
    experts = model.get_submodule(path)
    joined, down = experts.gate_up_proj.dequantize(), experts.down_proj.dequantize()
    if name != "qwen3":
        joined, down = joined.transpose(1, 2), down.transpose(1, 2)
    gate, up = (joined[:, 0::2], joined[:, 1::2]) if name == "gpt-oss" else joined.chunk(2, 1)
    for n in range(3):
        for leaf, expected in (("gate_proj", gate[n]), ("up_proj", up[n]), ("down_proj", down[n])):
            prefix = f"{path}.{n}.{leaf}."
            stored = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            bias = stored.pop("bias", None)
            assert torch.equal(compressor.decompress(stored, scheme)["weight"].bfloat16(), expected), prefix
            if name == "gpt-oss":
                biases = (
                    experts.down_proj_bias[n],
                    experts.gate_up_proj_bias[n, 0::2],
                    experts.gate_up_proj_bias[n, 1::2],
                )
                assert torch.equal(bias, biases[("down_proj", "gate_proj", "up_proj").index(leaf)]), prefix
            else:
                assert bias is None


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_float_experts_are_stored_one_by_one_too(name, tmp_path):
    model = quantized_mixture(name, exclude=("*.mlp.*", "lm_head*"))
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    assert f"{EXPERTS}.0.up_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert f"{EXPERTS}.2.down_proj" in ignored
    assert_same_values(mxcompile.load(tmp_path / "out"), model)


def test_names_that_llm_compressor_gives_to_experts_of_mixtral(tmp_path):
    """Published as w1, w3 and w2, linearized as gate_proj, up_proj and down_proj, in a module of either name."""
    model = quantized_mixture("mixtral")
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for path in ("block_sparse_moe", "mlp"):
        for published, linear in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            renamed = {
                name.replace(f".{published}.", f".{linear}.").replace(
                    "block_sparse_moe.experts", f"{path}.experts"
                ): value
                for name, value in tensors.items()
            }
            tensors = renamed
        assert f"model.layers.0.{path}.experts.1.up_proj.weight_packed" in tensors
        save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
        assert_same_values(mxcompile.load(tmp_path / "out"), model)


def test_experts_of_another_format_than_the_rest_of_theirs(tmp_path):
    """Gate and up in one parameter, down in another, which stays float."""
    model = quantized_mixture("gpt-oss", exclude=("*.down_proj", "lm_head*"))
    with pytest.raises(CheckpointError, match=r"mlp.experts: vLLM runs these layers as one .* down_proj float"):
        mxcompile.save(model, tmp_path / "out", format=FORMAT)


def test_quantized_routers_are_refused(tmp_path):
    model = mixture("gpt-oss")
    recipe = "lower-mx{weight=mxfp4,activation=none}"
    inputs = {"input_ids": torch.arange(24)[None]}
    model = mxcompile.quantize_and_compile(model, inputs, recipe=recipe, compile=False, include=routers(model))
    assert isinstance(model.get_submodule(routers(model)[0]).weight, MXWeight)
    with pytest.raises(
        CheckpointError, match=r"mlp.router.weight: compressed-tensors cannot hold a weight that is not"
    ):
        mxcompile.save(model, tmp_path / "out", format=FORMAT)


def test_read_into_a_model_of_the_caller_s(tmp_path):
    model = quantized_mixture("qwen3")
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.model.rotary_emb = model.model.rotary_emb
    assert_same_values(mxcompile.load(tmp_path / "out", model=empty), model)


def test_our_own_checkpoint_is_converted(tmp_path):
    """Its parameters have other names than those of the files it was loaded from."""
    model = quantized_mixture("mixtral")
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
    mxcompile.save(quantized_mixture("qwen3"), tmp_path / "out", format=FORMAT)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        mxcompile.load(tmp_path / "out")


def test_a_number_of_experts_that_the_file_does_not_hold(tmp_path):
    mxcompile.save(quantized_mixture("qwen3"), tmp_path / "out", format=FORMAT)
    edit_config(tmp_path / "out", lambda content: content.update(num_experts=10**9, num_local_experts=10**9))
    with pytest.raises(CheckpointError, match=r"gate.weight has shape \[3, 64\], in a Qwen3MoeForCausalLM of"):
        mxcompile.load(tmp_path / "out")
