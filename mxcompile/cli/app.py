"""The command line app: each file of `commands/` registers its own."""

import inspect
import re
import sys
import time
import warnings
from typing import Annotated

import typer
from rich.text import Text

from mxcompile.calibration.ranks.process_group import is_first, launched
from mxcompile.checkpoint.provenance import installed_versions
from mxcompile.cli.commands import dumps, evaluate, lists, models, quantize, serve, study
from mxcompile.cli.console import messages, warnings_as_messages
from mxcompile.errors import InputError, MXCompileError

_PRINTING = 2.0  # seconds

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for _commands in (evaluate, quantize, models, serve, study, dumps, lists):
    _commands.register(app)
for _command in app.registered_commands:
    # Typer keeps the line breaks of a docstring behind its first paragraph: only those after a sentence or before an
    # option are meant
    _command.help = re.sub(r"(?<![.:\n])\n(?!\n|--)", " ", inspect.getdoc(_command.callback) or "")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(", ".join(f"{name} {version}" for name, version in installed_versions().items()))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[  # pyright: ignore[reportUnusedParameter] - its callback ends the program
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the versions of what runs")
    ] = False,
) -> None:
    """Quantize PyTorch models to Microscaling (MX) formats."""


def main() -> None:
    """Entry point: an `MXCompileError`, or an OSError, is printed as one message and its notes, without a traceback."""
    try:
        if launched() and sys.argv[1:2] not in (["quantize"], ["--help"]):
            raise InputError("torchrun is for mxcompile quantize: start other commands without it")
        if not is_first():
            warnings.simplefilter("ignore")  # the first process gives the same
        with warnings_as_messages():
            app()
    except (MXCompileError, OSError) as error:
        screen, has_run = messages(), getattr(error, "unfinished", None) is not None
        screen.print(Text(f"error: {error}", style="red"))
        for note in getattr(error, "__notes__", ()):  # that of a failed run says what is left, and ends with a command
            screen.print(Text(f"{'in Python' if has_run else 'note'}: {note}"))
        if not is_first():
            time.sleep(_PRINTING)  # torchrun ends all processes when the first of them has ended
        raise SystemExit(1) from None
