"""Mixtures of experts in GGUF files: the gguf package and mxcompile decode the same values, in llama.cpp's names."""

import copy

import numpy as np
import pytest
import torch
from interop import assert_same_values
from interop_mixtures import EXPERTS, mixture, quantized_mixture

import mxcompile
from mxcompile.checkpoint.interop import gguf_writer
from mxcompile.checkpoint.interop.fused_experts import fused_tensors
from mxcompile.checkpoint.interop.gguf_architectures import settings, unsupported_settings
from mxcompile.checkpoint.interop.gguf_experts import MIXTURES
from mxcompile.errors import CheckpointError
from mxcompile.tensor.weight import MXWeight

gguf = pytest.importorskip("gguf", reason="install the test extra")
pytestmark = pytest.mark.filterwarnings("ignore:.*llama.cpp takes and returns token ids only:UserWarning")
NAMES = {
    "mixtral": "llama",
    "qwen3": "qwen3moe",
    "qwen2": "qwen2moe",
    "olmoe": "olmoe",
    "granite": "granitemoe",
    "gpt-oss": "gpt-oss",
}
INPUTS = {"input_ids": torch.arange(24)[None] * 7 % 128}


def stored(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def decoded(tensor):
    """What the gguf package makes of a tensor."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4:
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    return torch.from_numpy(np.array(tensor.data, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_written_and_read(name, tmp_path):
    """Every value: matrices that stay float are in float16 there, but routers and biases of experts in float32."""
    model = quantized_mixture(name, dtype=torch.float32)
    mxcompile.save(model, tmp_path / "model.gguf")
    loaded, expected = mxcompile.load(tmp_path / "model.gguf"), copy.deepcopy(model)
    for key, parameter in expected.named_parameters():
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter.data = parameter.half().float()
    assert_same_values(loaded, expected)
    with torch.no_grad():
        assert torch.equal(loaded(**INPUTS).logits, expected(**INPUTS).logits)
    for key, value in vars(model.config).items():
        if key in ("num_experts_per_tok", "norm_topk_prob", "sliding_window", "layer_types", "rope_parameters"):
            assert getattr(loaded.config, key) == value, key


@pytest.mark.parametrize("name", NAMES)
def test_the_gguf_package_decodes_our_values_in_llama_cpp_s_layout(name, tmp_path):
    model = quantized_mixture(name, dtype=torch.float32)
    mxcompile.save(model, tmp_path / "model.gguf")
    reader, tensors = gguf.GGUFReader(tmp_path / "model.gguf"), stored(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == NAMES[name]
    assert reader.fields[f"{NAMES[name]}.expert_count"].contents() == EXPERTS
    assert reader.fields[f"{NAMES[name]}.expert_used_count"].contents() == 2
    layer = model.model.layers[0]
    experts = layer.block_sparse_moe.experts if name == "granite" else layer.mlp.experts
    joined, down = experts.gate_up_proj.dequantize(), experts.down_proj.dequantize()
    if name == "gpt-oss":
        joined, down = joined.transpose(1, 2), down.transpose(1, 2)
    gate, up = (joined[:, 0::2], joined[:, 1::2]) if name == "gpt-oss" else joined.chunk(2, 1)
    for part, expected in (("gate", gate), ("up", up), ("down", down)):
        tensor = tensors[f"blk.0.ffn_{part}_exps.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
        assert tensor.shape[::-1].tolist() == list(expected.shape)
        assert torch.equal(decoded(tensor), expected), part
    types = {key: tensor.tensor_type.name for key, tensor in tensors.items()}
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    if name == "gpt-oss":
        assert torch.equal(decoded(tensors["blk.0.ffn_gate_exps.bias"]), experts.gate_up_proj_bias[:, 0::2])
        assert torch.equal(decoded(tensors["blk.0.ffn_up_exps.bias"]), experts.gate_up_proj_bias[:, 1::2])
        assert torch.equal(decoded(tensors["blk.0.ffn_down_exps.bias"]), experts.down_proj_bias)
        assert types["blk.0.ffn_down_exps.bias"] == types["blk.0.attn_sinks.weight"] == "F32"
    if name == "qwen2":
        assert types["blk.0.ffn_up_shexp.weight"] == "MXFP4"
        assert types["blk.0.ffn_gate_inp_shexp.weight"] == "F32"


def test_experts_that_stay_float(tmp_path):
    model = quantized_mixture("gpt-oss", dtype=torch.float32, exclude=("*experts*", "lm_head*"))
    mxcompile.save(model, tmp_path / "model.gguf")
    assert stored(tmp_path / "model.gguf")["blk.0.ffn_up_exps.weight"].tensor_type.name == "F16"
    loaded = mxcompile.load(tmp_path / "model.gguf").model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        given = getattr(model.model.layers[0].mlp.experts, name)
        assert not isinstance(given, MXWeight)
        assert torch.equal(getattr(loaded, name), given.half().float()), name


def test_experts_that_ggml_quantized_otherwise(tmp_path, monkeypatch):
    """Stacked experts in Q8_0 are decoded, joined and turned."""
    model = quantized_mixture("gpt-oss", dtype=torch.float32, exclude=("*experts*", "lm_head*"))
    add = gguf.GGUFWriter.add_tensor_info
    packed = {}

    def info(self, name, shape, dtype, size, raw_dtype=None):
        if "exps.weight" in name:
            shape, dtype, raw_dtype = (*shape[:-1], shape[-1] // 32 * 34), np.dtype(np.uint8), eight
            size = int(np.prod(shape))
        add(self, name, shape, dtype, size, raw_dtype=raw_dtype)

    def encoded(name, value):
        if "exps.weight" not in name:
            return encode(name, value)
        packed[name] = gguf.quants.quantize(value.detach().contiguous().numpy(), eight)
        return packed[name]

    eight, encode = gguf.GGMLQuantizationType.Q8_0, gguf_writer._encoded
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor_info", info)
    monkeypatch.setattr(gguf_writer, "_encoded", encoded)
    mxcompile.save(model, tmp_path / "model.gguf")
    experts = mxcompile.load(tmp_path / "model.gguf").model.layers[0].mlp.experts
    values = {name: torch.from_numpy(gguf.quants.dequantize(data, eight)) for name, data in packed.items()}
    assert torch.equal(experts.gate_up_proj[..., 0::2].transpose(1, 2), values["blk.0.ffn_gate_exps.weight"])
    assert torch.equal(experts.gate_up_proj[..., 1::2].transpose(1, 2), values["blk.0.ffn_up_exps.weight"])
    assert torch.equal(experts.down_proj.transpose(1, 2), values["blk.0.ffn_down_exps.weight"])


def test_a_router_of_the_shared_expert_that_is_a_vector(tmp_path, monkeypatch):
    """Other writers store it without its dimension of 1."""
    encoding, encoded = gguf_writer._encoding, gguf_writer._encoded
    flat = "blk.0.ffn_gate_inp_shexp.weight"

    def flattened(name, value):
        return encoding(name, value[0] if name == flat else value)

    monkeypatch.setattr(gguf_writer, "_encoding", flattened)
    monkeypatch.setattr(gguf_writer, "_encoded", lambda name, value: encoded(name, value[0] if name == flat else value))
    model = quantized_mixture("qwen2", dtype=torch.float32)
    mxcompile.save(model, tmp_path / "model.gguf")
    assert stored(tmp_path / "model.gguf")[flat].shape.tolist() == [64]
    loaded = mxcompile.load(tmp_path / "model.gguf")
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))


def without(monkeypatch, ending):
    """Leave a tensor out of what is written."""
    parts = gguf_writer.GGUFWriting._parts

    def fewer(self, state):
        return [part for part in parts(self, state) if not part.stored_name.endswith(ending)]

    monkeypatch.setattr(gguf_writer.GGUFWriting, "_parts", fewer)


def test_a_projection_that_is_missing(tmp_path, monkeypatch):
    without(monkeypatch, "ffn_up_exps.weight")
    mxcompile.save(quantized_mixture("qwen3"), tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"not hold blk.0.ffn_up_exps.weight, .* belongs to .*gate_up_proj"):
        mxcompile.load(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("qwen3moe.expert_weights_scale", 2.5, "has qwen3moe.expert_weights_scale, which mxcompile does not support"),
        ("qwen3moe.expert_count", 4, r"ffn_gate_exps|gate.weight has shape \[3, 64\]|needs 4 experts, there are 3"),
        ("qwen3moe.expert_count", 10**9, r"needs 1000000000 experts, there are 3|has shape \[3, 64\]"),
        ("qwen3moe.expert_feed_forward_length", 64, r"gate_proj of expert 0 is \[32, 64\] .* others that belong there"),
        ("qwen3moe.rope.scaling.factor", 4.0, "has a scaled rotary embedding"),
    ],
)
def test_settings_that_do_not_fit_the_tensors(setting, value, message, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_writer, "settings", lambda *arguments: settings(*arguments) | {setting: value})
    mxcompile.save(quantized_mixture("qwen3"), tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=message):
        mxcompile.load(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3", {"norm_topk_prob": False}, "norm_topk_prob False, while llama.cpp has True built in"),
        ("qwen3", {"decoder_sparse_step": 2}, "decoder_sparse_step 2, while llama.cpp has 1 built in"),
        ("qwen3", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\], while llama.cpp has \[\] built in"),
        ("qwen2", {"norm_topk_prob": True}, "norm_topk_prob True, while llama.cpp has False built in"),
        ("qwen2", {"tie_word_embeddings": True}, "tie_word_embeddings True, while llama.cpp has False"),
        ("olmoe", {"num_key_value_heads": 2}, "2 heads for keys and 4 for queries"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0, while llama.cpp has None built in"),
        ("mixtral", {"sliding_window": 8}, "sliding windows"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0, while llama.cpp has 7.0 built in"),
        ("gpt-oss", {"layer_types": ["full_attention"]}, "sliding windows in another order"),
        ("gpt-oss", {"sliding_window": None}, "sliding windows in another order"),
        (
            "gpt-oss",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
            "a scaled rotary embedding",
        ),
    ],
)
def test_what_llama_cpp_has_otherwise(name, changes, message):
    writing = gguf_writer.GGUFWriting(mixture(name, **changes), None)
    with pytest.raises(CheckpointError, match=message):
        writing.check()
    gguf_writer.GGUFWriting(mixture(name), None).check()


def test_every_class_is_known_to_the_package_and_to_transformers():
    import transformers

    for known in MIXTURES:
        kind = getattr(transformers, known.class_name)
        config = kind.config_class()
        assert config.model_type == known.model_type
        assert known.architecture in gguf.MODEL_ARCH_NAMES.values()
        assert all(hasattr(config, name) for name in (*known.settings.values(), *known.flags))
        for reason in unsupported_settings(config, known.architecture):
            assert "built in" in reason or "sliding" in reason, reason


def test_a_turned_weight_whose_blocks_run_the_other_way(tmp_path):
    """An MX weight of experts `[experts, in, out]` must have its blocks along `in`."""
    model = quantized_mixture("gpt-oss", dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    turned = experts.down_proj.swap_axes()
    name = next(own for own in fused_tensors(model) if own.endswith("down_proj"))
    experts.down_proj = torch.nn.Parameter(turned, requires_grad=False)
    with pytest.raises(CheckpointError, match=rf"{name}: GGUF cannot hold a weight \[in, out\]"):
        mxcompile.save(model, tmp_path / "model.gguf")


@pytest.mark.parametrize("format", [None, "compressed-tensors"])
def test_planar_weights_are_written_as_any_others(format, tmp_path):
    """A model that was compiled for a GPU has them."""
    model = quantized_mixture("gpt-oss")
    planar = copy.deepcopy(model)
    for name, weight in list(planar.named_parameters()):
        if isinstance(weight, MXWeight) and name.endswith(("q_proj.weight", "gate_up_proj", "down_proj")):
            path, _, leaf = name.rpartition(".")
            setattr(planar.get_submodule(path), leaf, torch.nn.Parameter(weight.to_planar(), requires_grad=False))
    assert planar.model.layers[0].mlp.experts.down_proj.layout_.planes is not None
    for own, folder in ((model, "rows"), (planar, "planes")):
        mxcompile.save(own, tmp_path / (folder if format else f"{folder}.gguf"), format=format)
    files = [tmp_path / f"{n}/model.safetensors" if format else tmp_path / f"{n}.gguf" for n in ("rows", "planes")]
    assert files[0].read_bytes() == files[1].read_bytes()
