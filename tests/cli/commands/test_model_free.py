"""`mxcompile quantize --model-free`: the list before the work, the files, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mxcompile
from mxcompile.cli.app import app
from mxcompile.cli.model_source import load_model
from mxcompile.errors import InputError, PipelineError


def run(*arguments: object) -> Any:
    """The result of a command that may raise."""
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)], env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_the_list_is_printed_and_the_folder_loads_with_its_tokenizer(local_model, tmp_path):
    how = ("--model-free", "--recipe", "w4a16-mxfp-quick", "--workers", 2, "--exclude", "*.q_proj")
    result = run(local_model, "--out", tmp_path / "out", *how)
    assert re.search(
        r"^ model\.layers\.0\.mlp\.up_proj\.weight +mxfp4 +1 +\d+x\d+ +[\d.]+ +[\d.]+", result.stdout, re.M
    )
    assert re.search(r"q_proj\.weight +float32 +left in float: excluded", result.stdout)
    assert re.search(r"^LlamaForCausalLM: 6 of \d+ tensors are quantized, [\d.]+ MB become", result.stdout, re.M)
    assert "written to" in result.stdout
    model, tokenizer = load_model(str(tmp_path / "out"))
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "MXWeight"
    assert tokenizer("Paris").input_ids == [9]


def test_a_dry_run_writes_nothing(local_model, tmp_path):
    result = run(local_model, "--out", tmp_path / "out", "--model-free", "--dry-run", "--json")
    answer = json.loads(result.stdout)
    assert answer["out"] is None
    assert answer["after"] < answer["before"]
    assert {"name", "shape", "format", "input", "reason", "before", "after"} == set(answer["tensors"][0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--dry-run",), InputError, "options of --model-free"),
        (("--model-free", "--min-recovery", "0.5"), InputError, "--min-recovery compares models"),
        (("--model-free", "--resume", "parts"), InputError, "leave --resume out"),
        (("--model-free", "--recipe", "w4a8-mxint"), PipelineError, "--low-memory"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(local_model, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        run(local_model, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_model_must_be_named(tmp_path):
    with pytest.raises(InputError, match="reads a folder with safetensors"):
        run("--model-free", "--out", tmp_path / "out")


def test_ctrl_c_says_what_is_kept(local_model, tmp_path, monkeypatch):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mxcompile.cli.commands.model_free.quantize_files", interrupted)
    result = CliRunner().invoke(app, ["quantize", str(local_model), "--out", str(tmp_path / "out"), "--model-free"])
    assert result.exit_code == 130
    assert "the same command goes on" in re.sub(r"\s+", " ", result.output)


def test_python_and_the_command_do_the_same(local_model, tmp_path):
    run(local_model, "--out", tmp_path / "one", "--model-free", "--recipe", "w8a8-mxint-quick")
    mxcompile.quantize_files(local_model, tmp_path / "two", recipe="w8a8-mxint-quick")

    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert files(tmp_path / "one") == files(tmp_path / "two")
