"""`quantize_files`: the bytes of the traced recipe, a plan before the work, and runs that were killed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file
from torch import nn

import mxcompile
from mxcompile.checkpoint import shards
from mxcompile.checkpoint.source_files import SourceFiles
from mxcompile.errors import CoverageError, InputError, PipelineError, WeightError
from mxcompile.model_free import quantize_files as module
from mxcompile.model_free.traced_plan import example_inputs
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.weight import MXWeight

NAMES = ("llama", "gpt2", "gpt_neox", "opt", "bert", "t5", "qwen3_moe", "gpt_oss", "mixtral", "whisper", "vit")
ROOT = Path(__file__).parents[2]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def saved(name: str, folder: Path, **options: Any) -> nn.Module:
    """A tiny model in a folder, as transformers loads it from there."""
    model = build(name).to(torch.bfloat16)
    model.save_pretrained(folder, **options)
    return type(model).from_pretrained(folder)


def traced(model: nn.Module, out: Path, recipe: str, format: str | None = None, **options: Any) -> None:
    """What `quantize_files` must write: the model quantized in memory, and saved."""
    inputs = example_inputs(model)
    quantized = mxcompile.quantize_and_compile(model, inputs, recipe=recipe, compile=False, **options)
    mxcompile.save(quantized, out, format=format, max_shard_size="40KB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    saved("llama", path, max_shard_size="50KB")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_the_traced_recipe(name, tmp_path):
    model = saved(name, tmp_path / "source", max_shard_size="50KB")
    plan = mxcompile.quantize_files(
        tmp_path / "source", tmp_path / "out", recipe="w4a8-mxint-quick", workers=2, max_shard_size="40KB"
    )
    traced(model, tmp_path / "traced", "w4a8-mxint-quick")
    assert plan.guessed is None
    assert files(tmp_path / "out") == files(tmp_path / "traced")


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("w4a16-mxfp-quick", {"include": ["lm_head", "model.embed_tokens"], "exclude": ["*.q_proj"]}),
        ("w8a8-mxfp-quick", {"overrides": {"*.down_proj": "mxfp4", "*.o_proj": None}}),
        ("round-weights{format=mxint6,rule=floor} | lower-mx{weight=mxint6}", {}),
        ("lower-mx{weight=mxint4,weight_rule=even}", {}),
    ],
)
def test_selections_overrides_and_rules_are_those_of_the_traced_recipe(folder, tmp_path, recipe, options):
    mxcompile.quantize_files(folder, tmp_path / "out", recipe=recipe, max_shard_size="40KB", **options)
    model = SourceFiles(folder).model
    traced(type(model).from_pretrained(folder), tmp_path / "traced", recipe, **options)
    assert files(tmp_path / "out") == files(tmp_path / "traced")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_compressed_tensors(name, tmp_path):
    model = saved(name, tmp_path / "source")
    written = {"recipe": "w4a16-mxfp-quick", "format": "compressed-tensors"}
    mxcompile.quantize_files(tmp_path / "source", tmp_path / "out", workers=3, max_shard_size="40KB", **written)
    traced(model, tmp_path / "traced", **written)
    assert files(tmp_path / "out") == files(tmp_path / "traced")


def test_the_plan_comes_before_the_work_and_a_dry_run_is_only_that(folder, tmp_path):
    plans = []
    plan = mxcompile.quantize_files(
        folder, tmp_path / "out", recipe="w4a16-mxfp-quick", dry_run=True, planned=plans.append
    )
    assert plans == [plan]
    assert not (tmp_path / "out").exists()
    tensors = {each.name: each for each in plan.tensors}
    assert list(tensors) == list(SourceFiles(folder).names)
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    assert (up.format, up.input, up.reason, up.shape) == ("mxfp4", None, "", (128, 64))
    assert (up.before, up.after) == (128 * 64 * 2, 128 * 64 // 2 + 128 * 2)
    assert "output head stays float" in tensors["lm_head.weight"].reason
    assert tensors["model.norm.weight"].reason == "not a matrix"
    assert len(plan.groups()["model.layers.*.mlp.up_proj.weight"]) == 2
    assert plan.record()["before"] == sum(each.before for each in tensors.values())


def test_recipes_that_need_the_model_are_refused(folder, tmp_path):
    with pytest.raises(PipelineError, match=r"awq-fold, gptq, tune-vectors need the whole model.*--low-memory"):
        mxcompile.quantize_files(folder, tmp_path / "out", recipe="w4a8-mxint")
    weighted = "round-weights{format=mxint4,weighted=true} | lower-mx{weight=mxint4}"
    with pytest.raises(PipelineError, match="round-weights needs the whole model"):
        mxcompile.quantize_files(folder, tmp_path / "out", recipe=weighted)
    with pytest.raises(InputError, match="workers is 0"):
        mxcompile.quantize_files(folder, tmp_path / "out", workers=0)
    with pytest.raises(InputError):  # what the caller gives is not replaced by a guess
        mxcompile.quantize_files(folder, tmp_path / "out", example_inputs={"wrong": torch.ones(1)})


def test_a_weight_that_is_not_finite_is_named_with_its_file(tmp_path):
    saved("llama", tmp_path / "source")
    path = tmp_path / "source/model.safetensors"
    stored = load_file(path)
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(WeightError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        mxcompile.quantize_files(tmp_path / "source", tmp_path / "out", workers=2)
    assert not (tmp_path / "out/config.json").exists()


KILLED = """
import os, sys
from mxcompile import quantize_files
from mxcompile.checkpoint import streamed_save
written = streamed_save.StreamedSave._write
def write(self, path, *rest):
    if path.name == "shard-2.safetensors":
        os._exit(9)
    return written(self, path, *rest)
streamed_save.StreamedSave._write = write
quantize_files(sys.argv[1], sys.argv[2], recipe="w4a16-mxfp-quick", max_shard_size="20KB", workers=2)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_after_its_last_file(folder, tmp_path, monkeypatch):
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, tmp_path / "out"], check=False, capture_output=True)
    assert killed.returncode == 9, killed.stderr.decode()
    options = {"recipe": "w4a16-mxfp-quick", "max_shard_size": "20KB"}
    mxcompile.quantize_files(folder, tmp_path / "whole", **options)
    written: list[str] = []
    write = shards.write
    monkeypatch.setattr(shards, "write", lambda path, tensors: written.append(path.name) or write(path, tensors))
    mxcompile.quantize_files(folder, tmp_path / "out", **options)
    assert written[0] == "shard-2.safetensors"
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_another_source_begins_anew(folder, tmp_path):
    options = {"recipe": "w4a16-mxfp-quick", "max_shard_size": "20KB"}
    subprocess.run([sys.executable, "-c", KILLED, folder, tmp_path / "out"], check=False, capture_output=True)
    saved("gpt2", tmp_path / "source")
    mxcompile.quantize_files(tmp_path / "source", tmp_path / "out", **options)
    mxcompile.quantize_files(tmp_path / "source", tmp_path / "whole", **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_moe"])
def test_shapes_and_names_choose_the_same_where_the_model_is_not_traced(name, tmp_path, monkeypatch):
    saved(name, tmp_path / "source")
    options = {"recipe": "w4a8-mxint-quick"}
    mxcompile.quantize_files(tmp_path / "source", tmp_path / "traced", **options)
    monkeypatch.setattr(module, "inputs_of", lambda model: None)
    plan = mxcompile.quantize_files(tmp_path / "source", tmp_path / "out", **options)
    assert "give example_inputs" in plan.notes[0]
    assert files(tmp_path / "out") == files(tmp_path / "traced")


class Own(nn.Module):
    """A class that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.router = nn.Linear(96, 4)


def test_an_unknown_class_is_quantized_by_shapes_and_names(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    own = Own()
    save_file(own.state_dict(), source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"architectures": ["Own"], "model_type": "own", "size": 64}))
    (source / "modeling_own.py").write_text("# the code of the class")
    plan = mxcompile.quantize_files(source, tmp_path / "out", recipe="w4a16-mxfp-quick")
    assert plan.notes == ("chosen by shapes and names: Own is not one of transformers",)
    back = mxcompile.load(tmp_path / "out", model=Own())
    assert {name for name, value in named_tensors(back).items() if isinstance(value, MXWeight)} == {"up.weight"}
    elements, scales = mxcompile.reference.quantize(own.up.weight.detach(), "mxfp4", "mse")
    expected = mxcompile.reference.dequantize(elements, scales, "mxfp4", 64, torch.float32)
    assert torch.equal(back.up.weight.dequantize(), expected)
    assert torch.equal(back.router.weight, own.router.weight)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["size"], config["architectures"]) == (64, ["Own"])
    assert (tmp_path / "out/modeling_own.py").read_text() == "# the code of the class"
    with pytest.raises(CoverageError, match="holds no matrix that would be quantized"):
        mxcompile.quantize_files(source, tmp_path / "none", recipe="w4a16-mxfp-quick", exclude=["up"])


MEASURED = """
import sys, threading
import torch, transformers
import mxcompile
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
options = {"recipe": "w4a16-mxfp-quick", "workers": int(sys.argv[3])}
mxcompile.quantize_files(sys.argv[1], sys.argv[2] + "-dry", dry_run=True, **options)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
mxcompile.quantize_files(sys.argv[1], sys.argv[2], **options)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_peak_memory_is_bounded_by_the_largest_tensor(tmp_path, workers):
    """The model has 290 MB, its largest tensor 17 MB: at most three of them for each worker, and 100 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 5, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16)).to(torch.bfloat16)
    largest = max(parameter.nbytes for parameter in model.parameters())
    bound = 3 * workers * largest + 100e6
    assert sum(parameter.nbytes for parameter in model.parameters()) > 1.3 * bound
    model.save_pretrained(tmp_path / "source", max_shard_size="200MB")
    arguments = [sys.executable, "-c", MEASURED, tmp_path / "source", tmp_path / "out", str(workers)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    peak = int(done.stdout.split()[-1])
    assert peak < bound, f"{peak / 1e6:.0f} MB"
