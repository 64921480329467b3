"""Ctrl-C in a long command: its message says what is kept and how to go on."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import typer
from rich.console import Console

from mxcompile.errors import InputError

_EXIT_CODE: Final = 130  # of a program that SIGINT ended


@contextmanager
def interruption_explained(console: Console, resume: Path | None) -> Generator[None]:
    """Print a message on a KeyboardInterrupt and exit. resume: the folder of finished parts, None without one."""
    try:
        yield
    except KeyboardInterrupt:
        if resume is None:
            kept = "nothing is written; with --resume FOLDER the finished parts of slow passes are kept there"
        else:
            kept = f"finished parts are kept in {resume}; the same command goes on after the last of them"
        console.print(f"interrupted: {kept}", markup=False)
        raise typer.Exit(_EXIT_CODE) from None


def check_apart(resume: Path | None, out: Path) -> None:
    """Raise InputError if parts of a run and its result would be in one folder."""
    if resume is None:
        return
    parts, result = resume.resolve(), out.resolve()
    if parts == result or result in parts.parents or parts in result.parents:
        raise InputError(f"--resume {resume} and --out {out} are in one folder: finished parts need one of their own")
