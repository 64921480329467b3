"""Run a study in this process, or in several that take its bundles of cells in turn.

Each process loads the models of its bundles itself. With several GPUs, processes take them in turn.
"""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from rich.console import Console

from mxcompile.atomic_files import folder_lock
from mxcompile.cli.console import messages
from mxcompile.cli.study.cell import Cell
from mxcompile.cli.study.run import Finished, Record, run_cells
from mxcompile.cli.study.study_file import StudyFile
from mxcompile.errors import InputError, MXCompileError

_FAILED: Final = "failed"


def run_study(
    console: Console, study: StudyFile, folder: Path, device: str | None = None, processes: int = 1
) -> list[Record]:
    """Run what is not finished, and return the records of all cells in order.

    Raises InputError if another run is working in the folder, or if a cell fails: its error says which.
    """
    cells = study.cells(device)
    with _alone(folder):
        finished = Finished(folder)
        left = [cell for cell in cells if cell.key not in finished.records]
        console.print(f"{len(cells)} cells, {len(cells) - len(left)} of them finished in {folder}", markup=False)
        if processes == 1 or not left:
            run_cells(console, study, left, finished)
        else:
            _run_in_processes(study, folder, device, [cell.key for cell in left], processes)
            finished = Finished(folder)
        return [finished.records[cell.key] for cell in cells]


def _run_in_processes(study: StudyFile, folder: Path, device: str | None, keys: Sequence[str], processes: int) -> None:
    """Run the cells of these keys. Raises InputError with the errors of the processes."""
    with (
        TemporaryDirectory(prefix="mxcompile-study-") as claims,
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
    ):
        part = _Part(study.path, folder, Path(claims), device, frozenset(keys), max(1, len(keys) // (2 * processes)))
        started = [pool.submit(part.run, threads(processes), gpu_of(number)) for number in range(processes)]
        try:
            errors = [error for part in started if (error := part.result()) is not None]
        except BrokenProcessPool as error:
            raise InputError(
                f"a process of the study ended without an error, as one does that the system kills for its memory: try "
                f"fewer than {processes} processes; finished cells are kept in {folder}"
            ) from error
    if errors:
        raise InputError("\n".join(errors))


def threads(processes: int) -> int:
    """How many threads each of several processes has: the user's number, or its share of the cores."""
    return int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // processes)))


def gpu_of(number: int) -> str | None:
    """What CUDA_VISIBLE_DEVICES is for a process: one GPU where there are several; None: it stays as it is."""
    if (gpus := torch.cuda.device_count()) < 2:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return visible.split(",")[number % gpus]


@dataclass(frozen=True)
class _Part:
    """What every process is told. keys: of the cells to run, the same for all, whatever is finished when one starts.

    most: cells of a bundle, so that all processes are busy to the end.
    """

    file: Path
    folder: Path
    claims: Path
    device: str | None
    keys: frozenset[str]
    most: int

    def run(self, thread_count: int, gpu: str | None) -> str | None:
        """Run the bundles that no other process has taken; returns what went wrong."""
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # this process has not begun to use CUDA
        torch.set_num_threads(thread_count)
        study = StudyFile.load(self.file)
        cells = [cell for cell in study.cells(self.device) if cell.key in self.keys]
        finished = Finished(self.folder, self.claims)
        try:
            run_cells(messages(), study, cells, finished, self.most, lambda first: take(self.claims, first))
        except MXCompileError as error:
            (self.claims / _FAILED).touch()
            return "; ".join([str(error), *getattr(error, "__notes__", ())])
        return None


def take(claims: Path, first: Cell) -> bool:
    """Whether this process is the first that asks for a bundle, named by its first cell; none after a failure."""
    if (claims / _FAILED).exists():
        return False
    try:
        (claims / first.key).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Hold the folder; raises InputError if it cannot be written or another run holds it."""
    try:
        with folder_lock(folder, wait=False):
            yield
    except BlockingIOError as error:
        raise InputError(f"another study is running in {folder}: name another folder with --resume") from error
