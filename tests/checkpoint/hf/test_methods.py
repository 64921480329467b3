"""What transformers, accelerate and peft ask of a quantized model, fresh or loaded."""

import copy
import shutil

import pytest
import torch
from checkpoints import assert_same, deployed, weight_files
from models import build, inputs, output
from torch import nn

import mxcompile
from mxcompile.errors import CheckpointError, MXCompileError
from mxcompile.tensor.weight import MXWeight

peft_warns = pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that transformers renamed
ROTATED = "rotate{weight=mxint4,activation=mxint8} | lower-mx{weight=mxint4,activation=none}"


def logits(model: nn.Module, **more: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return output(model(**inputs("llama"), **more))


@pytest.fixture(params=["fresh", "loaded"])
def quantized(request, tmp_path):
    """quantized() is a quantized Llama, its head included."""

    def make(recipe="w4a16-mxint-quick", name="llama", include=("lm_head*",)):
        model = deployed(name, recipe, include)
        if request.param == "fresh":
            return copy.deepcopy(model)
        mxcompile.save(model, tmp_path / "made")
        return type(model).from_pretrained(tmp_path / "made")

    return make


def test_the_footprint_is_that_of_packed_weights(quantized, tmp_path):
    model = quantized()
    packed = sum(value.packed_bytes for value in model.parameters() if isinstance(value, MXWeight))
    plain = sum(value.nbytes for value in model.parameters() if not isinstance(value, MXWeight))
    assert model.get_memory_footprint(return_buffers=False) == packed + plain
    assert model.get_memory_footprint() == packed + plain + sum(buffer.nbytes for buffer in model.buffers())


def test_dequantized_it_is_an_ordinary_model(quantized, tmp_path):
    model = quantized()
    expected = logits(model)
    assert model.dequantize() is model
    assert not any(isinstance(value, MXWeight) for value in model.parameters())
    assert all(value.requires_grad for value in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "float")
    again = type(model).from_pretrained(tmp_path / "float")
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), logits(model))
    assert mxcompile.quantize_and_compile(model, inputs("llama"), recipe="w4a16-mxint-quick", compile=False)
    with pytest.raises(ValueError, match="first quantize"):
        model.dequantize()


def test_dequantizing_undoes_what_was_done_to_inputs():
    """A rotation and a multiplier go into the float weight."""
    model = mxcompile.quantize_and_compile(build("llama"), inputs("llama"), recipe=ROTATED, compile=False)
    assert any(value.is_prepared for value in model.parameters() if isinstance(value, MXWeight))
    expected = logits(model)
    torch.testing.assert_close(logits(model.dequantize()), expected, rtol=1e-4, atol=1e-4)


def test_dequantized_to_a_dtype(quantized):
    model = quantized().dequantize(torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_tied_weights_stay_tied_when_dequantized():
    model = mxcompile.quantize_and_compile(
        build("llama-tied"), inputs("llama"), recipe="w4a16-mxint-quick", compile=False, include=["*"]
    )
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    model.dequantize()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_sizes_of_vocabularies(quantized):
    model = quantized()
    before = dict(model.named_parameters())
    with pytest.raises(MXCompileError, match=r"the output head holds MX weights, which cannot be resized from 128"):
        model.resize_token_embeddings(140)
    with pytest.raises(MXCompileError, match="rows to 192"):
        model.resize_token_embeddings(pad_to_multiple_of=96)
    assert all(value is before[name] for name, value in model.named_parameters())
    assert model.resize_token_embeddings(128) is model.resize_token_embeddings() is model.model.embed_tokens
    assert model.dequantize().resize_token_embeddings(140).weight.shape == (140, 64)


def test_float_embeddings_are_resized(quantized):
    model = quantized(include=())
    model.resize_token_embeddings(140)
    assert logits(model).shape[-1] == model.config.vocab_size == 140


def test_a_quantized_head_is_never_tied_to_a_float_embedding(quantized):
    model = quantized(name="llama-tied")
    head = model.lm_head.weight
    assert isinstance(head, MXWeight)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert model.lm_head.weight is head
    model.config.tie_word_embeddings = True
    with pytest.raises(MXCompileError, match=r"tie_weights would replace lm_head.weight by model.embed_tokens.weight"):
        model.tie_weights()
    assert model.lm_head.weight is head


def test_a_head_tied_to_its_embedding_keeps_its_activation_format(quantized):
    model = quantized(recipe="w8a8-mxint-quick", name="llama-tied", include=("*",))
    head, expected = model.lm_head.weight, logits(model)
    assert torch.equal(head.elements, model.model.embed_tokens.weight.elements)
    assert model.config.tie_word_embeddings
    model.tie_weights()
    assert model.lm_head.weight is head
    assert torch.equal(logits(model), expected)


def test_the_user_s_config_still_says_that_weights_are_tied():
    model = build("llama-tied")
    mxcompile.quantize_and_compile(model, inputs("llama"), recipe="w4a16-mxint-quick", compile=False, include=["lm*"])
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.float16), lambda m: m.half().float().half()])
def test_casts(quantized, cast):
    model = cast(quantized())
    assert {value.dtype for value in model.parameters()} == {torch.float16}
    assert all(isinstance(value, MXWeight) for name, value in model.named_parameters() if "proj" in name)


def test_saved_as_training_loops_do(quantized, tmp_path):
    model = quantized()
    how = {"is_main_process": True, "save_function": torch.save, "safe_serialization": True, "max_shard_size": None}
    own = {name: value.clone() for name, value in model.state_dict().items()}  # as gathered from several processes
    model.save_pretrained(tmp_path / "out", state_dict=own, **how)
    assert_same(mxcompile.load(tmp_path / "out"), model)
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        other = {**own, name: own[name].dequantize() if isinstance(own[name], MXWeight) else own[name] + 1}
        with pytest.raises(CheckpointError, match=f"the state_dict for save_pretrained has another {name} than"):
            model.save_pretrained(tmp_path / "no", state_dict=other)
    with pytest.raises(CheckpointError, match=r"has another lm_head.weight"):
        model.save_pretrained(tmp_path / "no", state_dict={k: v for k, v in own.items() if k != "lm_head.weight"})
    assert not (tmp_path / "no").exists()


def test_pushed_to_the_hub_as_it_is_saved(quantized, tmp_path, monkeypatch):
    from transformers.utils import hub

    kept = tmp_path / "pushed"

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr(hub, "hf_api", Api, raising=False)
    monkeypatch.setattr(hub, "create_repo", Api().create_repo, raising=False)
    monkeypatch.setattr(
        hub, "create_and_tag_model_card", lambda *_, **__: type("Card", (), {"save": lambda *_: None})()
    )
    model = quantized()
    monkeypatch.setattr(
        type(model),
        "_upload_modified_files",
        lambda _, folder, *__, **___: shutil.copytree(folder, kept),
        raising=False,
    )
    model.push_to_hub("me/model")
    assert_same(mxcompile.load(kept), model)


def test_offloaded_to_host_memory(quantized):
    accelerate = pytest.importorskip("accelerate")
    model = quantized(name="llama-tied")
    expected = logits(model)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert {value.device.type for value in offloaded.parameters()} == {"meta"}
    assert torch.equal(logits(offloaded), expected)


def test_offloading_to_disk_is_refused(quantized, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(MXCompileError, match="has no float storage to write to a file or to offload to disk"):
        accelerate.disk_offload(quantized(), str(tmp_path / "off"), execution_device="cpu")


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    how = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, how)


@peft_warns
def test_an_adapter_is_merged_into_dequantized_weights(quantized):
    model = adapted(quantized())
    expected, before = logits(model), [value for value in model.parameters() if isinstance(value, MXWeight)]
    with pytest.raises(MXCompileError, match=r"in place, as merging an adapter does: call mxcompile\.merge_adapters"):
        model.merge_and_unload()
    assert [id(v) for v in model.parameters() if isinstance(v, MXWeight)] == [id(v) for v in before]
    assert torch.equal(logits(model), expected)
    model.dequantize()
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@peft_warns
def test_adapters_are_trained_by_the_trainer_and_bare_models_are_not(quantized, tmp_path):
    from transformers import Trainer, TrainingArguments

    row = inputs("llama")["input_ids"][0]
    how = {
        "args": TrainingArguments(str(tmp_path / "t"), max_steps=2, report_to=[], save_strategy="no", use_cpu=True),
        "train_dataset": [{"input_ids": row, "labels": row}] * 2,
    }
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(quantized(), **how)
    model = adapted(quantized())
    before = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}
    Trainer(model, **how).train()
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_weight_files_have_the_size_of_the_footprint(quantized, tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path / "out")
    on_disk = sum(path.stat().st_size for path in weight_files(tmp_path / "out"))
    assert abs(model.get_memory_footprint() - on_disk) < 0.1 * on_disk
