"""Run a function of `rank_scenarios.py` in several processes that share a process group (gloo, on this machine)."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent
SECONDS = 900  # on a machine with other work


def run(scenario: str, count: int) -> list[Any]:
    """What the scenario returns in each process, by its number; in a single process there is no process group."""
    with tempfile.TemporaryDirectory() as folder:
        with started(scenario, count, Path(folder)) as running:
            outputs = [process.communicate(timeout=SECONDS)[0] for process in running]
        for number, process in enumerate(running):
            assert process.returncode == 0, f"process {number}:\n{outputs[number]}"
        return [torch.load(Path(folder) / f"{number}.pt", weights_only=False) for number in range(count)]


@contextmanager
def started(scenario: str, count: int, folder: Path) -> Generator[list[subprocess.Popen[str]]]:
    """Processes that have just been started; each writes what the scenario returns to `<its number>.pt`.

    None of them is left after the block.
    """
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(TESTS / "rank_scenarios.py"), scenario, str(folder), str(count)]
    running: list[subprocess.Popen[str]] = []
    try:
        for number in range(count):
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            running.append(subprocess.Popen([*command, str(number)], env=environment, **output))
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()
