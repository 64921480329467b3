"""Run the cells of a study that are not finished, and keep each one's record as a line of `cells.jsonl`.

A model is loaded and traced once, folds that begin the pipelines of several cells run once, and what a pipeline makes
is scored on all texts: such cells are a bundle, which one process runs. A study that was killed goes on with the first
cell that has no record.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from torch import nn

from mxcompile.atomic_files import folder_lock
from mxcompile.checkpoint.provenance import installed_versions
from mxcompile.cli.compare import EvalData, check_data, data_without_model
from mxcompile.cli.memory_in_use import peak_bytes
from mxcompile.cli.model_source import load_model
from mxcompile.cli.progress import waiting
from mxcompile.cli.study.cell import Cell, StudiedModel
from mxcompile.cli.study.results import label
from mxcompile.cli.study.study_file import StudyFile
from mxcompile.deploy import deploy
from mxcompile.diagnostics.evaluation import score_windows, total_scores
from mxcompile.errors import InputError, MXCompileError
from mxcompile.graph.program import Program, Stage
from mxcompile.graph.trace import trace
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.modules import stored_bytes

CELLS = "cells.jsonl"
Record = dict[str, Any]


class Finished:
    """The records of finished cells in a folder. A line that a killed run has left half is as if it were not there.

    turns: a folder that all processes which add records have in common, and in which they take turns.
    """

    def __init__(self, folder: Path, turns: Path | None = None) -> None:
        self._file, self._turns = folder / CELLS, turns
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        self.records: dict[str, Record] = {}
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if not isinstance(record, dict) or "key" not in record:
                raise InputError(f"{self._file} is not of a study: name another folder with --resume")
            self.records[str(record["key"])] = cast(Record, record)

    def add(self, record: Record) -> None:
        """Append a record."""
        with nullcontext() if self._turns is None else folder_lock(self._turns):
            ends = not self._file.exists() or self._file.read_bytes()[-1:] in (b"", b"\n")
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{'' if ends else chr(10)}{json.dumps(record)}\n")
        self.records[record["key"]] = record


def run_cells(
    console: Console,
    study: StudyFile,
    cells: Sequence[Cell],
    finished: Finished,
    most: int | None = None,
    take: Callable[[Cell], bool] = lambda _: True,
) -> None:
    """Run cells bundle by bundle. take: whether a bundle, named by its first cell, is to be run here.

    most: cells of a bundle. Raises MXCompileError if a cell fails; its notes say which.
    """
    for model in dict.fromkeys(cell.model for cell in cells):
        loaded: _ModelCells | None = None
        for bundle in bundles([cell for cell in cells if cell.model == model], most):
            if take(bundle[0]):
                loaded = loaded or _ModelCells(console, study, model, bundle[0].device)
                loaded.run(bundle, finished)


def bundles(cells: Sequence[Cell], most: int | None = None) -> list[list[Cell]]:
    """The cells of one model; those with the same batches and equal first passes are a list, of about `most` cells.

    The texts of one pipeline stay together.
    """
    ordered = sorted(cells, key=lambda cell: (_calibration_key(cell), str(cell.pipeline), _data_key(cell)))
    found: list[list[Cell]] = []
    for cell in ordered:
        if found and _belongs(cell, found[-1], most):
            found[-1].append(cell)
        else:
            found.append([cell])
    return found


def _belongs(cell: Cell, bundle: Sequence[Cell], most: int | None) -> bool:
    """Whether a cell goes on with what the last one of a bundle has made."""
    previous = bundle[-1]
    if _calibration_key(previous) != _calibration_key(cell):
        return False
    fits = most is None or len(bundle) < most
    return previous.pipeline == cell.pipeline or (fits and common_folds(previous.pipeline, cell.pipeline) > 0)


@dataclass(frozen=True)
class _Quantized:
    """A cell's model, and what it took to make it."""

    model: nn.Module
    seconds: float
    peak_bytes: int | None


class _ModelCells:
    """A model, loaded once for several bundles."""

    def __init__(self, console: Console, study: StudyFile, model: StudiedModel, device: str) -> None:
        self._console = console
        with waiting(console, f"loading {model.name}"):
            loaded, self._tokenizer = load_model(model.source)
        change = study.change_of(model)
        loaded = loaded if change is None else change(loaded)
        self._model: nn.Module = loaded.to(device)
        self._data: dict[tuple[Any, ...], EvalData] = {}
        self._programs: dict[bytes, Program] = {}

    def run(self, bundle: Sequence[Cell], finished: Finished) -> None:
        """Run the cells of a bundle; those of one pipeline have one model."""
        shared = SharedFolds()
        by_pipeline = [[*cells] for _, cells in itertools.groupby(bundle, key=lambda cell: cell.pipeline)]
        for cells, following in zip(
            by_pipeline, [*(cells[0].pipeline for cells in by_pipeline[1:]), None], strict=True
        ):
            quantized: _Quantized | None = None
            for cell in cells:
                try:
                    with waiting(self._console, f"{cell.model.name}: {label(cell.described())}"):
                        quantized = quantized or self._quantized(cell, shared, following)
                        record = self._record(cell, quantized)
                except MXCompileError as error:
                    error.add_note(f"in the cell {cell.described()}; finished cells are kept")
                    raise
                finished.add(record)
                kl = f"KL {record['kl']:.4f}, {record['seconds']:.1f} s"
                self._console.print(f"  {cell.model.name} {label(record)}: {kl}", markup=False)

    def _quantized(self, cell: Cell, shared: "SharedFolds", following: Pipeline | None) -> _Quantized:
        data = self._data_of(cell)
        program = self._program_of(cell, data)
        started = time.perf_counter()
        with peak_bytes() as peak:
            model = deploy(shared.run(program, cell.pipeline, data.batches, following), self._model)
        return _Quantized(model, time.perf_counter() - started, peak())

    def _record(self, cell: Cell, quantized: _Quantized) -> Record:
        data = self._data_of(cell)
        scores = score_windows(quantized.model, data.windows, self._model)
        total = total_scores(scores, compared=True)
        text = f"{data.text}, {len(data.windows)} x {data.windows[0].shape[1]}"
        return {
            "key": cell.key,
            **cell.described(),
            "evaluation": text,
            "calibrated_on": data.calibration,
            **asdict(total),
            "perplexity": total.perplexity,
            "bytes": stored_bytes(quantized.model),
            "reference_bytes": stored_bytes(self._model),
            "windows": [[each.tokens, *each.sums] for each in scores],
            "seconds": quantized.seconds,
            "peak_bytes": quantized.peak_bytes,
            "versions": dict(installed_versions()),
        }

    def _data_of(self, cell: Cell) -> EvalData:
        key = _data_key(cell)
        if key not in self._data:
            data = data_without_model(cell.options, self._tokenizer)
            check_data(cell.model.name, self._model, data)
            kept = {old: each for old, each in self._data.items() if old[1:] == key[1:]}
            self._data = {**kept, key: data}
        return self._data[key]

    def _program_of(self, cell: Cell, data: EvalData) -> Program:
        """The traced model; it is traced again only for other example tokens, with which folds are checked."""
        example = data.example()["input_ids"].to(cell.device)
        key = example.cpu().numpy().tobytes()
        if key not in self._programs:
            self._programs = {key: trace(self._model, {"input_ids": example})}
        return self._programs[key]


class SharedFolds:
    """Runs pipelines on one program and the same batches; passes with which the next one begins too run once.

    Only up to where the program is still float, as a pipeline starts from there.
    """

    def __init__(self) -> None:
        self._passes: tuple[Pass, ...] = ()
        self._program: Program | None = None

    def run(self, program: Program, pipeline: Pipeline, batches: object, following: Pipeline | None) -> Program:
        """The program after a pipeline. following: the one that will be run next."""
        passes = pipeline.passes
        if self._program is None or passes[: len(self._passes)] != self._passes:
            self._passes, self._program = (), program
        known = len(self._passes)
        common = 0 if following is None else common_folds(pipeline, following)
        if common > known:
            self._program = Pipeline(passes[known:common]).run(self._program, batches)
            self._passes = passes[:common]
        start = self._program
        if common < known:
            self._passes, self._program = (), None
        return Pipeline(passes[max(known, common) :]).run(start, batches)


def common_folds(first: Pipeline, second: Pipeline) -> int:
    """With how many equal passes two pipelines begin that leave the program float; each keeps one pass at least."""
    best, stage = 0, Stage.FLOAT
    for count, (one, other) in enumerate(zip(first.passes[:-1], second.passes[:-1], strict=False), start=1):
        if one != other:
            break
        stage = stage if one.gives is None else one.gives
        if stage is Stage.FLOAT:
            best = count
    return best


def _data_key(cell: Cell) -> tuple[Any, ...]:
    """Cells with an equal key have the same windows and batches."""
    return (f"{cell.evaluation} {cell.evaluation.text}", *_calibration_key(cell))


def _calibration_key(cell: Cell) -> tuple[str, str]:
    """Cells with an equal key have the same batches: without a source, they are of the text."""
    own = cell.calibration is not None and cell.calibration.source is None
    return str(cell.calibration), f"{cell.evaluation} {cell.evaluation.text}" if own else ""
