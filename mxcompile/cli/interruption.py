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


def check_apart(out: Path, **folders: Path | None) -> None:
    """Raise InputError if the folder of an option (finished parts, a dump) and the result would be in one folder."""
    for option, folder in folders.items():
        if folder is None:
            continue
        other, result = folder.resolve(), out.resolve()
        if other == result or result in other.parents or other in result.parents:
            raise InputError(f"--{option} {folder} and --out {out} are in one folder: give each one of its own")
