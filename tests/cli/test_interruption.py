"""Ctrl-C during `mxcompile quantize`: the message, what is kept, and the same bytes from a run that goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mxcompile.cli.app import app
from mxcompile.errors import InputError

RECIPE = "awq-fold{weight=mxint4} | gptq{format=mxint4,activation=mxint8} | lower-mx{weight=mxint4,activation=mxint8}"


@pytest.fixture(scope="module")
def command(local_model, tmp_path_factory):
    """command(out, ...): the arguments that quantize a tiny model."""
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text("The capital of France is Paris . " * 400)
    size = ("--text", text, "--length", 32, "--windows", 2, "--calibration", 2, "--recipe", RECIPE)

    def arguments(out: Path, *options: object) -> list[str]:
        return [*map(str, ("quantize", local_model, "--out", out, *size, *options))]

    return arguments


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def stopped(monkeypatch):
    """stopped(pass name, segment): Ctrl-C before a segment of a pass; None: no longer."""

    def set_stop(name: str | None, at: int = 0) -> None:
        def segment(self, program, step, done, total):
            if (step.current.name, done) == (name, at):
                raise KeyboardInterrupt

        monkeypatch.setattr("mxcompile.cli.progress.Progress.segment", segment)

    return set_stop


def run(arguments: list[str]) -> Any:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_without_a_folder_the_message_names_the_option(command, stopped, tmp_path):
    stopped("gptq", 1)
    result = run(command(tmp_path / "out"))
    assert result.exit_code == 130
    assert "interrupted: nothing is written; with --resume FOLDER the finished parts" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "at"), [("awq-fold", 0), ("gptq", 1), ("lower-mx", 1)])
def test_the_same_command_goes_on_to_the_same_bytes(command, stopped, tmp_path, name, at):
    assert run(command(tmp_path / "expected")).exit_code == 0
    again = command(tmp_path / "out", "--resume", tmp_path / "run")
    stopped(name, at)
    result = run(again)
    assert result.exit_code == 130
    assert f"interrupted: finished parts are kept in {tmp_path / 'run'}; the same command goes on" in result.stderr
    assert not (tmp_path / "out").exists()
    stopped(None)
    assert run(again).exit_code == 0
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.parametrize("resume", ["out", "out/run", "."])
def test_parts_and_result_need_folders_of_their_own(command, tmp_path, resume):
    result = run(command(tmp_path / "out", "--resume", tmp_path / resume))
    assert isinstance(result.exception, InputError)
    assert "are in one folder: give each one of its own" in str(result.exception)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_a_real_signal(command, tmp_path):
    """SIGINT once the first segment is kept; then the same command in a new process."""
    again = [sys.executable, "-m", "mxcompile", *command(tmp_path / "out", "--resume", tmp_path / "run")]
    with subprocess.Popen(again, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list((tmp_path / "run").glob("*gptq-0000.json")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=120)
    assert process.returncode == 130, messages
    assert f"finished parts are kept in {tmp_path / 'run'}" in messages
    assert "Traceback" not in messages
    assert not (tmp_path / "out").exists()
    subprocess.run(again, check=True, capture_output=True, timeout=300)
    assert run(command(tmp_path / "expected")).exit_code == 0
    assert files(tmp_path / "out") == files(tmp_path / "expected")
