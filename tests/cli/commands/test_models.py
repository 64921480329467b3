"""`mxcompile quantize | convert | generate | inspect | lm-eval`: checkpoints written, refused, run and printed."""

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mxcompile
from mxcompile.cli.app import app
from mxcompile.cli.model_source import load_model
from mxcompile.errors import CheckpointError, DumpError, InputError, PipelineError, RecoveryError, UnknownNameError
from mxcompile.passes.recipes import RECIPES
from mxcompile.tensor.modules import stored_bytes
from mxcompile.tensor.weight import MXWeight

WORDS = ["The", "capital", "of", "France", "is", "Germany", "Italy", "Paris", "Berlin", "."]


def run(*arguments: object) -> Any:
    """The result of a command that may raise."""
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    generator = torch.Generator().manual_seed(0)
    path.write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (1200,), generator=generator).tolist()))
    return path


@pytest.fixture(scope="module")
def quantize(local_model, text):
    """quantize(out, ...) is the command on a tiny model and text."""

    def start(out: Path, *options: object) -> Any:
        size = ("--text", text, "--length", 32, "--windows", 4)
        return run("quantize", local_model, "--out", out, *size, *options)

    return start


@pytest.fixture(scope="module")
def checkpoint(quantize, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "new"
    quantize(folder, "--recipe", "w4a8-mxint-quick")
    return folder


def test_quantize_writes_model_and_tokenizer_and_says_how_good_it_is(quantize, tmp_path):
    result = quantize(tmp_path / "out", "--recipe", "w8a8-mxint-quick", "--min-recovery", 0.8)
    assert re.search(r"^ +w8a8-mxint-quick +[\d.]+ +[\d.]+ +[+-][\d.]+% +[\d.]+ +[\d.]+%", result.stdout, re.MULTILINE)
    assert re.search(
        r"^recovery \(top1\) 0\.\d+; written to .*out \(mxcompile generate .*out --prompt", result.stdout, re.M
    )
    model, tokenizer = load_model(str(tmp_path / "out"))
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "MXWeight"
    assert tokenizer("Paris").input_ids == [9]


def test_a_dump_of_each_pass(quantize, tmp_path):
    out, dump = tmp_path / "out", tmp_path / "dump"
    result = quantize(out, "--recipe", "w8a8-mxint-quick", "--dump", dump)
    assert f"what each pass did is in {dump} (mxcompile show {dump})" in result.stderr
    assert json.loads(run("show", dump, "--json").stdout)["graphs"] == [
        "00-trace",
        "01-round-weights",
        "02-lower-mx",
    ]
    assert mxcompile.Ledger.load(dump).passes[-1].measured.layers
    with pytest.raises(InputError, match=r"--dump .* and --out .* are in one folder: give each one of its own"):
        quantize(out, "--dump", out / "dump")
    with pytest.raises(InputError, match=r"--model-free has no graph to write to --dump"):
        quantize(tmp_path / "files", "--model-free", "--dump", dump)


def test_what_recovers_too_little_is_not_written(quantize, tmp_path):
    """Four bits of random weights keep far fewer than nine of ten predictions."""
    out = tmp_path / "out"
    with pytest.raises(RecoveryError, match=r"recovery \(top1\) 0\.\d+, below 0.99: nothing is written; .*--force"):
        quantize(out, "--min-recovery", 0.99)
    assert not out.exists()
    result = quantize(out, "--min-recovery", 0.99, "--force", "--json")
    answer = json.loads(result.stdout)
    assert answer["top1"] == answer["recovery"] < 0.99
    assert (answer["metric"], answer["out"]) == ("top1", str(out))
    assert "below 0.99; written to" in result.stderr
    assert mxcompile.load(out).config.model_type == "llama"


def test_json_is_printed_of_a_refused_model_too(local_model, text, tmp_path):
    arguments = ["quantize", local_model, "--out", tmp_path / "out", "--text", text, "--length", 32, "--json"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--min-recovery", "1"])
    assert isinstance(result.exception, RecoveryError)
    assert json.loads(result.stdout)["out"] is None


@pytest.mark.parametrize("metric", ["top1", "perplexity", "kl"])
def test_other_metrics(quantize, tmp_path, metric):
    answer = json.loads(quantize(tmp_path / metric, "--metric", metric, "--json").stdout)
    ratio = answer["reference"]["perplexity"] / answer["model"]["perplexity"]
    wanted = {"top1": answer["top1"], "perplexity": ratio, "kl": torch.tensor(-answer["kl"]).double().exp().item()}
    assert answer["recovery"] == pytest.approx(wanted[metric], rel=1e-6)


def test_bits_mix_formats_and_say_which(quantize, tmp_path):
    options = ("--bits", 6, "--calibration", 4, "--calibration-length", 32)
    result = quantize(tmp_path / "out", *options)
    assert re.search(
        r"^ +[5-6][.\d]* bits a weight with scales \((\d+ in mxint\d(, )?)+\); costs by fisher", result.stderr, re.M
    )
    answer = json.loads(quantize(tmp_path / "again", *options, "--json").stdout)
    chosen = {name: item["format"] for item in answer["allocation"]["items"] for name in item["weights"]}
    assert len(set(chosen.values())) > 1
    model, _ = load_model(str(tmp_path / "out"))
    stored = {name: weight.layout_.format for name, weight in model.named_parameters() if name in chosen}
    assert stored == chosen
    with pytest.raises(InputError, match="--bits runs the model"):
        quantize(tmp_path / "files", "--bits", 6, "--model-free")
    with pytest.raises(PipelineError, match="no lower-mx"):
        quantize(tmp_path / "none", "--bits", 6, "--recipe", "smooth-quant")


def test_what_cannot_be_is_said_before_the_work(quantize, tmp_path, monkeypatch):
    monkeypatch.setattr("mxcompile.cli.compare.load_model", lambda source: pytest.fail("loaded"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds files of another model"):
        quantize(tmp_path)
    refused = CliRunner().invoke(app, ["quantize", "--out", str(tmp_path / "out"), "--metric", "top2"])
    assert refused.exit_code == 2
    with pytest.raises(UnknownNameError, match="unknown recipe"):
        quantize(tmp_path / "out", "--recipe", "w9a9")


def test_generate_goes_on_with_a_prompt(checkpoint):
    model, tokenizer = load_model(str(checkpoint))
    prompt = "The capital of France is"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    wanted = tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True)
    how = ("generate", checkpoint, "--prompt", prompt, "--max-new-tokens", 5)
    assert run(*how).stdout == f"{wanted}\n"
    answer = json.loads(run(*how, "--json").stdout)
    assert (answer["text"], answer["prompt"]) == (wanted, prompt)
    assert 0 < answer["tokens"] <= 5


def test_inspect_shows_formats_sizes_and_what_made_it(checkpoint):
    output = run("inspect", checkpoint, "--verify").stdout
    assert f"recipe: {RECIPES['w4a8-mxint-quick']}\n" in output
    assert re.search(r"made by: mxcompile [\d.]+, torch 2\.\S+, transformers 5\.\S+\n", output)
    assert re.search(r"^ +mxint4 +mxint8 +7 +36,864 +0.02", output, re.MULTILINE)
    assert "all checksums match" in output
    lines = run("inspect", checkpoint, "--tensors").stdout
    assert re.search(r"^ +model.layers.0.mlp.up_proj.weight +mxint4 +mxint8 +128x64 +0.00", lines, re.MULTILINE)


def test_inspect_as_json(checkpoint):
    found = json.loads(run("inspect", checkpoint, "--json").stdout)
    assert (found["module"], found["recipe"]) == ("LlamaForCausalLM", RECIPES["w4a8-mxint-quick"])
    assert found["versions"]["torch"] == torch.__version__
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == stored_bytes(mxcompile.load(checkpoint))
    assert {tensor["format"] for tensor in found["tensors"]} == {"mxint4", "float32"}
    assert set(found["files"]) | {"config.json"} == {path.name for path in checkpoint.iterdir()}


def test_a_checkpoint_is_a_model_for_the_other_commands(checkpoint, local_model, text):
    size = ("--text", text, "--length", 32, "--windows", 2, "--json")
    answer = json.loads(run("eval", checkpoint, "--against", local_model, *size).stdout)
    assert answer["model"]["bytes"] == stored_bytes(mxcompile.load(checkpoint)) < answer["reference"]["bytes"]
    for command in ("bisect", "groups"):
        with pytest.raises(InputError, match="this LlamaForCausalLM is quantized already"):
            run(command, checkpoint, *(size if command == "bisect" else ()))


def test_results_go_to_stdout_and_what_happens_on_the_way_to_stderr(local_model, text):
    how = ("eval", local_model, "--recipe", "w4a8-mxint-quick", "--text", text, "--length", 32, "--windows", 2)
    result = run(*how)
    assert result.stdout.startswith("62 tokens of words.txt, 2 windows of 32\n")
    steps = ["loading", "quantizing: round-weights", "  round-weights: 7 rewrites", "  lower-mx: 7 rewrites"]
    places = [result.stderr.index(f"{step}") for step in steps]
    assert places == sorted(places)
    assert "\x1b" not in result.stdout + result.stderr
    assert not re.search("loading|rewrites", result.stdout)


def test_a_damaged_checkpoint_is_one_message(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="holds no saved model"):
        run("inspect", tmp_path)
    with pytest.raises(InputError, match="cannot be loaded"):
        run("generate", tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "kind"),
    [
        ("model.safetensors", lambda data: data[:-8], "SafetensorError"),
        ("tokenizer.json", lambda data: b"{}", "KeyError"),
        (
            "config.json",
            lambda data: re.sub(rb'"intermediate_size": \d+', b'"intermediate_size": 32', data),
            "RuntimeError",
        ),
    ],
)
def test_a_damaged_float_model_is_one_message(local_model, tmp_path, file, change, kind):
    folder = shutil.copytree(local_model, tmp_path / "damaged")
    data = (folder / file).read_bytes()
    assert change(data) != data
    (folder / file).write_bytes(change(data))
    with pytest.raises(InputError, match=rf"damaged cannot be loaded \({kind}: "):
        run("generate", folder)


def test_quantize_for_other_programs_and_convert(quantize, text, tmp_path):
    recipe = ("--recipe", "lower-mx{weight=mxfp8_e4m3,activation=none}")
    quantize(tmp_path / "theirs", *recipe, "--format", "compressed-tensors")
    assert "compressed-tensors" in (tmp_path / "theirs" / "config.json").read_text()
    assert re.search(r"mxfp8_e4m3 +7 +36,864", run("inspect", tmp_path / "theirs").stdout)
    run("convert", tmp_path / "theirs", tmp_path / "own")
    assert "mxfp8_e4m3" in run("inspect", tmp_path / "own").stdout
    size = ("--text", text, "--length", 32, "--windows", 2, "--json")
    answer = json.loads(run("eval", tmp_path / "theirs", "--against", tmp_path / "own", *size).stdout)
    assert (answer["kl"], answer["top1"]) == (0, 1)
    with pytest.raises(CheckpointError, match="GGUF cannot hold mxfp8_e4m3 weights"):
        run("convert", tmp_path / "own", tmp_path / "model.gguf")


def test_a_gguf_file_is_a_model_for_the_other_commands(quantize, local_model, text, tmp_path):
    """What `quantize` recommends works, and the tokenizer survives a conversion there and back."""
    out = tmp_path / "m.gguf"
    result = quantize(out, "--recipe", "w4a16-mxfp-quick")
    assert re.search(r"^warning: .*m.gguf: llama.cpp .* token ids only, .*is a WordLevel", result.stderr, re.MULTILINE)
    (advice,) = re.findall(r"\(mxcompile (generate \S+ --prompt) \.\.\.\)", result.stdout)
    assert run(*advice.split(), "The capital", "--max-new-tokens", 3).stdout.startswith("The capital")
    size = ("--text", text, "--length", 32, "--windows", 2, "--json")
    answer = json.loads(run("eval", out, "--against", local_model, *size).stdout)
    assert answer["model"]["bytes"] < answer["reference"]["bytes"]
    lines = run("inspect", out).stdout
    assert re.search(r"^LlamaForCausalLM, 0.1 MB in 1 file\n", lines)
    assert re.search(r"^ +mxfp4 +7 +36,864 +0.02", lines, re.MULTILINE)
    found = json.loads(run("inspect", out, "--json").stdout)
    types = {tensor["name"]: tensor["format"] for tensor in found["tensors"]}
    assert (types["token_embd.weight"], types["output_norm.weight"]) == ("float16", "float32")
    assert (found["folder"], found["files"], found["recipe"]) == (str(out), ["m.gguf"], None)
    run("convert", out, tmp_path / "own")
    run("convert", tmp_path / "own", tmp_path / "again.gguf")
    assert load_model(str(tmp_path / "own"))[1]("Paris").input_ids == [9]
    again = mxcompile.read_gguf(tmp_path / "again.gguf")
    assert again.keys() == types.keys()
    for name, tensor in mxcompile.read_gguf(out).items():
        values = [t.dequantize() if isinstance(t, MXWeight) else t for t in (tensor, again[name])]
        assert torch.equal(*values), name
    with pytest.raises(InputError, match=r"m.gguf has no checksums to verify"):
        run("inspect", out, "--verify")


@pytest.mark.filterwarnings("ignore:.*llama.cpp takes and returns token ids only:UserWarning")
def test_a_gguf_file_without_a_tokenizer(checkpoint, tmp_path):
    quantized = mxcompile.load(checkpoint)
    small = mxcompile.quantize_and_compile(
        type(quantized)(quantized.config), torch.ones(1, 4, dtype=torch.int64), recipe="w4a16-mxfp-quick", compile=False
    )
    mxcompile.save(small, tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"m.gguf holds no tokenizer: save the model again with mxcompile.save"):
        run("generate", tmp_path / "m.gguf")
    assert "mxfp4" in run("inspect", tmp_path / "m.gguf").stdout
    run("convert", tmp_path / "m.gguf", tmp_path / "own")
    assert not (tmp_path / "own" / "tokenizer.json").exists()


def test_what_a_gguf_file_cannot_hold_is_said_before_the_work(quantize, tmp_path, monkeypatch):
    monkeypatch.setattr("mxcompile.cli.compare.quantize", lambda *_, **__: pytest.fail("quantized"))
    with pytest.raises(CheckpointError, match=r"GGUF cannot hold mxint4 weights \(quantize to mxfp4 in blocks"):
        quantize(tmp_path / "m.gguf", "--recipe", "w4a8-mxint-quick")


def test_places_that_are_taken_are_said_before_the_work(quantize, local_model, tmp_path, monkeypatch):
    monkeypatch.setattr("mxcompile.cli.compare.load_model", lambda source: pytest.fail("loaded"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(tmp_path, "--format", "compressed-tensors")
    with pytest.raises(UnknownNameError, match="unknown checkpoint format 'ggml'"):
        quantize(tmp_path / "out", "--format", "ggml")
    with pytest.raises(DumpError, match="is not an mxcompile dump"):
        quantize(tmp_path / "out", "--dump", local_model)


def test_commands_to_copy_are_quoted(quantize, tmp_path):
    out, dump = tmp_path / "a folder", tmp_path / "a dump"
    result = quantize(out, "--dump", dump)
    assert f"(mxcompile generate '{out}' --prompt ...)" in result.stdout
    assert f"(mxcompile show '{dump}')" in result.stderr


TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install 'mxcompile[eval]'")
@pytest.mark.filterwarnings("default")
def test_lm_eval_runs_on_a_checkpoint(checkpoint, tmp_path, monkeypatch):
    """A task of two questions, one of which has the answer that the model finds likelier."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_model(str(checkpoint))
    with torch.no_grad():
        scores = model(tokenizer("The capital", return_tensors="pt").input_ids).logits[0, -1]
    likelier = int(scores[9] < scores[10])
    rows = [{"question": "The capital", "choices": ["Paris", "Berlin"], "answer": right} for right in (0, 1, likelier)]
    (tmp_path / "tiny.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "tiny.jsonl"))
    how = ("--model", "hf", "--model_args", f"pretrained={checkpoint}", "--tasks", "tiny", "--include_path", tmp_path)
    run("lm-eval", *how, "--device", "cpu", "--output_path", tmp_path / "result.json")
    (written,) = tmp_path.glob("result*.json")
    assert json.loads(written.read_text())["results"]["tiny"]["acc,none"] == pytest.approx(2 / 3)


def test_lm_eval_says_how_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(InputError, match=r"lm_eval is not installed .*: pip install 'mxcompile\[eval\]'"):
        run("lm-eval", "--tasks", "tiny")
