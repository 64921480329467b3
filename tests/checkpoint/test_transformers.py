"""Checkpoints of transformers models, also with `save_pretrained` and `from_pretrained`, and their auxiliary files."""

import copy
import io
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from checkpoints import OWN, assert_runs, assert_same, deployed, load, weight_files
from models import LANGUAGE_MODELS, MODELS, build, inputs, output
from torch import nn

import mxcompile
from mxcompile.checkpoint import Checkpoint, register
from mxcompile.errors import CheckpointError
from mxcompile.inductor import compile_module
from mxcompile.inductor.compile import _compile_generate


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN])
def test_transformers_loads_and_saves_it(name, tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM

    model, kind = deployed(name), AutoModelForCausalLM if name in LANGUAGE_MODELS else AutoModel
    model.save_pretrained(tmp_path / "first")
    loaded = kind.from_pretrained(tmp_path / "first")
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "second")
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert files == {path.name for path in (tmp_path / "second").iterdir()}
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    with torch.no_grad():
        assert torch.equal(output(loaded(**inputs(name))), output(model(**inputs(name))))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_is_loaded_generates(name, tmp_path):
    mxcompile.save(deployed(name), tmp_path)
    how = {**inputs(name, 1, 5), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(load(tmp_path, name).generate(**how), deployed(name).generate(**how))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model = mxcompile.quantize_and_compile(
        build("llama", dtype), inputs("llama"), recipe="w4a8-mxint-quick", compile=False
    )
    mxcompile.save(model, tmp_path)
    loaded = mxcompile.load(tmp_path)
    assert_same(loaded, model)
    assert loaded.config.dtype == dtype


def test_transformers_casts_as_asked(tmp_path):
    """As `.to(dtype)` does, but for buffers outside of the state dict, which transformers keeps."""
    from transformers import LlamaForCausalLM

    mxcompile.save(deployed("llama"), tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = copy.deepcopy(deployed("llama")).to(torch.bfloat16)
    wanted.model.rotary_emb = copy.deepcopy(deployed("llama").model.rotary_emb)
    assert_same(loaded, wanted)


def test_parameters_of_another_dtype_than_the_model_s(tmp_path):
    from transformers import LlamaForCausalLM

    model = copy.deepcopy(deployed("llama"))
    model.model.norm.to(torch.float64)
    mxcompile.save(model, tmp_path)
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path), model)


def test_a_compiled_module_is_saved_as_it_is_uncompiled(tmp_path):
    model = copy.deepcopy(deployed("llama"))
    mxcompile.save(model, tmp_path / "plain")
    compiled = compile_module(model)
    _compile_generate(model, torch.device("cuda"))  # as on a GPU, where it leaves a compile_config
    compiled.save_pretrained(tmp_path / "compiled")
    mxcompile.save(torch.compile(compiled), tmp_path / "wrapped")
    for path in (tmp_path / "plain").iterdir():
        for other in ("compiled", "wrapped"):
            assert path.read_bytes() == (tmp_path / other / path.name).read_bytes()


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_saves_itself(copied, tmp_path):
    """Its `save_pretrained` is its own, not that of the module it was copied from."""
    copied = copied(deployed("llama"))
    with torch.no_grad():
        copied.model.norm.weight.zero_()
    copied.save_pretrained(tmp_path)
    assert not mxcompile.load(tmp_path).model.norm.weight.any()


def test_tokenizer_and_generation_config_come_along(local_model, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(local_model)
    model = copy.deepcopy(deployed("llama"))
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1)
    mxcompile.save(model, tmp_path, tokenizer=tokenizer, processor=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert mxcompile.load(tmp_path).generation_config.max_new_tokens == 7
    assert {"tokenizer.json", "generation_config.json"} <= Checkpoint(tmp_path).config.files.keys()


def test_a_file_that_came_along_may_be_changed_but_not_in_silence(tmp_path):
    mxcompile.save(deployed("llama"), tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 3}))
    with pytest.warns(UserWarning, match=r"generation_config.json has changed since it was saved") as caught:
        loaded = mxcompile.load(tmp_path)
    assert {warning.filename for warning in caught} == {__file__}
    assert loaded.generation_config.max_new_tokens == 3
    path.unlink()
    with pytest.warns(UserWarning, match=r"generation_config.json is missing: it was saved with the model"):
        mxcompile.load(tmp_path)


@pytest.mark.parametrize("damaged", [b"", b'{"max_new_tokens": 3,', b"\xff\xfe", b"[3]"])
def test_a_generation_config_that_is_no_json_is_refused(tmp_path, damaged):
    """transformers would generate with its defaults."""
    model = deployed("llama")
    mxcompile.save(model, tmp_path)
    (tmp_path / "generation_config.json").write_bytes(damaged)
    for reading in (mxcompile.load, partial(mxcompile.load, verify=False), type(model).from_pretrained):
        with pytest.raises(
            CheckpointError, match=r"generation_config.json (cannot be read as JSON|holds no JSON object)"
        ):
            reading(tmp_path)


def test_options_of_save_pretrained(tmp_path):
    model = deployed("llama")
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    with pytest.raises(CheckpointError, match="does not support distributed_checkpoint, variant: leave it out"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True, variant="fp8", safe_serialization=True)
    with pytest.raises(CheckpointError, match=r"does not push: call model.push_to_hub\(repo_id\)"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 3


def test_transformers_is_told_when_a_model_of_another_class_is_asked_for(tmp_path):
    from transformers import AutoModel

    mxcompile.save(deployed("llama"), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a LlamaForCausalLM, not a LlamaModel: load it with L"):
        AutoModel.from_pretrained(tmp_path)


IN_A_FRESH_PROCESS = """
import sys
import mxcompile
assert not any(name.startswith("transformers") for name in sys.modules)
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "MXWeight"
"""


def test_transformers_is_not_imported_but_told_when_it_is(tmp_path):
    mxcompile.save(deployed("llama"), tmp_path)
    assert_runs(IN_A_FRESH_PROCESS, tmp_path)


def test_transformers_may_have_been_imported_before(tmp_path, monkeypatch):
    """Without mxcompile a model in eight bits, whose elements are as many as its values, is refused."""
    from transformers import LlamaForCausalLM
    from transformers.quantizers import auto

    mxcompile.save(deployed("llama", "w8a8-mxint-quick"), tmp_path)
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", dict(auto.AUTO_QUANTIZER_MAPPING))
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
    del auto.AUTO_QUANTIZER_MAPPING["mxcompile"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["mxcompile"]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    for _ in range(2):
        register()
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path), deployed("llama", "w8a8-mxint-quick"))


@pytest.mark.slow
def test_threads_that_load_leave_the_classes_of_transformers_as_they_are(tmp_path):
    from transformers import PreTrainedModel

    before = PreTrainedModel.tie_weights
    mxcompile.save(deployed("llama-tied"), tmp_path)
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(lambda _: mxcompile.load(tmp_path), range(8)))
    assert PreTrainedModel.tie_weights is before
    for model in loaded:
        assert_same(model, deployed("llama-tied"))
