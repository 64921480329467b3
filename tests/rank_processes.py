"""Run a function of `rank_scenarios.py` in several processes that share a process group (gloo, on this machine).

They are forked from a process that has imported all there is to import, and has done nothing else.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

SECONDS = 900  # on a machine with other work
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["rank_scenarios"])


def run(scenario: str, count: int) -> list[Any]:
    """What the scenario returns in each process, by its number; in a single process there is no process group."""
    with tempfile.TemporaryDirectory() as folder:
        with started(scenario, count, Path(folder)) as running:
            for number, process in enumerate(running):
                assert ended(process, SECONDS) == 0, f"process {number}:\n{printed(Path(folder), number)}"
        return [torch.load(Path(folder) / f"{number}.pt", weights_only=False) for number in range(count)]


@contextmanager
def started(scenario: str, count: int, folder: Path) -> Generator[list[ForkServerProcess]]:
    """Processes that have just been started; each writes what the scenario returns to `<its number>.pt`.

    None of them is left after the block.
    """
    running: list[ForkServerProcess] = []
    try:
        for number in range(count):
            running.append(_CONTEXT.Process(target=_take_part, args=(scenario, folder, count, number)))
            running[-1].start()
        yield running
    finally:
        for process in running:
            process.kill()
            process.join()


def ended(process: ForkServerProcess, seconds: float) -> int | None:
    """The exit status of a process that is given so long to end; None if it has not."""
    process.join(seconds)
    return process.exitcode


def printed(folder: Path, number: int) -> str:
    """What a process has printed until now."""
    return (folder / f"{number}.txt").read_text(errors="replace")


def _take_part(scenario: str, folder: Path, count: int, number: int) -> None:
    """The whole of one process."""
    output = os.open(folder / f"{number}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    import rank_scenarios

    rank_scenarios.main(scenario, folder, count, number)
