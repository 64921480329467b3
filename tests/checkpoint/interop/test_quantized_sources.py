"""Sources that are quantized already: decoded as the packages that wrote them do, and kept where they are right."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from interop import lowered
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import mxcompile
from mxcompile.checkpoint.source_files import SourceFiles
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.weight import MXWeight

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


def saved(folder: Path, model_type: str, **sizes: int) -> dict[str, Tensor]:
    """A random bfloat16 model in a folder; returns its stored tensors."""
    config = AutoConfig.for_model(model_type, **sizes)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, stored: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    """Replace the tensors of a folder, and state how they are quantized."""
    save_file(
        {name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def to_fp8(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The linears of a model in FP8 with a scale for each 128 x 128."""
    result: dict[str, Tensor] = {}
    for name, value in stored.items():
        if "_proj" not in name:
            result[name] = value
            continue
        rows, columns = (-(-size // 128) for size in value.shape)
        scales = torch.rand(rows, columns) * 0.01 + 0.001
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: value.shape[0], : value.shape[1]]
        result[name] = (value.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        result[f"{name}_scale_inv"] = scales
    return result


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", WIDE | HEADS), ("qwen3_moe", WIDE | HEADS | EXPERTS)],
    ids=["llama", "qwen3_moe"],
)
def test_fp8_in_blocks_is_decoded_as_transformers_does(tmp_path, model_type, sizes):
    rewrite(tmp_path, to_fp8(saved(tmp_path, model_type, **sizes)), FP8)
    source = SourceFiles(tmp_path)
    expected = named_tensors(AutoModelForCausalLM.from_pretrained(tmp_path))  # decodes without a GPU
    for name in source.names:
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.tensor(name), expected[name]), name
    assert "FP8 (E4M3) with a scale for each 128 x 128 and are decoded" in source.notes[0]


def test_fp8_blocks_at_the_edges_may_be_smaller(tmp_path):
    """DeepSeek's `kv_a_proj_with_mqa` has 576 rows."""
    weight, scales = torch.randn(200, 300).to(torch.float8_e4m3fn), torch.rand(2, 3)
    save_file({"a_proj.weight": weight, "a_proj.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8, "dtype": "float32"}))
    rows, columns = torch.arange(200) // 128, torch.arange(300) // 128
    assert torch.equal(SourceFiles(tmp_path).tensor("a_proj.weight"), weight.float() * scales[rows][:, columns])


@pytest.fixture
def gpt_oss(tmp_path) -> Path:
    """A tiny gpt-oss with its experts in MXFP4, as published."""
    folder = tmp_path / "gpt-oss"
    build("gpt_oss").to(torch.bfloat16).save_pretrained(folder)
    stored: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, size, out = value.shape
            stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, size // 32, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(115, 128, (experts, out, size // 32), dtype=torch.uint8)
        else:
            stored[name] = value
    rewrite(folder, stored, {"quant_method": "mxfp4"})
    return folder


def test_gpt_oss_is_decoded_as_transformers_does(gpt_oss):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, source = load_file(gpt_oss / "model.safetensors"), SourceFiles(gpt_oss)
    names = [name for name in source.names if name.endswith("_proj") and "experts" in name]
    assert len(names) == 4
    for name in names:
        expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(source.tensor(name), expected), name
    assert "4 tensors are MXFP4 with blocks of 32 and are decoded" in source.notes[0]


def experts(folder: Path) -> dict[str, MXWeight]:
    module = mxcompile.load(folder)
    return {name: value for name, value in named_tensors(module).items() if "experts" in name and value.dim() == 3}


def test_mxfp4_keeps_its_bytes_as_mxfp4_and_its_values_as_mxfp8(gpt_oss, tmp_path):
    loaded = experts(gpt_oss)
    mxcompile.quantize_files(gpt_oss, tmp_path / "same", recipe="w4a16-mxfp-quick")
    for name, weight in experts(tmp_path / "same").items():
        assert torch.equal(weight.elements, loaded[name].elements), name
        assert torch.equal(weight.scales, loaded[name].scales), name
    mxcompile.quantize_files(gpt_oss, tmp_path / "wider", recipe="w8a8-mxfp-quick")
    for name, weight in experts(tmp_path / "wider").items():
        assert (weight.layout_.format, weight.layout_.activation) == ("mxfp8_e4m3", "mxfp8_e4m3")
        assert torch.equal(weight.dequantize(), loaded[name].dequantize()), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_decoded_as_compressed_tensors_does(tmp_path, symmetric, bits):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=32, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    weight, scales = torch.randn(40, 96, dtype=torch.bfloat16), (torch.rand(40, 3) * 0.3 + 0.1).bfloat16()
    given = {"weight": weight, "weight_scale": scales}
    if not symmetric:
        given["weight_zero_point"] = torch.randint(-3, 4, (40, 3), dtype=torch.int8)
    packed = PackedQuantizationCompressor.compress(given, scheme)
    expected = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    save_file({f"a.{name}": value.contiguous() for name, value in packed.items()}, tmp_path / "model.safetensors")
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stated, "dtype": "bfloat16"}))
    source = SourceFiles(tmp_path)
    assert source.names == ("a.weight",)
    assert source.shape("a.weight") == weight.shape
    assert torch.equal(source.tensor("a.weight"), expected)
    assert f"{bits}-bit integers" in source.notes[0]


@pytest.mark.filterwarnings("ignore:vLLM has no scheme for mxfp6_e2m3")
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"])
def test_mx_formats_of_compressed_tensors_keep_their_bytes(tmp_path, fmt):
    module = lowered(f"lower-mx{{weight={fmt}}}", "llama")
    mxcompile.save(module, tmp_path / "source", format="compressed-tensors")
    mxcompile.quantize_files(tmp_path / "source", tmp_path / "out", recipe=f"lower-mx{{weight={fmt}}}")
    back = named_tensors(mxcompile.load(tmp_path / "out"))
    for name, value in named_tensors(module).items():
        if isinstance(value, MXWeight):
            assert torch.equal(back[name].elements, value.elements), name
            assert torch.equal(back[name].scales, value.scales), name


def test_fp8_of_compressed_tensors(tmp_path):
    weight, scales = torch.randn(64, 96).to(torch.float8_e4m3fn), torch.rand(64, 1).bfloat16()
    save_file({"a.weight": weight, "a.weight_scale": scales}, tmp_path / "model.safetensors")
    stated = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stated, "dtype": "bfloat16"}))
    expected = (weight.float() * scales.float()).bfloat16()
    assert torch.equal(SourceFiles(tmp_path).tensor("a.weight"), expected)


def test_what_cannot_be_decoded_is_refused(tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for method, message in (("gptq", "is quantized by 'gptq'"), ("mxcompile", "is a checkpoint of mxcompile")):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
        with pytest.raises(CheckpointError, match=f"{message}: quantize the float model"):
            SourceFiles(tmp_path)
    stored = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: a\.weight is FP8 and .* holds no a\.weight_scale_inv"
    ):
        SourceFiles(tmp_path)
    save_file(stored | {"a.weight_scale_inv": torch.ones(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight has elements \[4, 4\] .* and scales \[3, 3\]"):
        SourceFiles(tmp_path)
