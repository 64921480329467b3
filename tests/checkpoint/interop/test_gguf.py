"""GGUF files with MXFP4 weights: the gguf package, transformers and mxcompile decode the same values."""

import copy
import shutil
import struct

import numpy as np
import pytest
import torch
from interop import assert_same_values, quantized
from models import build, inputs

import mxcompile
from mxcompile.checkpoint.interop import gguf_file
from mxcompile.errors import CheckpointError, InputError
from mxcompile.tensor.weight import MXWeight

gguf = pytest.importorskip("gguf", reason="install the test extra")
pytestmark = pytest.mark.filterwarnings("ignore:.*llama.cpp takes and returns token ids only:UserWarning")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    mxcompile.save(quantized(dtype=torch.float32), path)
    return path


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "mistral"])
def test_written_and_read(name, tmp_path):
    model = decoder(name) if name in ("qwen2", "qwen3", "mistral") else quantized(name=name, dtype=torch.float32)
    mxcompile.save(model, tmp_path / "model.gguf")
    loaded, expected = mxcompile.load(tmp_path / "model.gguf"), with_half_matrices(model)
    assert_same_values(loaded, expected)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("llama")).logits, expected(**inputs("llama")).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def with_half_matrices(model):
    """What a file holds of a model: float matrices in float16, all else unchanged."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not isinstance(parameter, MXWeight):
            parameter.data = parameter.half().to(parameter.dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_those_that_llama_cpp_computes_with(dtype, tmp_path):
    """Norms and biases in F32 whatever the model's dtype, other matrices in F16 unless they hold larger numbers."""
    model = copy.deepcopy(quantized(dtype=dtype))
    model.model.norm.weight.data.fill_(1.25)
    if dtype != torch.float16:
        model.model.embed_tokens.weight.data[3, 4] = 1e6
    mxcompile.save(model, tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    types = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    assert found["output_norm.weight"].data.tolist() == [1.25] * 64
    assert types["token_embd.weight"] == ("F16" if dtype == torch.float16 else "F32")
    assert types["output.weight"] in ("F16", "MXFP4")
    assert types["blk.0.ffn_down.weight"] == "MXFP4"


def test_token_ids_and_names_are_stated_and_what_is_absent_stays_absent(tmp_path):
    model = copy.deepcopy(quantized(dtype=torch.float32))
    model.config._name_or_path = "/home/somebody/Tiny-Llama"
    model.config.update({"bos_token_id": None, "eos_token_id": 7, "pad_token_id": None})
    model.generation_config.update(bos_token_id=None, eos_token_id=[7, 9, 11], pad_token_id=None)
    mxcompile.save(model, tmp_path / "model.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.name"] == "Tiny-Llama"
    assert (fields["general.file_type"], fields["general.quantization_version"]) == (38, 2)
    assert {key: value for key, value in fields.items() if key.endswith("token_id")} == {
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 9,
        "tokenizer.ggml.eom_token_id": 11,
    }
    loaded = mxcompile.load(tmp_path / "model.gguf")
    for source in (loaded.config, loaded.generation_config):
        assert (source.bos_token_id, source.eos_token_id, source.pad_token_id) == (None, [7, 9, 11], None)
    assert loaded.config.rms_norm_eps == model.config.rms_norm_eps


def decoder(name):
    """Fewer heads for keys than for queries, biases where the architecture has them."""
    import transformers

    kind = {"qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[name]
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": None}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes, **heads))
    recipe = "lower-mx{weight=mxfp4,activation=none}"
    return mxcompile.quantize_and_compile(model.eval(), inputs("llama"), recipe=recipe, compile=False)


def test_the_gguf_package_reads_the_file(file):
    """With the rows of q and k in llama.cpp's order; all else as it is here."""
    reader = gguf.GGUFReader(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    layer = quantized(dtype=torch.float32).model.layers[0]
    up = found["blk.0.ffn_up.weight"]
    assert up.tensor_type == gguf.GGMLQuantizationType.MXFP4
    decoded = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type))
    assert torch.equal(decoded, layer.mlp.up_proj.weight.dequantize())
    query = found["blk.0.attn_q.weight"]
    decoded = torch.from_numpy(gguf.quants.dequantize(query.data, query.tensor_type))
    turned = layer.self_attn.q_proj.weight.dequantize().unflatten(0, (4, 2, 8)).transpose(1, 2).flatten(0, 2)
    assert torch.equal(decoded, turned)
    assert reader.fields["general.file_type"].contents() == 38
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2


def test_transformers_reads_the_file(file):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    wanted = dict(with_half_matrices(quantized(dtype=torch.float32)).named_parameters())
    for name, tensor in theirs.named_parameters():
        other = wanted[name]
        assert torch.equal(tensor, other.dequantize() if isinstance(other, MXWeight) else other), name


def write(path, tensors, architecture="gpt-oss"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_array("some.numbers", [1, 2, 3])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_gguf_quantizes_is_read_by_name(tmp_path):
    """Three-dimensional experts, every scale, zeros; and types that are decoded."""
    types = gguf.GGMLQuantizationType
    values = np.random.default_rng(0).standard_normal((2, 8, 96)).astype(np.float32)
    values *= np.exp2(np.linspace(-120, 120, 8)).astype(np.float32)[:, None]
    values[0, 0] = 0
    packed = gguf.quants.quantize(values, types.MXFP4)
    eight = gguf.quants.quantize(values[0, 3:4], types.Q8_0)
    half = values[0, 3].astype(np.float16)
    bf16 = gguf.quants.quantize(values[1], types.BF16)
    content = {"e": (packed, types.MXFP4), "q": (eight, types.Q8_0), "h": (half, None), "b": (bf16, types.BF16)}
    write(tmp_path / "x.gguf", content)
    tensors = mxcompile.read_gguf(tmp_path / "x.gguf")
    assert isinstance(tensors["e"], MXWeight)
    wanted = {
        "e": gguf.quants.dequantize(packed, types.MXFP4),
        "q": gguf.quants.dequantize(eight, types.Q8_0),
        "h": half.astype(np.float32),
        "b": gguf.quants.dequantize(bf16, types.BF16),
    }
    for name, expected in wanted.items():
        tensor = tensors[name]
        given = tensor.dequantize() if isinstance(tensor, MXWeight) else tensor
        assert torch.equal(given, torch.from_numpy(expected)), name
    with pytest.raises(CheckpointError, match=r"holds a gpt-oss, which mxcompile cannot build; mxcompile.read_gguf"):
        mxcompile.load(tmp_path / "x.gguf")


def transposed():
    """A weight whose inner dimension is its first, as in a Conv1D."""
    model = copy.deepcopy(quantized(dtype=torch.float32))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.swap_axes(), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: quantized("mxfp8_e4m3"),
            r"q_proj.weight, \S+, \S+ and 4 more: GGUF cannot hold mxfp8_e4m3 weights \(quantize to mxfp4",
        ),
        (
            lambda: quantized(name="gemma"),
            r"GemmaForCausalLM cannot be written as GGUF: mxcompile writes GptOssForCausalLM, \S+, Llama",
        ),
        (lambda: quantized(name="mlp"), r"MLP cannot be written as GGUF"),
        (transposed, r"layers.0.mlp.up_proj.weight: GGUF cannot hold a weight \[in, out\], the transpose of"),
    ],
)
def test_what_cannot_be_written(make, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        mxcompile.save(make(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_all_that_a_file_cannot_hold_is_said_at_once(tmp_path):
    model = copy.deepcopy(quantized("mxfp8_e4m3", dtype=torch.float32))
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model.config.hidden_act = "gelu"
    model.extra = torch.nn.Linear(4, 4)
    with pytest.raises(CheckpointError) as caught:
        mxcompile.save(model, tmp_path / "model.gguf")
    for reason in (
        "this llama has a scaled rotary embedding",
        "this llama has gelu activations",
        "GGUF cannot hold mxfp8_e4m3 weights",
        "llama.cpp's llama has no name for extra.weight, extra.bias",
    ):
        assert f"\n- {reason}" in str(caught.value) or f": {reason}" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_llama_cpp_has_no_room_for(tmp_path):
    """Its Qwen2 has heads that divide the hidden size, its Qwen3 no bias behind the attention."""
    import transformers

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    for kind, options, message in (
        ("Qwen2", {"num_attention_heads": 4}, "this qwen2 has 4 heads of 32 channels for a hidden size of 64"),
        ("Qwen3", {"num_attention_heads": 2, "attention_bias": True}, "this qwen3 has an attention output with a bias"),
    ):
        config = getattr(transformers, f"{kind}Config")(**sizes, **options, num_key_value_heads=2)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        recipe = "lower-mx{weight=mxfp4,activation=none}"
        small = mxcompile.quantize_and_compile(model, inputs("llama"), recipe=recipe, compile=False)
        with pytest.raises(CheckpointError, match=message):
            mxcompile.save(small, tmp_path / "model.gguf")


@pytest.mark.parametrize("activation", ["mxfp4", "mxfp8_e4m3+aligned"])
def test_formats_of_inputs_are_not_lost_in_silence(activation, tmp_path):
    with pytest.warns(UserWarning, match="token ids only") as caught:
        mxcompile.save(quantized("mxfp4", activation), tmp_path / "model.gguf")
    assert len(caught) == 1
    assert f"it does not say that inputs of 7 layers are rounded to {activation}: llama.cpp" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_a_file_is_replaced_or_left(file, tmp_path, monkeypatch):
    path = shutil.copy(file, tmp_path / "model.gguf")
    mxcompile.save(quantized(dtype=torch.float32), path)
    data = path.read_bytes()
    assert data == file.read_bytes()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda self, data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mxcompile.save(quantized(dtype=torch.float32), path)
    assert path.read_bytes() == data
    assert [found.name for found in tmp_path.iterdir()] == ["model.gguf"]


def test_without_the_package(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match=r"GGUF files need the gguf package: pip install 'mxcompile\[demo\]'"):
        mxcompile.load(file)


def test_a_folder_and_a_model_that_is_given(file, tmp_path):
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(CheckpointError, match="is a folder: name a file"):
        mxcompile.save(quantized(), tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="uses other tensor names: load it without model"):
        mxcompile.load(file, model=build("llama"))
    with pytest.raises(CheckpointError, match="No such file"):
        mxcompile.load(tmp_path / "none.gguf")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(tensors=0, entries=0, version=3, magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries)


HOSTILE = {
    "empty": (b"", "cannot mmap an empty file"),
    "other": (header(magic=b"PK\3\4"), r"it begins with b'PK"),
    "version": (header(version=9), r"version 9; supported are GGUF versions 2 and 3"),
    "many tensors": (header(2**62), "ends in the middle of its header"),
    "many entries": (header(0, 2**62), "ends in the middle of its header"),
    "long key": (header(0, 1) + struct.pack("<Q", 2**63), "ends in the middle of its header"),
    "long array": (header(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 0, 2**62), "ends in the middle of its header"),
    "long texts": (header(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 8, 2**62), "an array of 4611686018427387904"),
    "arrays of arrays": (header(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 9, 1), "an array of 1 values of type 9"),
    "type": (header(0, 1) + text(b"a") + struct.pack("<I", 77), "metadata of the unknown type 77"),
    "twice": (header(0, 2) + (text(b"a") + struct.pack("<IB", 0, 1)) * 2, "the entry 'a' twice"),
    "no text": (header(0, 1) + text(b"\xff\xfe"), "utf-8"),
    "alignment": (header(0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 3), "its alignment is 3"),
    "dimensions": (header(1) + text(b"t") + struct.pack("<I", 99), "has 99 dimensions"),
    "kind": (header(1) + text(b"t") + struct.pack("<IQIQ", 1, 32, 999, 0), "of type 999 cannot have shape"),
    "row": (header(1) + text(b"t") + struct.pack("<IQIQ", 1, 31, 39, 0), r"of type 39 cannot have shape \[31\]"),
    "outside": (header(1) + text(b"t") + struct.pack("<IQIQ", 1, 2**40, 0, 0), "or ends beyond the file"),
    "offset": (header(1) + text(b"t") + struct.pack("<IQIQ", 1, 32, 0, 2**63), "or ends beyond the file"),
    "overlap": (
        header(2)
        + text(b"t")
        + struct.pack("<IQIQ", 1, 8, 0, 0)
        + text(b"u")
        + struct.pack("<IQIQ", 1, 8, 0, 4)
        + bytes(99),
        "'u' overlaps another tensor",
    ),
    "names": (
        header(2) + (text(b"t") + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2 + bytes(99),
        "two of its tensors have the",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files(what, tmp_path):
    data, message = HOSTILE[what]
    (tmp_path / "x.gguf").write_bytes(data)
    for read in (mxcompile.load, mxcompile.read_gguf):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "x.gguf")


def test_scales_that_are_nan(tmp_path):
    write(tmp_path / "x.gguf", {"w": (np.full((4, 17), 255, np.uint8), gguf.GGMLQuantizationType.MXFP4)})
    with pytest.raises(CheckpointError, match="w has a scale that is NaN"):
        mxcompile.read_gguf(tmp_path / "x.gguf")


def test_a_file_is_read_as_the_package_reads_it(file):
    ours, theirs = gguf_file.GGUFFile(file), gguf.GGUFReader(file)
    assert [*ours.entries] == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry = ours.entries[tensor.name]
        assert (entry.start, entry.bytes, list(entry.shape)) == (
            tensor.data_offset,
            tensor.n_bytes,
            tensor.shape[::-1].tolist(),
        )
