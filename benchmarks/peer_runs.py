"""Runs another project's quantization in an environment of its own: installs it, runs its script, reads its weights."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import safe_open
from torch import Tensor

SCRIPTS: Final = Path(__file__).parent / "peers"
TORCH: Final = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """A project to compare with. script: in `peers/`. packages: for pip, the peer itself first."""

    script: str
    packages: tuple[str, ...]

    @property
    def version(self) -> str:
        return self.packages[0].partition("==")[2]


@dataclass(frozen=True)
class Job:
    """One quantization. checkpoint: a folder; calibration: a safetensors file with `input_ids`."""

    peer: str
    algorithm: str
    format: str
    checkpoint: Path
    calibration: Path
    seed: int


PEERS: Final = {
    "llm-compressor": Peer("with_llm_compressor.py", ("llmcompressor==0.14.0.1", "transformers==5.17.0", TORCH)),
    "auto-round": Peer("with_auto_round.py", ("auto-round==0.16.1", "transformers==5.23.0", TORCH)),
    "torchao": Peer("with_torchao.py", ("torchao==0.18.0", "transformers==5.23.0", TORCH)),
}


def quantized(job: Job, folder: Path) -> tuple[dict[str, Tensor], float]:
    """(state dict with the peer's weights, seconds of its quantization); environments and logs are kept in `folder`."""
    python = environment(job.peer, folder)
    out = folder / f"{job.peer}-{job.algorithm}-{job.format}.safetensors"
    command = [python, SCRIPTS / PEERS[job.peer].script, job.checkpoint, job.calibration, out]
    run(out.stem, [*command, job.algorithm, job.format, job.seed], out.with_suffix(".log"))
    with safe_open(out, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        seconds = float(file.metadata()["seconds"])
    out.unlink()
    return state, seconds


def environment(name: str, folder: Path) -> Path:
    """The Python of a peer's environment, which is made if it does not hold these packages yet."""
    place = folder.absolute() / name
    python = place / "bin" / "python"
    packages = list(PEERS[name].packages)
    marker = place / "installed.json"
    if not marker.exists() or json.loads(marker.read_text()) != packages:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{name}-install.log"
        run(f"making {place}", [sys.executable, "-m", "venv", "--clear", place], log)
        run(f"installing {' '.join(packages)}", [python, "-m", "pip", "install", *packages], log)
        written = marker.with_suffix(".partial")
        written.write_text(json.dumps(packages))
        written.replace(marker)
    return python


def run(what: str, command: list[object], log: Path) -> None:
    """Run a command without a model hub; if it fails, stop and name the log."""
    alone = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as file:
        words = [str(word) for word in command]
        code = subprocess.run(words, stdout=file, stderr=file, env={**os.environ, **alone}, check=False).returncode
    if code:
        lines = log.read_text().strip().splitlines() or ["no message"]
        sys.exit(f"{what} failed: {lines[-1]}\nRead {log}, fix that, and continue with --only and the remaining rows.")
