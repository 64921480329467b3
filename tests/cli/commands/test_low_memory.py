"""`mxcompile quantize --low-memory`: the bytes of the command without it, and Ctrl-C leaves what it goes on from."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mxcompile.cli.app import app
from mxcompile.errors import InputError
from mxcompile.tensor import mapped_tensors

RECIPE = "awq-fold{weight=mxint4} | gptq{format=mxint4,activation=mxint8} | lower-mx{weight=mxint4,activation=mxint8}"


@pytest.fixture
def command(local_model, tmp_path, monkeypatch):
    """command(out, ...): run on a tiny model, of which every tensor is large."""
    (tmp_path / "text").mkdir()
    text = tmp_path / "text" / "words.txt"
    text.write_text("The capital of France is Paris . " * 400)
    size = ("--text", text, "--length", 32, "--windows", 2, "--calibration", 2, "--recipe", RECIPE)
    plain = mapped_tensors.MappedTensors.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs, smallest=1)

    monkeypatch.setattr(mapped_tensors.MappedTensors, "__init__", init)

    def run(out: Path, *options: object) -> Any:
        arguments = ["quantize", local_model, "--out", out, *size, *options]
        return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"}, catch_exceptions=True)

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_bytes(command, tmp_path):
    assert command(tmp_path / "expected").exit_code == 0
    result = command(tmp_path / "out", "--low-memory", "--memory", 0)
    assert result.exit_code == 0
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert f"written to {tmp_path / 'out'}, not compared with the float model (mxcompile eval" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out", "text"]


def test_goes_on_after_ctrl_c(command, tmp_path, monkeypatch):
    assert command(tmp_path / "expected").exit_code == 0

    def segment(self, program, step, done, total):
        if (step.current.name, done) == ("gptq", 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mxcompile.cli.progress.Progress.segment", segment)
        result = command(tmp_path / "out", "--low-memory")
    assert result.exit_code == 130
    assert f"interrupted: finished parts are kept in {tmp_path / 'out.resume'}; the same command" in result.stderr
    assert not (tmp_path / "out").exists()
    assert any((tmp_path / "out.resume").glob("02-gptq-*"))
    assert command(tmp_path / "out", "--low-memory").exit_code == 0
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert not (tmp_path / "out.resume").exists()


def test_a_folder_of_ones_own_stays(command, tmp_path):
    folders = ("--resume", tmp_path / "parts", "--dump", tmp_path / "dump")
    result = command(tmp_path / "out", "--low-memory", *folders, "--json")
    assert result.exit_code == 0
    assert (tmp_path / "dump" / "index.html").is_file()
    answer = json.loads(result.stdout)
    assert answer["out"] == str(tmp_path / "out")
    assert answer["recipe"] == RECIPE
    assert answer["calibration"] == "the first half of words.txt, 2 windows of 512"
    assert any((tmp_path / "parts").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--low-memory", "--min-recovery", "0.9"), "--min-recovery compares models, which --low-memory does not load"),
        (("--low-memory", "--format", "gguf"), "--low-memory writes mxcompile's own format: .*mxcompile convert"),
        (("--scratch", "elsewhere"), "--scratch is an option of --low-memory"),
    ],
)
def test_options_that_do_not_go_together(command, tmp_path, options, message):
    result = command(tmp_path / "out", *options)
    assert isinstance(result.exception, InputError)
    with pytest.raises(InputError, match=message):
        raise result.exception
    assert not (tmp_path / "out").exists()


def test_the_default_model_is_no_folder(tmp_path):
    arguments = ["quantize", "--low-memory", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InputError)
    assert "--low-memory reads a folder with safetensors, or a hub id: name one" in str(result.exception)
