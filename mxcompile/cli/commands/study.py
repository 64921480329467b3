"""`mxcompile study FILE.toml`: many pipelines on many data, compared."""

from pathlib import Path
from typing import Annotated

import typer

from mxcompile.cli.arguments import Json
from mxcompile.cli.console import messages, print_json, results
from mxcompile.cli.study.processes import run_study
from mxcompile.cli.study.results import page_content, print_study
from mxcompile.cli.study.run import CELLS
from mxcompile.cli.study.study_file import StudyFile
from mxcompile.diagnostics.report.study_page import write_study_page


def study(
    file: Annotated[Path, typer.Argument(help="the study: a TOML file")],
    resume: Annotated[
        Path | None, typer.Option(help="folder for the results, out/NAME by default; cells in it are not run again")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; instead of the file's")] = None,
    processes: Annotated[int, typer.Option(min=1, help="how many run combinations side by side")] = 1,
    as_json: Json = False,
) -> None:
    """Quantize and evaluate models in all combinations that a file names, and compare them.

    Writes a line for each combination to cells.jsonl, and a page with the front of bytes and KL. A study that was
    stopped goes on after its last finished combination when it is started again.

    --json: {"name", "folder", "cells": [...]}; a cell is a line of cells.jsonl.
    """
    folder = resume or Path("out") / file.stem
    records = run_study(messages(), StudyFile.load(file), folder, device, processes)
    page = write_study_page(folder, page_content(file.stem, records))
    if as_json:
        print_json({"name": file.stem, "folder": str(folder), "cells": records})
        return
    print_study(results(), records)
    results().print(f"all numbers: {folder / CELLS}; page: {page}", markup=False)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(study)
