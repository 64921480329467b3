"""What README.md and passes/README.md say is run: every code block, and CI installs with README's own command."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from models import build
from typer.testing import CliRunner

from mxcompile.cli import app

ROOT = Path(__file__).parent.parent


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def local_model(tmp_path_factory) -> Path:
    """A tiny Llama with a word tokenizer, saved as a hub would hold it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["[UNK]", "[EOS]", "The", "capital", "of", "France", "is", "Germany", "Italy", "Paris", "Berlin", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = build("llama")
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    names = {"unk_token": "[UNK]", "eos_token": "[EOS]", "pad_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def test_python_blocks_and_the_commands_that_read_their_dump(local_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks(ROOT / "README.md", "python"):
        text = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(local_model))
        exec(compile(text, "README.md", "exec"), namespace)
    assert "w4a8-mxint   7 weights, largest change of a logit" in capsys.readouterr().out
    for line in blocks(ROOT / "README.md", "bash")[2].splitlines():
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, line
        assert "model.layers.0" in result.output or "lower-mx" in result.output, line


def test_demo_runs_on_a_local_model(local_model, tmp_path):
    """The demo of the first command, on a model that needs no download, uncompiled."""
    options = f"--out {tmp_path / 'demo'} --length 32 --windows 2 --new-tokens 4 --no-compile"
    result = CliRunner().invoke(app, ["demo", str(local_model), *shlex.split(options)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^ +(float|w8a8-mxint|w4a8-mxint) +([\d.]+) +(\d+)% +([\d.]+) ", result.output, re.MULTILINE)
    assert [row[0] for row in rows] == ["float", "w8a8-mxint", "w4a8-mxint"]
    assert 100 == int(rows[0][2]) > int(rows[1][2]) > int(rows[2][2])
    assert (tmp_path / "demo" / "w4a8-mxint" / "02-lower-mx.txt").exists()


def test_ci_installs_and_tests_as_readme_says():
    install, tests = blocks(ROOT / "README.md", "bash")[1].strip().rsplit(" && ", 1)
    script = (ROOT / ".ci" / "run").read_text()
    assert install in script
    assert tests in script


def test_the_two_commands_differ_in_what_they_run_only():
    demo, tests = (block.strip() for block in blocks(ROOT / "README.md", "bash")[:2])
    assert demo == tests.replace("[test]", "[demo]").replace("python -m pytest", "mxcompile demo")


def test_writing_a_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    example, use = blocks(ROOT / "passes" / "README.md", "python")
    assert example.count("\n") <= 30
    namespace: dict[str, object] = {"__name__": "passes_readme"}
    for block in (example, use):
        exec(compile(block, "passes/README.md", "exec", dont_inherit=True), namespace)
    assert "clip-weights{ratio=0.95} 2 rewrites, 0 misses" in capsys.readouterr().out
    assert "MXWeight" in str(namespace["quantized"][0].weight)


def test_the_architecture_table_is_the_measured_one():
    table = re.findall(
        r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    records = [json.loads(line) for line in (ROOT / "benchmarks/results/folds.jsonl").read_text().splitlines()]
    keys = ("architecture", "groups", "folded", "multiplied", "skipped")
    assert table == [tuple(str(record[key]) for key in keys) for record in records]
    assert min(min(record["sqnr_db_smooth"], record["sqnr_db_awq"]) for record in records) > 111


def test_the_accuracy_table_is_the_measured_one():
    """Shares closed, and the rise by rounding, of every pair of formats."""
    records = [json.loads(line) for line in (ROOT / "benchmarks/results/accuracy.jsonl").read_text().splitlines()]
    text = (ROOT / "README.md").read_text()
    for pair in dict.fromkeys((r["weight"], r["activation"]) for r in records):
        rows = [r for r in records if (r["weight"], r["activation"]) == pair and not r.get("planted")]
        shares = " | ".join(f"{r['closes']:.0%}".replace("%", " %") for r in rows[1:])
        assert f"| {pair[0]}, {pair[1]} | {rows[0]['nll'] - rows[0]['nll_float']:.3f} | {shares} |" in text
