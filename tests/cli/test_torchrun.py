"""`mxcompile quantize` in several processes that torchrun has started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mxcompile.calibration.data.sources import SourceName, read_documents

RECIPE = "gptq{format=mxint8,activation=mxint8} | lower-mx{weight=mxint8,activation=mxint8}"
SECONDS = 600


def quantized(folder: Path, model: Path, out: str, *options: str, fails: bool = False) -> str:
    """What the command prints; the model calibrates on a text of its own."""
    words = "The capital of France is Paris . " * 60
    (folder / "words.txt").write_text(words)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "mxcompile", "quantize", str(model), "--recipe", RECIPE, "--out", out, "--calibration", "4"]
    command += ["--calibration-length", "16", "--calibration-self", "own.jsonl", "--text", "words.txt"]
    command += ["--length", "32", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_first_process_writes_the_text_and_the_model(local_model, tmp_path):
    """From the model's files, which needs the text, the same one."""
    printed = quantized(tmp_path, local_model, "first")
    assert printed.count("the model's own text is in own.jsonl") == 1
    assert printed.count("written to first") == 1
    assert len(list(read_documents(SourceName(str(tmp_path / "own.jsonl"))).items)) > 1
    again = quantized(tmp_path, local_model, "again", "--low-memory")
    assert again.count("written to again, not compared with the float model") == 1
    assert not (tmp_path / "again.resume").exists()
    first, second = (
        [path.read_bytes() for path in (tmp_path / out).glob("*.safetensors")] for out in ("first", "again")
    )
    assert first == second != []


@pytest.mark.slow
def test_all_end_if_the_first_cannot_write_the_text(local_model, tmp_path):
    (tmp_path / "own.jsonl").write_text("")
    assert "own.jsonl is empty" in quantized(tmp_path, local_model, "out", fails=True)
    assert not (tmp_path / "out").exists()
