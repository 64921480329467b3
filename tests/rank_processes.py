"""Run a function of `rank_scenarios.py` in several processes that share a process group (gloo, on this machine)."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent
_SECONDS = 300


def run(scenario: str, count: int, seconds: float = _SECONDS) -> list[Any]:
    """What the scenario returns in each process, by its number; in a single process there is no process group."""
    with tempfile.TemporaryDirectory() as folder:
        running = start(scenario, count, Path(folder))
        outputs = [process.communicate(timeout=seconds)[0] for process in running]
        for number, process in enumerate(running):
            assert process.returncode == 0, f"process {number}:\n{outputs[number]}"
        return [torch.load(Path(folder) / f"{number}.pt", weights_only=False) for number in range(count)]


def start(scenario: str, count: int, folder: Path) -> list[subprocess.Popen[str]]:
    """Processes that have just been started; each writes what the scenario returns to `<its number>.pt`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(TESTS / "rank_scenarios.py"), scenario, str(folder), str(count)]
    return [
        subprocess.Popen(
            [*command, str(number)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for number in range(count)
    ]
